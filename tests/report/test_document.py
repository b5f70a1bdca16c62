"""What a report says: the answer, the numbers behind it, and what it says when the answer is no or unknown."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT, DATE, ROOT
from support import model_folder

import kvplan
from kvplan import KvplanError, Report
from kvplan.document.words import answer_sentences

GIB = 2**30


def test_the_answer_comes_first_in_words_and_numbers(chat: Report) -> None:
    """92.49 GiB of KV a GPU over 1.25 GiB a user (32,768 tokens × 40,960 B) is 73 users and a remainder."""
    answers = chat.answers
    assert answers.fits
    assert answers.max_users == 73
    assert answers.headline == (
        "Yes: llama-3.1-70b serves 64 users at 32,768 tokens each on 4 × NVIDIA H200 SXM 141GB (TP 4) with fp8 KV, "
        "with room for 9 more."
    )
    assert answers.kv_needed_bytes == 64 * 32_768 * 40_960
    assert answers.kv_headroom_bytes == (answers.kv_cache_bytes or 0) - answers.kv_needed_bytes


def test_a_report_says_what_size_and_itl_say(chat: Report) -> None:
    request = {key: value for key, value in CHAT.items() if key not in ("concurrency", "date")}
    plan = kvplan.size(**request, batch_size=64)
    assert chat.answers.max_users == plan.answers.max_batch_at_context
    assert chat.answers.max_context_tokens == plan.answers.max_context_at_batch_tokens
    now, limit = chat.answers.now, chat.answers.limit
    assert now is not None and limit is not None
    for at, users in ((now, 64), (limit, 73)):
        itl = kvplan.itl(**request, batch_size=users)
        assert at.itl.value_s == pytest.approx(itl.itl_s, rel=1e-5)
        assert at.itl.low_s == pytest.approx(itl.interval_s[0], rel=1e-5)
        assert at.num_users == users


def test_load_is_predicted_with_the_lengths_that_were_given() -> None:
    report = kvplan.report(model="8b", gpu="h100", input_tokens="3k", output_tokens="1k", concurrency=16, date=DATE)
    assert report.deployment.context_tokens == 4096
    assert report.deployment.lengths_given
    plan = kvplan.itl(model="8b", gpu="h100", kv_cache_dtype="bf16", context_tokens=None, input_tokens=3072,
                      output_tokens=1024, concurrency=16)  # fmt: skip
    assert plan.load is not None and report.answers.now is not None
    assert report.answers.now.tpot.value_s == pytest.approx(plan.load.tpot_s, rel=1e-5)


def test_a_stated_longest_request_ends_the_contexts_and_leaves_the_speed_known() -> None:
    report = kvplan.report(model="8b", gpu="h200", context_tokens="4k", max_model_len_tokens="8k", date=DATE)
    assert report.answers.now is not None and report.answers.limit is not None
    assert report.what_if.contexts_tokens == [1024, 2048, 4096, 8192]


def test_bytes_alone_are_those_that_are_read() -> None:
    """Beyond its top 2,048 latents DeepSeek-V3.2 reads index keys only, as many bytes in every KV format."""
    asked = {"model": "deepseek-v3.2", "gpu": "b200", "tp_size": 8, "context_tokens": "32k", "date": DATE}
    report = kvplan.report(**asked, kv_cache_dtype="fp8")
    fp8 = next(precision for precision in report.precisions if precision.is_chosen)
    assert fp8.capacity_gain is not None and fp8.capacity_gain > 1.8
    assert fp8.slope_ratio == fp8.bytes_ratio == 1


def test_prompts_that_queue_are_said_in_words() -> None:
    """Memory holds them all, and yet the first token takes longer than the answer after it."""
    report = kvplan.report(model="qwen3-32b", gpu="h100", tp_size=4, engine="sglang", date=DATE,
                           input_tokens="4k", output_tokens=44, concurrency=128)  # fmt: skip
    now = report.answers.now
    assert report.answers.fits and now is not None
    answer_s = 44 * now.tpot.value_s
    for ttft_s, queue in ((0.99 * answer_s, False), (1.01 * answer_s, True)):
        later = now.model_copy(update={"ttft": now.ttft.model_copy(update={"value_s": ttft_s})})
        sentences = answer_sentences(report.deployment, report.answers.model_copy(update={"now": later}), 0)
        said = [line for line in sentences if "waits longer for the first token" in line]
        assert len(said) == queue
        assert all("4,096 tokens" in line for line in said)


def test_fp8_is_worth_its_capacity_after_scales_and_its_slope_after_the_kernel(chat: Report) -> None:
    rows = {row.kv_cache_dtype: row for row in chat.precisions}
    assert list(rows) == ["bfloat16", "fp8", "fp8_per_token_head"]
    assert rows["fp8"].is_chosen and rows["fp8"].capacity_gain == 2.0
    per_token_head = rows["fp8_per_token_head"]
    assert per_token_head.capacity_gain == pytest.approx(512 / 264, rel=1e-5)  # 256 values and 8 bytes of scales
    for row in (rows["fp8"], per_token_head):
        assert row.slope_ratio is not None and row.bytes_ratio is not None
        assert row.slope_ratio > row.bytes_ratio, "no kernel is faster than its bytes"
    assert any("its bytes alone would make that 0.50×: the kernel loses the rest" in s for s in chat.fp8_sentences)


def test_a_measured_run_adds_its_points_and_the_slope_of_our_kernels(run_folder: Path) -> None:
    report = kvplan.report(model="8b", gpu="h200", context_tokens="32k", concurrency=32, measured=str(run_folder),
                           date=DATE)  # fmt: skip
    measured = report.measured
    assert measured is not None
    steps = [point for point in measured.points if point.kind == "whole_step"]
    kernels = [point for point in measured.points if point.kind == "kernel"]
    assert {(p.num_users, p.kv_cache_dtype) for p in steps} == {(32, "bfloat16"), (32, "fp8")}
    assert {p.num_users for p in kernels} == {8, 32}
    first = next(p for p in steps if p.context_tokens == 2048 and p.kv_cache_dtype == "bfloat16")
    assert first.itl_s == pytest.approx(0.00809987, rel=1e-4)  # the record itself
    assert 1 + first.error == pytest.approx(first.predicted_s / first.itl_s, rel=1e-5)
    fp8 = next(row for row in report.precisions if row.kv_cache_dtype == "fp8")
    assert fp8.measured_slope_ratio == pytest.approx(0.51, abs=0.01)
    assert {32, 8} <= set(report.what_if.users), "the page can show the measured points"


def test_kernel_samples_of_other_heads_are_left_out_and_counted(run_folder: Path) -> None:
    report = kvplan.report(**CHAT, measured=str(run_folder))  # TP 4: 16 query heads a rank, none was measured
    assert report.measured is not None
    assert report.measured.points == []
    assert any("kernel samples left out: of other heads" in note for note in report.measured.notes)
    assert all(row.measured_slope_ratio is None for row in report.precisions), "other heads say nothing of these"


def test_latent_samples_stand_beside_the_predictions_of_a_latent_model(run_folder: Path, tmp_path: Path) -> None:
    """16 query heads on a latent: DeepSeek V3 at TP 8; at TP 16 there are 8, of which none was measured."""
    folder = tmp_path / "latent"
    folder.mkdir()
    shutil.copy(run_folder / "environment.json", folder)
    shutil.copy(ROOT / "profiles" / "measurements" / "h200-latent-2026-11-24.jsonl", folder / "samples.jsonl")
    question: dict[str, Any] = {"model": "deepseek-v3", "gpu": "h200", "context_tokens": "16k", "concurrency": 32,
                                "measured": str(folder), "date": DATE}  # fmt: skip
    measured = kvplan.report(**question, tp_size=8).measured
    assert measured is not None
    assert {(p.num_users, p.kind) for p in measured.points} == {(b, "kernel") for b in (1, 8, 32)}
    assert any("23 kernel samples left out: of other heads" in note for note in measured.notes)
    other = kvplan.report(**question, tp_size=16).measured
    assert other is not None
    assert other.points == []


def test_torn_lines_of_a_run_are_counted_and_its_folder_is_left_as_it_is(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(run_folder, folder)
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"batch_size": 32, "conte\nnonsense\n')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = kvplan.report(model="8b", gpu="h200", context_tokens="8k", measured=str(folder), date=DATE)
    assert report.measured is not None
    assert "2 lines of samples.jsonl hold no sample and are left out" in report.measured.notes
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_of_another_gpu_is_refused(run_folder: Path) -> None:
    with pytest.raises(KvplanError, match="was measured on h200, not on h100-sxm") as error:
        kvplan.report(model="8b", gpu="h100", measured=str(run_folder))
    assert error.value.exit_code == 2


def test_a_given_calibration_is_used_and_its_hash_is_in_the_report() -> None:
    path = ROOT / "profiles" / "calibrations" / "attention-h100-sxm-tensorrt-llm.json"
    question: dict[str, Any] = {"model": "70b", "gpu": "h100", "tp_size": 4, "context_tokens": "8k", "date": DATE}
    plain, given = kvplan.report(**question), kvplan.report(**question, calibration=str(path))
    slopes = [next(p.slope_ratio for p in r.precisions if p.kv_cache_dtype == "fp8") for r in (plain, given)]
    assert slopes[1] != slopes[0]
    hashes = {print_.name: print_.sha256 for print_ in given.fingerprints}
    assert hashes[str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_profile_that_was_used_is_named_with_its_hash(chat: Report) -> None:
    kinds = {(mark.kind, mark.name): mark.sha256 for mark in chat.fingerprints}
    path = ROOT / "profiles" / "models" / "llama-3.1-70b.json"
    assert kinds["model profile", "llama-3.1-70b"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert ("GPU profile", "h200") in kinds and ("calibration", "attention-h200-vllm") in kinds


def test_a_model_from_a_folder_is_named_by_its_config(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
              "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072}  # fmt: skip
    folder = model_folder(tmp_path / "mine", config)
    report = kvplan.report(model=folder, gpu="h100", context_tokens="8k", date=DATE)
    (mark,) = [mark for mark in report.fingerprints if mark.kind == "model config"]
    assert mark.sha256 == hashlib.sha256((tmp_path / "mine" / "config.json").read_bytes()).hexdigest()
    assert report.launch[0].command is not None and folder in report.launch[0].command


# ------------------------------------------------------------------------------------------------- memory and waste


@pytest.mark.parametrize(
    "question",
    [CHAT, {"model": "405b", "gpu": "l4", "context_tokens": "4k"},
     {"model": "gpt-oss-120b", "gpu": "mi300x", "engine": "sglang", "context_tokens": "8k", "concurrency": 16},
     {"model": "70b", "gpu": "h200", "tp_size": 4, "engine": "trtllm", "context_tokens": "8k", "concurrency": 4},
     {"model": "qwen3.5-27b", "gpu": "h100", "context_tokens": "64k", "concurrency": 3},
     {"model": "70b", "gpu": "h100", "tp_size": 8, "kv_cache_memory_bytes": "20GiB", "context_tokens": "8k"},
     {"model": "deepseek-v3", "gpu": "h200", "tp_size": 8, "context_tokens": "32k", "concurrency": 9}],
    ids=lambda question: f"{question['model']}-{question['gpu']}",
)  # fmt: skip
def test_the_segments_add_up_to_the_memory_of_the_gpu(question: dict[str, Any]) -> None:
    report = kvplan.report(**{**question, "date": DATE})
    plan = kvplan.size(compare=False, model=question["model"], gpu=question["gpu"], context_tokens="4k",
                       tp_size=question.get("tp_size", 1))  # fmt: skip
    assert sum(segment.bytes for segment in report.memory) == plan.memory.total_bytes
    assert all(segment.bytes > 0 for segment in report.memory if segment.kind != "short")


def test_nothing_of_an_approximated_engine_is_called_exact() -> None:
    report = kvplan.report(model="8b", gpu="h100", engine="sglang", context_tokens="8k", concurrency=4, date=DATE)
    assert report.deployment.rules == "approximation"
    assert {s.source for s in report.memory if s.kind in ("kv", "headroom")} == {"assumed"}
    assert {f.source for f in report.audit if f.section == "KV cache" or "capacity" in f.name} == {"assumed"}


def test_replicated_heads_are_waste_and_dcp_wins_them_back() -> None:
    """TP 16 on 8 KV heads stores every head twice; with DCP 2 the same memory holds twice the users."""
    report = kvplan.report(model="70b", gpu="h200", tp_size=16, context_tokens="32k", concurrency=64, date=DATE)
    (line,) = [line for line in report.waste if line.name == "replicated"]
    assert line.bytes == 64 * 32_768 * 40_960 // 2  # half of 80 layers × 1 head × 512 B a token
    assert line.fix == "decode context parallel 2 (--dcp 2)"
    assert line.wins_capacity == pytest.approx(1.0, abs=0.01)
    twice = kvplan.size(model="70b", gpu="h200", tp_size=16, dcp_size=2, context_tokens="32k")
    assert line.wins_users == (twice.answers.max_batch_at_context or 0) - report.answers.max_users


def test_memory_outside_the_fraction_is_waste_and_a_higher_fraction_wins_users(chat: Report) -> None:
    (line,) = [line for line in chat.waste if line.name == "reserve"]
    assert line.fix == "--gpu-memory-utilization 0.95"
    more = kvplan.size(model="70b", gpu="h200", tp_size=4, context_tokens="32k", kv_cache_dtype="fp8",
                       gpu_memory_utilization=0.95)  # fmt: skip
    assert line.wins_users == (more.answers.max_batch_at_context or 0) - 73


def test_what_sglang_sets_aside_for_activations_is_not_users_to_win_beyond_its_default() -> None:
    def reserve(**asked: float) -> Any:
        report = kvplan.report(model="8b", gpu="h100", engine="sglang", context_tokens=8192, date=DATE, **asked)
        return next(line for line in report.waste if line.name == "reserve")

    assert reserve().fix is None and "activations and graphs" in reserve().note
    assert reserve(gpu_memory_utilization=0.7).fix == "--mem-fraction-static 0.83"
    assert reserve(gpu_memory_utilization=0.9).fix is None


def test_windows_reserve_tokens_in_flight_and_fewer_batched_tokens_win_them_back() -> None:
    report = kvplan.report(model="gemma-3-27b", gpu="h100", tp_size=2, context_tokens="32k", concurrency=16,
                           kv_cache_dtype="fp8", date=DATE)  # fmt: skip
    line = report.waste[0]
    assert (line.name, line.fix) == ("rounding", "--max-num-batched-tokens 2048")
    assert line.wins_users is not None and line.wins_users > 0


# ----------------------------------------------------------------------------------------------------- no is an answer


def test_no_because_users_are_too_many() -> None:
    report = kvplan.report(model="70b", gpu="h200", tp_size=4, context_tokens="32k", concurrency=64, date=DATE)
    assert not report.answers.fits
    assert report.answers.headline.startswith("No: 64 users at 32,768 tokens each do not fit")
    assert report.answers.headline.endswith("36 would.")
    assert report.answers.now is None and report.answers.limit is not None
    assert report.answers.limit.num_users == 36
    assert (report.answers.kv_headroom_bytes or 0) < 0
    assert any("--kv-cache-dtype fp8" in item.message for item in report.advice)
    assert any("does not fit" in note for note in report.launch[0].notes)


def test_no_because_the_weights_alone_are_larger_than_the_gpu() -> None:
    report = kvplan.report(model="405b", gpu="l4", context_tokens="4k", date=DATE)
    assert report.answers.headline.startswith("No: the weights of llama-3.1-405b leave no memory for KV")
    assert report.answers.limit is None and report.waste == []
    (short,) = [segment for segment in report.memory if segment.kind == "short"]
    assert short.bytes < -700 * GIB
    assert "<html" in report.as_html() and "No: the weights" in report.as_markdown()


def test_no_because_the_kv_memory_given_is_not_there() -> None:
    report = kvplan.report(model="8b", gpu="h100", ctx="8k", concurrency=500, kv_cache_memory_bytes="1000GiB")
    a = report.answers
    assert not a.fits and a.max_users == 0 and a.now is None and a.limit is None and not a.sentences
    assert a.headline.startswith("No: 1,000.00 GiB of KV are 937.90 GiB more than each GPU has left beside")
    assert a.kv_headroom_bytes == next(s.bytes for s in report.memory if s.kind == "short")
    assert all(held == 0 for surface in report.what_if.surfaces for held in surface.max_users)
    assert not [waste for waste in report.waste if waste.name == "unused"]


def test_no_because_the_scheduler_runs_fewer_at_once() -> None:
    report = kvplan.report(model="8b", gpu="h200", ctx="1k", concurrency=64, max_num_seqs=16, date=DATE)
    a = report.answers
    assert not a.fits and a.max_users == 16 and a.now is None and a.limit is not None and a.limit.num_users == 16
    assert a.headline.endswith("its --max-num-seqs runs 16, and the rest wait; memory holds 892.")
    assert "holds 892 users at 1,024 tokens, of which --max-num-seqs lets 16 run at once" in a.sentences[0]
    assert max(held for surface in report.what_if.surfaces for held in surface.max_users) == 16
    room = kvplan.report(model="8b", gpu="h200", ctx="1k", concurrency=10, max_num_seqs=16, date=DATE).answers
    assert room.headline.endswith(", with room for 6 more; its --max-num-seqs runs no more at once, memory holds 892.")


def test_users_beyond_the_engines_default_are_launched_with_a_limit_of_their_own() -> None:
    report = kvplan.report(model="70b", gpu="h200", tp=4, ctx="1k", concurrency=1500, kv_cache_dtype="fp8", date=DATE)
    assert report.answers.fits and report.answers.now is not None
    assert " --max-num-seqs 1500 " in (report.launch[0].command or "")
    assert "this plan takes --max-num-seqs 1500" in report.advice[0].message
    assert report.answers.headline.endswith(" more; vllm runs 1,024 at once unless told.")
    stated = kvplan.itl(model="70b", gpu="h200", tp_size=4, kv_cache_dtype="fp8", input_tokens=896, output_tokens=128,
                        concurrency=1500, max_num_seqs=1500)  # fmt: skip
    assert stated.load is not None and report.answers.now.tpot.value_s == pytest.approx(stated.load.tpot_s, rel=1e-5)


def test_more_users_than_tokens_of_a_step_are_launched_with_as_many_tokens() -> None:
    """vLLM refuses ``max_num_seqs`` beyond ``max_num_batched_tokens``, which an A100 has 2,048 of unless told."""
    asked: dict[str, Any] = {
        "model": "8b",
        "gpu": "a100",
        "context_tokens": 256,
        "kv_cache_dtype": "int8_per_token_head",
    }
    line = launched("vllm", **asked, concurrency=3000)
    assert " --max-num-seqs 3000 --max-num-batched-tokens 3000 " in line
    assert "batched" not in launched("vllm", **asked, concurrency=2000)
    plan = kvplan.size(**asked, batch_size=3000)
    assert plan.fits and plan.request.max_num_batched_tokens == 3000
    assert kvplan.size(**asked, max_num_batched_tokens=128).request.max_num_seqs == 128


@pytest.mark.parametrize(("engine", "runs"), [("vllm", 1024), ("sglang", 4096), ("tensorrt-llm", None)])
def test_a_headline_says_what_the_engine_runs_of_the_users_that_memory_holds(engine: str, runs: int | None) -> None:
    """SGLang's 512 × tokens / longest request are at most 4,096."""
    asked: dict[str, Any] = {"model": "8b", "gpu": "b200", "context_tokens": 128, "engine": engine}
    report = kvplan.report(**asked, date=DATE)
    held = kvplan.size(**asked).answers.max_batch_at_context or 0
    assert held > 4096 and f" serves up to {held:,} users " in report.answers.headline
    said = f"KV; {engine} runs {runs:,} at once unless told." if runs else "with bfloat16 KV."
    assert report.answers.headline.endswith(said)


