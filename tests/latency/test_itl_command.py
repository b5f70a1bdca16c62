"""``kvplan itl`` as people and programs meet it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Ran

import kvplan
from kvplan.errors import InputError, KvplanError
from kvplan.latency.plan import DEFINITIONS
from kvplan.terminal.plain import wrap
from kvplan.terminal.plot import PlotLine, draw

ROOT = Path(__file__).parents[2]

BASE = ("itl", "--model", "70b", "--gpu", "h200", "--tp", "4")
SEED = (*BASE, "--batch", "32", "--ctx", "1k..128k", "--kv-cache-dtype", "bf16,fp8,fp8_per_token_head")


def test_the_seed_command_answers_in_eighty_columns(kvplan_cli: Callable[..., Any]) -> None:
    ran = kvplan_cli(*SEED)
    assert ran.code == 0
    assert all(len(line) <= 80 for line in ran.out.splitlines())
    text = " ".join(ran.out.split())
    for words in ("per 1k tokens at batch 32", "that of 16-bit KV, calibrated (", "it saves less than 2%",
                  "the KV no longer fits beyond", "80% interval", "tok/s/GPU", "inter-token latency"):  # fmt: skip
        assert words in text


def test_impossible_points_are_marked_and_not_drawn(kvplan_cli: Callable[..., Any]) -> None:
    ran = kvplan_cli(*BASE, "--batch", "32", "--ctx", "1k..128k", "--kv-cache-dtype", "bf16")
    rows = [line for line in ran.out.splitlines() if "does not fit" in line]
    assert [row.split()[0] for row in rows] == ["65,536", "131,072"]
    limit = int(ran.out.split("no longer fits")[1].split("beyond")[1].split()[0].replace(",", ""))
    assert 32_768 < limit < 65_536
    assert f"{limit:,} tokens" in ran.out.split("└")[1]


def test_where_kv_ends_is_the_sizing_answer(kvplan_cli: Callable[..., Any]) -> None:
    ran = kvplan_cli(*BASE, "--batch", "32", "--ctx", "32k", "--kv-cache-dtype", "fp8", "--json")
    sized = kvplan.size(compare=False, model="70b", gpu="h200", tp_size=4, kv_cache_dtype="fp8", batch_size=32,
                        context_tokens=32_768, max_model_len_tokens=131_072)  # fmt: skip
    assert ran.json["max_context_tokens"] == sized.answers.max_context_at_batch_tokens


@pytest.mark.parametrize("model", ["70b", "gpt-oss-120b", "deepseek-v3", "qwen3.5-27b"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("batch", [16, 256])
def test_what_fits_is_the_sizing_answer(model: str, engine: str, batch: int) -> None:
    point = {
        "model": model,
        "gpu": "h200",
        "tp_size": 8,
        "engine": engine,
        "kv_cache_dtype": "fp8",
        "batch_size": batch,
    }
    for context in (8_192, 65_536):
        sized = kvplan.size(compare=False, **point, context_tokens=context)
        assert kvplan.itl(**point, context_tokens=context).fits is sized.fits


def test_json_keeps_the_contract(kvplan_cli: Callable[..., Any]) -> None:
    found = kvplan_cli(*BASE, "--batch", "32", "--ctx", "32k", "--kv-cache-dtype", "fp8", "--json").json
    assert found["request"]["context_tokens"] == 32_768
    assert (found["request"]["model"], found["request"]["gpu"], found["request"]["tp_size"]) == (
        "llama-3.1-70b",
        "h200",
        4,
    )
    assert set(found["breakdown"]) == {"weights", "kv", "compute", "collectives", "overhead"}
    assert found["itl_s"] == pytest.approx(found["intercept_s"] + 32_768 * found["slope_s_per_token"])
    assert found["interval_s"][0] < found["itl_s"] < found["interval_s"][1]
    assert found["source"] in ("calibrated", "assumed")
    assert found["slope_ratio_source"] == "calibrated" and 0.4 < found["slope_ratio"] < 1
    assert found["definitions"] == DEFINITIONS
    traffic = found["traffic"]
    # 32 requests × 32,768 tokens × 80 layers × 2 heads × 256 bytes, in whole blocks
    assert traffic["kv_read_bytes"] == 32 * 32_768 * 80 * 2 * 256
    assert traffic["kv_stored_bytes"] >= traffic["kv_read_bytes"]
    assert traffic["collectives"]["all_reduce_count"] == 160


def test_a_sweep_is_lines_of_points(kvplan_cli: Callable[..., Any]) -> None:
    found = kvplan_cli(*SEED, "--json").json
    assert [line["label"] for line in found["lines"]] == ["bf16", "fp8", "fp8_per_token_head"]
    assert [p["request"]["context_tokens"] for p in found["lines"][0]["points"]] == [1024 * 2**i for i in range(8)]
    half, eight, scaled = (line["slope_s_per_token"] for line in found["lines"])
    assert eight < scaled < half


def test_the_break_even_is_where_fp8_saves_two_percent(kvplan_cli: Callable[..., Any]) -> None:
    tokens = kvplan_cli(*BASE, "--batch", "32", "--ctx", "32k", "--kv-cache-dtype", "fp8", "--json").json[
        "break_even_tokens"
    ]
    point = {"model": "70b", "gpu": "h200", "tp_size": 4, "batch_size": 32, "context_tokens": round(tokens / 32)}
    half, eight = (kvplan.itl(**point, kv_cache_dtype=d).itl_s for d in ("bf16", "fp8"))
    assert 1 - eight / half == pytest.approx(0.02, abs=5e-4)


def test_load_gives_tpot_and_ttft_with_their_definitions(kvplan_cli: Callable[..., Any]) -> None:
    words = ("itl", "--model", "qwen3-32b", "--gpu", "h100", "--tp", "2", "--isl", "8k", "--osl", "1k")
    shown = kvplan_cli(*words, "--concurrency", "16,64")
    assert shown.code == 0 and "TPOT: mean time per output token" in shown.out and "TTFT: time from" in shown.out
    found = kvplan_cli(*words, "--concurrency", "16", "--json").json
    for name in ("tpot", "ttft"):
        low, high = found[f"{name}_interval_s"]
        assert low < found[f"{name}_s"] < high
    assert found["tpot_s"] > found["itl_s"] > 0


def test_explain_shows_the_formula_with_its_numbers(kvplan_cli: Callable[..., Any]) -> None:
    out = kvplan_cli("itl", "--model", "deepseek-v3", "--gpu", "b200", "--tp", "8", "--batch", "64", "--ctx", "8k",
                     "--explain").out  # fmt: skip
    out = " ".join(out.split())
    assert "uniform: 1 − (1 − 8/256)^tokens = 86.9%" in out
    touched = float(re.search(r"experts touched: ([\d.]+)% of 256", out)[1])  # type: ignore[index]
    assert 100 * 8 / 256 < touched < 86.9
    for part in ("weights", "compute", "kv", "collectives", "overhead", "roofline"):
        assert part in out


def test_cases_answer_line_by_line_and_never_stop(kvplan_cli: Callable[..., Any], tmp_path: Path) -> None:
    cases: list[Any] = [
        {"id": 1, "model": "70b", "gpu": "h200", "tp_size": 4, "context_tokens": "32k", "batch_size": 8},
        {"id": 2, "model": "70b", "gpu": "h201", "context_tokens": 1, "batch_size": 1},
        "nonsense",
        {"id": 4, "model": "deepseek-v3", "gpu": "b200", "engine": "trtllm", "tp_size": 1, "attention_dp_size": 8,
         "moe_tp_size": 1, "moe_ep_size": 8, "weight_dtype": "nvfp4", "engine_version": "1.0.0rc4",
         "input_tokens": 1024, "output_tokens": 1024, "concurrency": 512},
        {"id": 5, "model": "70b", "gpu": "h200", "context_tokens": [1], "batch_size": 1},
        {"id": 6, "model": ["70b"], "gpu": "h200", "context_tokens": 1, "batch_size": 1},
    ]  # fmt: skip
    file = tmp_path / "cases.jsonl"
    file.write_text("\n".join(json.dumps(case) for case in cases) + "\n\n")
    rows = [json.loads(line) for line in kvplan_cli("itl", "--cases", str(file)).out.splitlines()]
    assert len(rows) == len(cases)
    assert rows[0]["request"]["id"] == 1 and rows[0]["itl_s"] > 0
    assert rows[1]["error"]["code"] == "unknown_name" and "h200" in rows[1]["error"]["hint"]
    assert all("error" in rows[i] for i in (2, 4, 5))
    assert rows[3]["tpot_s"] > 0 and rows[3]["request"]["concurrency"] == 512


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*BASE, "--ctx", "128k..1k"), "runs backwards"),
        ((*BASE, "--ctx", "8k,1k"), "does not ascend"),
        ((*BASE, "--length-spread", "0.2"), "--length-spread is of a load"),
        ((*BASE, "--kv-cache-dtype", ""), "--kv-cache-dtype has no value"),
        ((*BASE, "--ctx", "1k,1k"), "does not ascend"),
        ((*BASE, "--ctx", "0"), "between 1 and"),
        ((*BASE, "--ctx=-5"), "not a token count"),
        ((*BASE, "--ctx", "1000000000000"), "beyond any server"),
        ((*BASE, "--ctx", "1..1000000000000"), "beyond any server"),
        ((*BASE, "--ctx", "soon"), "not a token count"),
        ((*BASE, "--ctx", ","), "no value"),
        ((*BASE, "--ctx", "1k", "--batch", "0"), "--batch"),
        ((*BASE, "--ctx", "1k", "--isl", "1k"), "--osl and --concurrency"),
        ((*BASE, "--ctx", "1k", "--isl", "1k", "--osl", "1k", "--concurrency", "1"), "both given"),
        (("itl", "--model", "70b", "--ctx", "1k"), "no GPU named"),
        (("itl", "--gpu", "h200", "--ctx", "1k"), "no model given"),
        (("itl", "--model", "70b", "--gpu", "h2000", "--ctx", "1k"), "closest: "),
        (("itl", "--model", "70b", "--gpu", "h200", "--engine", "vlm", "--ctx", "1k"), "closest: vllm"),
        (("itl", "--model", "70b", "--gpu", "h200", "--ctx", "1k", "--kv-cache-dtype", "fp9"), "closest: fp8"),
    ],
)
def test_bad_input_is_one_clear_line(kvplan_cli: Callable[..., Any], words: tuple[str, ...], says: str) -> None:
    ran = kvplan_cli(*words)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert says in ran.err


def test_an_unknown_checkpoint_of_a_known_model_is_taken_by_its_name(offline: Path) -> None:
    found = kvplan.itl(model="nvidia/Qwen3-32B-NVFP4", gpu="b200", context_tokens=1024, batch_size=1)
    assert found.facts.request["model"] == "qwen3-32b" and found.facts.request["weight_dtype"] == "nvfp4"
    assert "taken as qwen3-32b" in found.facts.notes[0]


def test_an_unstated_kv_dtype_is_assumed_and_said() -> None:
    point = {"model": "llama-3.1-70b", "context_tokens": 1024, "batch_size": 1, "weight_dtype": "fp8"}
    found = kvplan.itl(**point, gpu="b200")
    assert found.facts.request["kv_cache_dtype"] == "fp8" and "KV dtype not stated" in found.facts.notes[0]
    stated = kvplan.itl(**point, gpu="b200", kv_cache_dtype="bf16")
    assert stated.facts.request["kv_cache_dtype"] == "bfloat16" and stated.facts.notes == ()


@pytest.mark.parametrize(("engine", "kept"), [("vllm", "bfloat16"), ("trtllm", "fp8"), ("sglang", "bfloat16")])
def test_on_hopper_only_tensorrt_llm_is_taken_to_run_fp8_kv(engine: str, kept: str) -> None:
    """Public runs of this model that wait for KV on two H100 hold 245,000 tokens on vLLM; FP8 would hold 463,000."""
    found = kvplan.itl(model="llama-3.1-70b", gpu="h100", engine=engine, tp_size=2, weight_dtype="fp8",
                       context_tokens=1024, batch_size=1)  # fmt: skip
    assert found.facts.request["kv_cache_dtype"] == kept


@pytest.mark.parametrize(
    ("engine", "version", "used"),
    [("vllm", "9.9", "0.33"), ("sglang", "0.4", "0.5"), ("tensorrt-llm", "0.33", "1.3")],
)
def test_a_version_whose_rules_were_not_read_is_said(engine: str, version: str, used: str) -> None:
    asked = {"model": "8b", "gpu": "h200", "context_tokens": 8192, "engine": engine}
    said = f"{version}: those of {used} are used"
    assert any(said in note for note in kvplan.itl(**asked, engine_version=version).facts.notes)
    assert any(said in advice.message for advice in kvplan.size(**asked, engine_version=version).advice)
    if engine == "vllm":
        usable = kvplan.size(**asked, engine_version=version).memory.sources["usable_bytes"]
        assert usable.source == "assumed" and f"default of vllm {used}, taken for {version}" in usable.detail


def test_a_patch_of_a_version_whose_rules_were_read_is_taken_for_it() -> None:
    plan = kvplan.size(model="8b", gpu="h200", context_tokens=8192, engine="sglang", engine_version="0.5.10")
    assert not any("no rules were read" in advice.message for advice in plan.advice)


def test_a_plot_stops_where_its_line_does() -> None:
    rows = draw(
        [PlotLine("a", ((0.0, 0.0), (5.0, 5.0))), PlotLine("b", ((0.0, 10.0), (10.0, 10.0)))], ("0", "10"), width=40
    )
    assert max(len(row) for row in rows) <= 40
    bottom = next(row for row in rows if row.startswith("   0.0"))
    assert bottom.count("●") >= 1 and "○" not in bottom
    top = rows[0]
    assert top.count("○") == 31 and "●" not in top


def test_paragraphs_wrap_between_words() -> None:
    assert wrap("one two three", 8) == ["one two", "  three"]
    assert wrap("  a   b cc", 8) == ["  a   b", "    cc"]


def test_every_readme_command_of_the_section_runs(kvplan_cli: Callable[..., Any], tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    block = text.split("## Predict latency")[1].split("```sh\n")[1].split("```")[0]
    cases = tmp_path / "requests.jsonl"
    cases.write_text('{"model": "8b", "gpu": "h100", "context_tokens": 8192, "batch_size": 4}\n')
    for line in block.splitlines():
        words = shlex.split(line.split("  #")[0].split(">")[0])
        ran = kvplan_cli(*(str(cases) if word == "requests.jsonl" else word for word in words[1:]))
        assert ran.code == 0 and ran.out, line


def test_a_given_calibration_replaces_the_shipped_one_and_says_so(kvplan_cli: Callable[..., Any]) -> None:
    """The trtllm kernels of an H100 read fp8 at another rate than vLLM's: the file given is the one that counts."""
    given = ROOT / "profiles" / "calibrations" / "attention-h100-sxm-tensorrt-llm.json"
    words = (
        "itl",
        "--model",
        "70b",
        "--gpu",
        "h100-sxm",
        "--tp",
        "4",
        "--ctx",
        "8k",
        "--kv-cache-dtype",
        "fp8",
        "--json",
    )
    shipped, chosen = kvplan_cli(*words).json, kvplan_cli(*words, "--calibration", str(given)).json
    assert chosen["slope_ratio"] < shipped["slope_ratio"]
    assert "given" in chosen["slope_ratio_detail"]
    assert "the calibration given is of tensorrt-llm kernels: vllm reaches it with kernels as good" in chosen["notes"]
    assert chosen["request"]["calibration"] == str(given)


def test_a_calibration_of_another_gpu_is_refused(kvplan_cli: Callable[..., Any]) -> None:
    given = ROOT / "profiles" / "calibrations" / "attention-h100-sxm-vllm.json"
    done = kvplan_cli("itl", "--model", "70b", "--gpu", "h200", "--calibration", str(given))
    assert done.code == 2
    assert "a calibration of h100-sxm, not of h200" in done.err


def test_a_model_whose_weights_do_not_fit_has_no_line_to_quote(kvplan_cli: Callable[..., Ran]) -> None:
    """Llama 3.1 70B in 16 bits is 131 GiB, an H100 79."""
    ran = kvplan_cli("itl", "--model", "70b", "--gpu", "h100", "--ctx", "8k")
    assert ran.code == 0 and "per 1k tokens" not in ran.out
    assert "does not fit: weights and the engine's own memory exceed usable memory" in " ".join(ran.out.split())
    load = kvplan_cli("itl", "--model", "70b", "--gpu", "h100", "--isl", "2k", "--osl", "256", "--concurrency", "8")
    assert load.code == 0 and "does not fit" in load.out and "tok/s/GPU" in load.out and "of TPOT" not in load.out


def test_what_is_no_request_has_its_error_in_its_place() -> None:
    good = {"model": "8b", "gpu": "h200", "context_tokens": 4096, "batch_size": 4}
    answers = kvplan.itl_cases([5, good, "abc", {**good, "context_tokens": [1]}])  # type: ignore[list-item]
    assert [isinstance(answer, KvplanError) for answer in answers] == [True, False, True, True]
    assert "must be an object of request fields, not 5" in str(answers[0])