def test_speed_is_unknown_where_the_bandwidth_is() -> None:
    report = kvplan.report(model="70b", gpu_memory="80GiB", tp=4, ctx="8k", concurrency=8, date=DATE)
    assert report.answers.fits and report.answers.now is None
    assert report.answers.basis.problem is not None and "bandwidth" in report.answers.basis.problem
    assert all(surface.itl_s is None for surface in report.what_if.surfaces)
    assert all(surface.max_users[0] > 0 for surface in report.what_if.surfaces)
    assert "Nothing is predicted" in report.as_html()


def test_a_precision_that_the_gpu_refuses_is_listed_with_the_reason() -> None:
    report = kvplan.report(model="70b", gpu="a100-80gb-sxm", tp_size=4, context_tokens="8k", compare="nvfp4", date=DATE)
    (row,) = [row for row in report.precisions if row.kv_cache_dtype == "nvfp4"]
    assert row.forbidden is not None and "Blackwell" in row.forbidden
    assert report.fp8_sentences == [f"No smaller KV format can be used here (nvfp4: {row.forbidden})."]


def test_no_because_the_engine_refuses_the_precision_and_what_there_is_instead() -> None:
    report = kvplan.report(model="70b", gpu="h100", tp_size=4, context_tokens="8k", concurrency=8,
                           kv_cache_dtype="nvfp4", date=DATE)  # fmt: skip
    assert not report.answers.fits
    assert report.answers.headline.startswith("No: vLLM refuses --kv-cache-dtype nvfp4: NVFP4 KV needs a datacentre")
    assert "With bfloat16 KV in place of nvfp4" in report.answers.sentences[0]
    assert report.deployment.kv_cache_dtype == "bfloat16"
    assert [row.kv_cache_dtype for row in report.precisions if row.forbidden] == ["nvfp4"]
    assert report.answers.now is not None, "bfloat16 fits, so its times are known"