def test_one_output_token_has_no_tpot() -> None:
    (answer,) = kvplan.itl_cases(
        [{"model": "8b", "gpu": "h200", "input_tokens": 512, "output_tokens": 1, "concurrency": 2}]
    )
    assert isinstance(answer, InputError)
    assert "no TPOT" in answer.message


def test_no_more_run_than_the_scheduler_lets() -> None:
    """KV of 1,631 requests is held on an H200; vLLM runs 1,024 unless told, and a default can be set."""
    asked: dict[str, Any] = {
        "model": "8b",
        "gpu": "h200",
        "input_tokens": 512,
        "output_tokens": 128,
        "concurrency": 1500,
    }
    default, told = kvplan.itl(**asked), kvplan.itl(**asked, max_num_seqs=16)
    raised = kvplan.itl(**asked, max_num_seqs=1500)
    assert default.load is not None and told.load is not None and raised.load is not None
    assert default.load.running_requests == 1024 and default.fits
    assert "vllm runs 1,024 at once unless told (--max-num-seqs 1500)" in default.as_dict()["notes"][-1]
    assert told.load.running_requests == 16 and told.fits is False
    assert "--max-num-seqs 16 runs 16 at once" in told.as_dict()["notes"][-1]
    assert raised.load.running_requests == 1500 and raised.fits and raised.load.wait_note is None
    twice = kvplan.itl(**asked, max_num_seqs=16, dp_size=2)
    assert twice.load is not None and twice.load.running_requests == 32


def test_a_step_of_more_than_the_scheduler_was_told_never_runs(kvplan_cli: Callable[..., Ran]) -> None:
    words = "itl --model 8b --gpu h200 --ctx 1k --batch 64 --max-num-seqs 16"
    assert "--max-num-seqs 16 runs 16 at once" in " ".join(kvplan_cli(*words.split()).out.split())
    assert kvplan.itl(model="8b", gpu="h200", context_tokens=1024, batch_size=64, max_num_seqs=16).fits is False
    assert kvplan.itl(model="8b", gpu="h200", context_tokens=1024, batch_size=64, max_num_seqs=64).fits


def test_a_load_whose_requests_do_not_fit_one_by_one_has_no_times(kvplan_cli: Callable[..., Ran]) -> None:
    """70B on two H100s holds 24,208 tokens of KV, and the prompt has 120k."""
    words = "itl --model 70b --gpu h100 --tp 2 --isl 120k --osl 1k --concurrency 4"
    assert "does not fit: KV holds not one request so long" in kvplan_cli(*words.split()).out
    assert '"fits": false' in kvplan_cli(*words.split(), "--json").out


@pytest.mark.parametrize("model", ["8b", "deepseek-v3", "gpt-oss-120b", "kimi-k2.5-nvfp4", "llama-2-7b"])
def test_itl_and_size_have_one_name_for_how_weights_are_stored(model: str) -> None:
    asked: dict[str, Any] = {"model": model, "gpu": "b200", "tp_size": 8, "context_tokens": 4096}
    plan, step = kvplan.size(**asked), kvplan.itl(**asked, batch_size=1)
    assert plan.model is not None and plan.model.weight_format == step.facts.request["weight_dtype"]
    stated = kvplan.size(**asked, weight_dtype="w8a8").model
    assert stated is not None and stated.weight_format == "int8"