def test_what_no_precision_can_mend_is_an_error() -> None:
    with pytest.raises(KvplanError, match="does not divide by --tp 8"):
        kvplan.report(model="qwen2.5-7b", gpu="h100", tp_size=8, kv_cache_dtype="fp8", context_tokens="8k")


def test_times_that_nothing_was_measured_for_say_so() -> None:
    report = kvplan.report(model="gpt-oss-120b", gpu="mi300x", engine="sglang", context_tokens="8k", date=DATE)
    assert report.answers.basis.source == "assumed"
    assert any("assumed, not calibrated" in sentence for sentence in report.answers.sentences)


# ------------------------------------------------------------------------------------------------------------- what if


def test_why_a_hybrid_gains_less_than_claimed_is_not_its_scales() -> None:
    report = kvplan.report(model="qwen3.5-27b", gpu="h100", tp_size=2, context_tokens="14k", concurrency=24)
    assert (
        "not the claimed 2× (its scales take nothing; what is not keys and values keeps its size)"
        in (report.fp8_sentences[0])
    )
    assert "-0%" not in report.as_html() and "| 0% |" in report.as_markdown()


def test_a_report_on_other_kv_than_itl_takes_says_so() -> None:
    """An unstated KV dtype is the engine's own here, and what public deployments run in `kvplan itl`."""
    asked: dict[str, Any] = {"model": "deepseek-v3", "gpu": "b200", "tp_size": 8, "context_tokens": 8192}
    report = kvplan.report(**asked, date=DATE)
    assert report.deployment.kv_cache_dtype == "bfloat16"
    assert kvplan.itl(**asked).facts.request["kv_cache_dtype"] == "fp8"
    assert [note for note in report.notes if "`kvplan itl` takes fp8" in note]
    assert "\n- Note: times are of bfloat16 KV" in report.as_markdown()
    assert not kvplan.report(**asked, kv_cache_dtype="bf16", date=DATE).notes


def test_the_grid_says_what_single_plans_say(chat: Report) -> None:
    grid = chat.what_if
    for surface in grid.surfaces:
        for users, context in ((8, 16_384), (64, 4096)):
            row, column = grid.users.index(users), grid.contexts_tokens.index(context)
            plan = kvplan.itl(model="70b", gpu="h200", tp_size=4, context_tokens=context, batch_size=users,
                              kv_cache_dtype=surface.kv_cache_dtype)  # fmt: skip
            assert surface.itl_s is not None
            assert surface.itl_s[row][column] == pytest.approx(plan.itl_s, rel=1e-5)
            sized = kvplan.size(model="70b", gpu="h200", tp_size=4, context_tokens=context,
                                kv_cache_dtype=surface.kv_cache_dtype)  # fmt: skip
            assert surface.max_users[column] == sized.answers.max_batch_at_context
            assert surface.bytes_per_request[column] == sized.kv_cache.bytes_per_request


def test_more_users_and_longer_contexts_are_never_faster(chat: Report) -> None:
    for surface in chat.what_if.surfaces:
        assert surface.itl_s is not None
        assert all(a <= b for row in surface.itl_s for a, b in itertools.pairwise(row))
        assert all(a <= b for column in zip(*surface.itl_s, strict=True)
                   for a, b in itertools.pairwise(column))  # fmt: skip
        assert surface.max_users == sorted(surface.max_users, reverse=True)