@pytest.mark.parametrize(
    "split",
    [
        {"model": "qwen3-235b-a22b", "tp_size": 8},
        {"model": "qwen3-235b-a22b", "tp_size": 4, "dp_size": 2},
        {"model": "qwen3-235b-a22b", "tp_size": 4, "dp_size": 2, "ep": True},
        {"model": "qwen3-235b-a22b", "tp_size": 8, "ep": True},
        {"model": "qwen3-235b-a22b", "tp_size": 4, "pp_size": 2},
        {"model": "deepseek-v3", "dp_size": 8, "ep": True, "kv_cache_dtype": "bf16"},
        {"model": "deepseek-v3", "dp_size": 8, "kv_cache_dtype": "bf16"},
        {"model": "gpt-oss-120b", "tp_size": 2, "ep": True, "engine": "sglang"},
        {"model": "deepseek-v3", "dp_size": 8, "ep": True, "kv_cache_dtype": "bf16", "engine": "sglang"},
        {"model": "qwen3.5-397b-a17b", "tp_size": 8, "engine": "sglang"},
        {"model": "70b", "tp_size": 4, "dp_size": 2, "engine": "sglang"},
        {"model": "70b", "tp_size": 4, "dp_size": 2, "engine": "tensorrt-llm"},
    ],
)
def test_itl_fits_exactly_what_size_fits(split: dict[str, Any]) -> None:
    asked = {**split, "gpu": "h200", "context_tokens": 16384}
    most = kvplan.size(compare=False, **asked).answers.max_batch_at_context
    assert most is not None and most > 0
    assert [kvplan.itl(**asked, batch_size=batch).fits for batch in (most, most + 1)] == [True, False]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm"])