# ------------------------------------------------------------------------------------------------------------- launch


def test_launch_commands_carry_the_plan(chat: Report) -> None:
    vllm, sglang, trtllm = chat.launch
    assert vllm.command == (
        "vllm serve meta-llama/Llama-3.1-70B-Instruct --tensor-parallel-size 4 --max-model-len 32768 "
        "--kv-cache-dtype fp8 --gpu-memory-utilization 0.92"
    )
    assert sglang.command is not None and trtllm.command is not None
    assert "--tp-size 4 --context-length 32768 --max-running-requests 64 --kv-cache-dtype fp8_e4m3" in sglang.command
    assert "--tp_size 4 --max_seq_len 32768 --max_batch_size 64" in trtllm.command
    assert any("kv_cache_config: {dtype: fp8}" in note for note in trtllm.notes)


def test_launch_commands_quote_what_a_shell_would_read_and_say_what_the_plan_takes_for_granted(tmp_path: Path) -> None:
    config = json.loads((ROOT / "profiles" / "models" / "llama-3.1-8b.json").read_text())["config"]
    folder = model_folder(tmp_path / "my model; rm -rf $HOME", config)
    report = kvplan.report(model=folder, gpu="h100", context_tokens="8k", weight_dtype="fp8", date=DATE)
    for item in report.launch:
        assert item.command is not None
        assert shlex.split(item.command).count(folder) == 1
        assert "the plan takes weights stored as fp8: serve such a checkpoint" in item.notes


def launched(by: str, /, **question: Any) -> str:
    """The line of one engine, ``engine`` being the planned one."""
    launch = kvplan.report(**{"context_tokens": "8k", "date": DATE, **question}).launch
    return next(item.command for item in launch if item.engine == by) or ""


def test_a_line_of_another_engine_has_the_fraction_of_its_own_chunk() -> None:
    """SGLang sets aside 1.5 MiB a token of a chunked prefill: 36 GiB more for 32,768 than for the 8,192 of its own."""
    asked: dict[str, Any] = {"model": "8b", "gpu": "h200", "max_num_batched_tokens": 32_768}
    fraction = kvplan.size(**asked, engine="sglang", context_tokens="8k").request.gpu_memory_utilization or 0
    assert fraction == pytest.approx(0.903 - 36 / 140, abs=0.02)
    assert launched("sglang", **asked).endswith(f"--chunked-prefill-size 32768 --mem-fraction-static {fraction:g}")
    assert launched("sglang", model="8b", gpu="h200").endswith("--mem-fraction-static 0.903")
    assert launched("sglang", model="8b", gpu="h100", max_num_batched_tokens=65_536) == ""  # 96 GiB of 80


def test_ranks_that_share_experts_are_one_server_of_every_engine() -> None:
    """vLLM deals experts over data-parallel ranks unasked; SGLang shares its limit of requests among such ranks."""
    asked: dict[str, Any] = {"model": "deepseek-v3", "gpu": "h200", "dp_size": 8, "concurrency": 64}
    shared = launched("sglang", **asked)
    assert " --tp-size 8 --attn-dp-size 8 --context-length" in shared
    assert " --max-running-requests 64 " in shared and "--ep-size" not in shared
    own = kvplan.size(model="deepseek-v3", gpu="h200", dp_size=8, ep=True, engine="sglang", context_tokens="8k")
    assert f"--mem-fraction-static {own.request.gpu_memory_utilization:g}" in shared
    assert " --tp_size 8 --max_seq_len" in launched("tensorrt-llm", **asked)
    assert "--ep-size 8 " in launched("sglang", **asked, ep=True)
    assert " --max-running-requests 2048 " in launched("sglang", **asked, ep=True, max_num_seqs=256)
    older = launched("sglang", **asked, ep=True, engine="sglang", engine_version="0.5.21")
    assert " --tp-size 8 --dp-size 8 --enable-dp-attention --ep-size 8 " in older


def test_ranks_of_sglangs_attention_are_launched_with_the_chunk_of_all_of_them() -> None:
    """It divides the option by its ranks: 1,024 tokens a step of each of eight are its default of 8,192."""
    asked: dict[str, Any] = {"model": "deepseek-v3", "gpu": "h200", "dp_size": 8, "ep": True, "engine": "sglang"}
    stated = launched("sglang", **asked, max_num_batched_tokens=1024)
    assert " --chunked-prefill-size 8192 " in stated
    assert stated.replace(" --chunked-prefill-size 8192", "") == launched("sglang", **asked)


def test_a_chunk_of_sglang_is_whole_pages_on_every_rank() -> None:
    """``validation_hook.py`` asserts it; sparse latents have pages of 64, and 8,192 // 3 = 2,730 is no multiple."""
    asked: dict[str, Any] = {"model": "deepseek-v3.2", "gpu": "h200", "tp_size": 8, "ep": True, "engine": "sglang"}
    assert f" --chunked-prefill-size {3 * (2730 // 64 * 64)} " in launched("sglang", **asked, dp_size=3)
    assert " --chunked-prefill-size 960 " in launched("sglang", **asked, max_num_batched_tokens=1000)
    assert "chunked" not in launched("sglang", **asked, dp_size=4)


@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm"])
def test_a_model_without_experts_is_launched_without_expert_parallelism(engine: str) -> None:
    """It changes nothing in the plan, which says so; vLLM's command line refuses it."""
    asked: dict[str, Any] = {"model": "8b", "gpu": "h200", "engine": engine, "tp_size": 2, "dp_size": 2}
    for name in ("vllm", "sglang", "tensorrt-llm"):
        assert launched(name, **asked, ep=True) == launched(name, **asked)
    plan = kvplan.size(**asked, ep=True, context_tokens="8k")
    assert not plan.request.ep and "--ep changes nothing" in str(plan.advice)


@pytest.mark.parametrize(
    ("engine", "named"),
    [("vllm", "--kv-cache-dtype auto"), ("sglang", "--kv-cache-dtype bfloat16"), ("tensorrt-llm", "trtllm-serve")],
)
def test_a_line_names_16_bits_where_auto_is_something_else(engine: str, named: str) -> None:
    """SGLang makes FP8 of sparse latents on Blackwell; a ModelOpt checkpoint may ask for it everywhere."""
    asked: dict[str, Any] = {"model": "deepseek-v3.2", "tp_size": 8, "kv_cache_dtype": "bf16", "engine": engine}
    assert named in launched(engine, **asked, gpu="b200")
    assert "bfloat16" not in launched(engine, **asked, gpu="h200")
    declared = launched(engine, **{**asked, "model": "qwen3-235b-a22b-nvfp4"}, gpu="b200")
    assert "--kv-cache-dtype bfloat16" in declared or (engine == "tensorrt-llm" and declared == "")