def test_a_server_that_cannot_hold_its_longest_request_fits_nothing(engine: str) -> None:
    """70B on one B200 leaves KV for 100k tokens: a server told of 128k does not start, whatever the batch."""
    asked: dict[str, Any] = {"model": "70b", "gpu": "b200", "engine": engine, "kv_cache_dtype": "bf16"}
    asked |= {"context_tokens": 16384, "batch_size": 1}
    for longest, fits in ((32768, True), (131_072, False)):
        assert kvplan.itl(**asked, max_model_len_tokens=longest).fits is fits
        assert kvplan.size(**asked, max_model_len_tokens=longest).fits is fits


def test_a_request_longer_than_the_server_takes_is_refused_where_that_is_stated(kvplan_cli: Callable[..., Ran]) -> None:
    words = ["itl", "--model", "8b", "--gpu", "h200", "--max-model-len", "8k"]
    assert "8,192" in kvplan_cli(*words).out  # as far as lines go unless told
    assert kvplan_cli(*words, "--ctx", "4k").code == 0
    for more in (["--ctx", "16k"], ["--isl", "8k", "--osl", "1k", "--concurrency", "4"]):
        ran = kvplan_cli(*words, *more)
        assert ran.code == 2 and "are longer than --max-model-len 8,192" in ran.err
    case = {"model": "8b", "gpu": "h200", "max_model_len_tokens": "8k", "batch_size": 1}
    answers = kvplan.itl_cases([{**case, "context_tokens": 8192}, {**case, "context_tokens": 8193}])
    assert isinstance(answers[0], kvplan.ItlPlan) and isinstance(answers[1], InputError)


def test_a_request_longer_than_the_checkpoint_claims_is_said_to_be(kvplan_cli: Callable[..., Ran]) -> None:
    asked: dict[str, Any] = {"model": "70b", "gpu": "h100", "tp_size": 8}
    step, load = (
        kvplan.itl(**asked, context_tokens=131_073),
        kvplan.itl(**asked, input_tokens=131_072, output_tokens=1024, concurrency=1),
    )
    assert "131,073 tokens is beyond the 131,072 the checkpoint claims" in step.as_dict()["notes"][-1]
    assert "132,096 tokens is beyond" in load.notes[-1]
    assert kvplan.itl(**asked, context_tokens=131_072).notes == ()
    out = kvplan_cli("itl", "--model", "70b", "--gpu", "h100", "--tp", "8", "--ctx", "64k..256k").out
    assert "note: 262,144 tokens is beyond the 131,072" in " ".join(out.split())


def test_a_load_says_what_lengths_it_takes_unless_told(kvplan_cli: Callable[..., Ran]) -> None:
    words = ["itl", "--model", "8b", "--gpu", "h200", "--isl", "8k", "--osl", "1k", "--concurrency", "4"]
    assert "lengths average 0.95 of nominal" in " ".join(kvplan_cli(*words).out.split())
    assert "0.95" not in kvplan_cli(*words, "--length-spread", "0").out


def test_help_shows_the_defaults_that_are_no_single_value(kvplan_cli: Callable[..., Ran]) -> None:
    help_ = " ".join(kvplan_cli("itl", "--help", width=300).out.split())
    assert "Default: 1k..128k." in help_ and "Default: 0.95 of nominal on average." in help_