def test_experts_that_ranks_do_not_divide_are_filled_up_where_the_engine_needs_as_many_on_each() -> None:
    """256 over 12 ranks: vLLM deals 21 or 22, the others need 8 copies for 22 on each."""
    asked: dict[str, Any] = {"model": "deepseek-v3", "gpu": "h200", "tp_size": 4, "dp_size": 3, "ep": True}
    report = kvplan.report(**asked, context_tokens="8k", date=DATE)
    lines = {item.engine: item for item in report.launch}
    assert "redundant" not in str(lines["vllm"])
    assert " --ep-size 12 --ep-num-redundant-experts 8 " in (lines["sglang"].command or "")
    assert any("num_slots: 264" in note for note in lines["tensorrt-llm"].notes)
    assert "redundant" not in launched("sglang", **{**asked, "dp_size": 2})


def test_contexts_are_split_by_sglang_since_0_5_16() -> None:
    asked: dict[str, Any] = {"model": "deepseek-v3", "gpu": "h200", "tp_size": 8, "dcp_size": 8, "engine": "sglang"}
    assert " --tp-size 8 --dcp-size 8 " in launched("sglang", **asked)
    assert launched("sglang", **asked, engine_version="0.5.14") == ""


def test_an_engine_that_refuses_the_split_has_no_command_but_a_reason() -> None:
    """1,536 columns over 8 ranks are 192, one and a half blocks of FP8 scales: vLLM 0.33 refines them, SGLang stops."""
    report = kvplan.report(model="qwen3-235b-a22b-fp8", gpu="h200", tp_size=8, context_tokens="8k", date=DATE)
    lines = {item.engine: item for item in report.launch}
    assert lines["vllm"].command is not None and lines["sglang"].command is None
    assert "whole blocks of 128" in lines["sglang"].notes[0]
    assert " --ep-size 8 " in launched("sglang", model="qwen3-235b-a22b-fp8", gpu="h200", tp_size=8, ep=True)


@pytest.mark.parametrize(
    ("engine", "version", "starts"), [("vllm", "0.28", False), ("vllm", "0.29", True), ("vllm", None, True),
                                      ("sglang", None, False)],
)  # fmt: skip
def test_vllm_splits_a_block_of_expert_scales_since_0_29(engine: str, version: str | None, starts: bool) -> None:
    """MiniMax M2.5, 1,536 / 8: vLLM 0.25 stopped, "192 is not divisible by weight quantization block_n = 128"."""
    asked: dict[str, Any] = {"model": "minimax-m2.5", "gpu": "h200", "tp_size": 8, "context_tokens": 8192}
    asked |= {"engine": engine, "engine_version": version}
    if starts:
        assert kvplan.size(**asked).fits is True
    else:
        with pytest.raises(KvplanError, match=r"whole blocks of 128, and the 1,536 rows .* are 192 on each of 8 ranks"):
            kvplan.size(**asked)
    assert kvplan.size(**asked, ep=True).fits is True


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_groups_of_four_bit_weights_are_split_whole(engine: str) -> None:
    """29,568 / 8 = 3,696 columns are 28.9 groups of 128: "not aligned with the quantized weight shape" (vllm#13980)."""
    asked: dict[str, Any] = {"model": "qwen2.5-72b", "gpu": "h100", "context_tokens": 8192, "engine": engine}
    with pytest.raises(KvplanError, match=r"groups of 128, and the 29,568 columns of mlp\.down_proj are 3,696"):
        kvplan.size(**asked, tp_size=8, weight_dtype="awq")
    assert kvplan.size(**asked, tp_size=2, weight_dtype="fp8").fits is True
    assert kvplan.size(**asked, tp_size=1, weight_dtype="awq").fits is True
    # experts are refined to groups of 32 at least: 768 / 8 = 96 has such a divisor
    moe = {"model": "qwen3-30b-a3b", "gpu": "h100", "context_tokens": 8192, "engine": engine, "weight_dtype": "awq"}
    assert kvplan.size(**moe, tp_size=8).fits is True


def test_deepseek_v4_runs_on_tensorrt_llm_on_data_centre_blackwell_only() -> None:
    """examples/models/core/deepseek_v4/README.md: SM100, blocks of 128 tokens; 1.3.0rc24 stops on an RTX PRO 6000."""
    asked: dict[str, Any] = {"model": "deepseek-v4-flash", "tp_size": 8, "ep": True}
    command = launched("tensorrt-llm", **asked, gpu="b200")
    assert "trtllm-serve deepseek-ai/DeepSeek-V4-Flash --tp_size 8 --ep_size 8 " in command
    assert " --custom_tokenizer deepseek_v4 --config kvplan-trtllm.yaml" in command
    report = kvplan.report(**asked, gpu="b200", engine="tensorrt-llm", context_tokens="8k", date=DATE)
    assert report.launch[0].notes[0].endswith("{kv_cache_config: {dtype: fp8, tokens_per_block: 128}}")
    assert "1.3.0rc24" in report.launch[0].notes[1]
    assert kvplan.size(**asked, gpu="b200", engine="trtllm", context_tokens=8192).kv_cache.block_size_tokens == 128
    for gpu in ("h200", "rtx-pro-6000-server", "mi355x"):
        assert launched("tensorrt-llm", **asked, gpu=gpu) == ""
        with pytest.raises(KvplanError, match="TensorRT-LLM: it runs"):
            kvplan.size(**asked, gpu=gpu, engine="trtllm", context_tokens=8192)
    assert kvplan.size(**asked, gpu_memory_bytes=180 * 2**30, engine="trtllm", context_tokens=8192).fits is True
    with pytest.raises(KvplanError, match=r"1\.2\.1 has no DeepSeek-V4"):
        kvplan.size(**asked, gpu="b200", engine="trtllm", engine_version="1.2.1", context_tokens=8192)


def test_replicas_are_started_with_a_limit_each() -> None:
    asked: dict[str, Any] = {"model": "8b", "gpu": "h200", "dp_size": 8, "concurrency": 64}
    assert " --dp-size 8 --context-length 8192 --max-running-requests 8 " in launched("sglang", **asked)
    assert launched("tensorrt-llm", **asked) == ""


def test_an_engine_without_the_format_has_no_command_but_a_reason() -> None:
    report = kvplan.report(**{**CHAT, "kv_cache_dtype": "fp8_per_token_head"})
    commands = {item.engine: item for item in report.launch}
    assert commands["sglang"].command is None
    assert "no KV format fp8_per_token_head" in commands["sglang"].notes[0]


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("question", "says"),
    [({"gpu": "h200"}, "no model given"), ({"model": "70b"}, "no GPU named"),
     ({"model": "70b", "gpu": "h200", "nonsense": 1}, "unknown report field 'nonsense'"),
     ({"model": "70b", "gpu": "h200", "tp": 4, "tp_size": 4}, "tp and tp_size mean the same"),
     ({"model": "70b", "gpu": "h200", "isl": "32k", "osl": "1k", "ctx": "8k"}, "longer than the context"),
     ({"model": "8b", "gpu": "h200", "isl": "8k", "concurrency": 32}, "a load needs output_tokens too"),
     ({"model": "8b", "gpu": "h200", "output_tokens": "1k"}, "a load needs input_tokens too"),
     ({"model": "70b", "gpu": "h200", "compare": "fp7"}, "unknown KV-cache dtype 'fp7'"),
     ({"model": "70b", "gpu": "h200", "compare": "auto"}, "auto is none"),
     ({"model": "70b", "gpu": "h200", "compare": ""}, "compare names 0"),
     ({"model": "70b", "gpu": "h200", "date": "24.11.2026"}, "is not a date"),
     ({"model": "70b", "gpu": "h200", "date": "2026-02-30"}, "is not a date"),
     ({"model": "70b", "gpu": "h200", "name": ""}, "name must be text"),
     ({"model": "70b", "gpu": "h200", "measured": "/nowhere"}, "is no run of kvplan measure"),
     ({"model": "70b", "gpu": "h200", "calibration": "/nowhere.json"}, "cannot be read"),
     ({"num_layers": 4, "gpu": "h200"}, "a report needs a model"),
     ({"model": "70b", "gpu": "h200", "concurrency": 0}, "batch_size must be between 1"),
     ({"model": "70b", "gpu": "h200", "concurrency": "many"}, "batch_size must be")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line_that_names_it(question: dict[str, Any], says: str) -> None:
    with pytest.raises(KvplanError, match=says) as error:
        kvplan.report(**question)
    assert "\n" not in error.value.message
    assert error.value.exit_code == 2


def test_the_document_is_plain_data_with_units_in_its_keys(chat: Report) -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for child in value.values() for key in keys(child)}
        return {key for item in value for key in keys(item)} if isinstance(value, list) else set()

    found = keys(json.loads(chat.as_json()))
    assert not [key for key in found if key.endswith(("_ms", "_gib", "_gb", "_mb", "_us", "_kib"))]
    assert {"itl_s", "kv_cache_bytes", "contexts_tokens", "slope_s_per_token"} <= found


def test_memory_dealt_to_pools_adds_up_and_a_better_split_is_a_remedy() -> None:
    asked: dict[str, Any] = {"model": "qwen3.5-27b", "gpu": "h200", "engine": "sglang", "context_tokens": "32k"}
    report = kvplan.report(**asked, concurrency=16, date=DATE)
    (pools,) = [segment for segment in report.memory if segment.name == "pools"]
    (reserve,) = [segment for segment in report.memory if segment.kind == "reserve"]
    memory = kvplan.size(**asked).memory
    assert pools.bytes > 0 and memory.total_bytes is not None and memory.usable_bytes is not None
    outside = (memory.activation_bytes or 0) + (memory.graph_bytes or 0) + (memory.overhead_bytes or 0)
    assert reserve.bytes == memory.total_bytes - memory.usable_bytes - outside
    (waste,) = [line for line in report.waste if line.name == "pool_split"]
    # 5 × 153,944,064 B of states beside 32,768 × 65,536 B of tokens; 17 users become 23
    assert waste.fix == "--mamba-full-memory-ratio 0.36" and waste.wins_users == 6
    assert waste.bytes == pools.bytes
