"""``size --from-log`` starts from the server's own memory and changes only what it is told to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Ran

import kvplan
from kvplan.errors import InputError
from kvplan.memory.plan import SizePlan
from kvplan.units import GIB

LOGS = Path(__file__).parent / "logs"
LLAMA = LOGS / "vllm-0.31-llama-3.1-8b-a100.log"
KV = round(56.21 * GIB)


def test_unchanged_it_is_the_server_as_it_reported_itself() -> None:
    plan = kvplan.size_from_log(LLAMA)
    assert plan.memory.kv_cache_bytes == KV
    assert plan.memory.weights_bytes == round(15.0 * GIB)
    assert plan.request.max_model_len_tokens == 131072
    reported = {name for name, term in plan.memory.sources.items() if term.source == "reported"}
    assert reported == {"total_bytes", "usable_bytes", "weights_bytes", "activation_bytes", "graph_bytes",
                        "overhead_bytes", "kv_cache_bytes"}  # fmt: skip
    assert plan.memory.sources["kv_cache_bytes"].detail == "line 4: Available KV cache memory: 56.21 GiB"
    assert plan.advice[0].code == "from_log"


def test_another_precision_or_context_leaves_the_servers_memory_alone() -> None:
    """64 KiB a token: 56.21 GiB // (16 × 64 KiB) = 57,559 blocks."""
    plan = kvplan.size_from_log(LLAMA, kv_cache_dtype="fp8", context_tokens=32768, batch_size=16)
    assert plan.memory.kv_cache_bytes == KV
    assert plan.kv_cache.num_blocks == KV // (16 * 65536) == 57_559
    assert plan.answers.max_batch_at_context == 57_559 // 2048 and plan.fits


def test_more_ranks_move_the_kv_memory_by_what_the_weights_give_and_the_ranks_take() -> None:
    """At TP 2 half of the 15.00 GiB of weights goes, and NCCL's buffers come."""
    before, after = kvplan.size_from_log(LLAMA), kvplan.size_from_log(LLAMA, tp_size=2)
    gained = (after.memory.kv_cache_bytes or 0) - KV
    assert after.memory.weights_bytes == pytest.approx(7.5 * GIB, rel=0.001)
    assert 6.9 * GIB < gained < 7.5 * GIB
    assert after.memory.sources["kv_cache_bytes"].detail.endswith("for what changes")
    assert after.kv_cache.bytes_per_token == before.kv_cache.bytes_per_token / 2


def test_memory_that_is_given_is_not_called_reported() -> None:
    plan = kvplan.size_from_log(LLAMA, kv_cache_memory_bytes=10 * GIB)
    assert plan.memory.kv_cache_bytes == 10 * GIB and plan.memory.sources["kv_cache_bytes"].source == "given"
    assert "kv cache" not in plan.advice[0].message


def test_a_smaller_fraction_takes_its_share_of_the_gpu() -> None:
    plan = kvplan.size_from_log(LLAMA, gpu_memory_utilization=0.9)
    assert KV - (plan.memory.kv_cache_bytes or 0) == pytest.approx(0.02 * 79.25 * GIB, abs=2)


def sources(plan: SizePlan) -> dict[str, str | None]:
    return {name.removesuffix("_bytes"): term.source for name, term in plan.memory.sources.items()}


def adds_up(plan: SizePlan) -> bool:
    """Usable less every term that is shown with a minus is the KV memory, give or take two decimals of each."""
    memory = plan.memory
    inside = [name for name, term in memory.sources.items() if not term.detail.startswith("outside")]
    terms = sum(getattr(memory, name) for name in inside if name not in ("total_bytes", "usable_bytes"))
    return abs((memory.usable_bytes or 0) - terms) < 0.05 * GIB


def test_the_column_adds_up_with_graphs_that_were_made_after_the_cache_outside() -> None:
    """72.91 − 15.00 − 1.44 − 0.26 = 56.21: the 0.23 GiB of graphs came on top."""
    plan = kvplan.size_from_log(LLAMA)
    assert adds_up(plan) and plan.memory.sources["graph_bytes"].detail.startswith("outside the fraction: line 6")


def test_weights_and_kv_memory_of_another_model_are_planned_not_reported() -> None:
    """131.4 GiB of 16-bit weights on the log's GPU of 79.25 GiB."""
    plan = kvplan.size_from_log(LLAMA, model="70b")
    assert plan.fits is False and plan.memory.weights_bytes == pytest.approx(131.42 * GIB, rel=0.001)
    assert sources(plan) == {"total": "reported", "usable": "reported", "overhead": "reported", "weights": "planned",
                             "activation": "planned", "graph": "planned", "kv_cache": "planned"}  # fmt: skip
    assert adds_up(plan)
    assert "not of 70b" in plan.advice[1].message
    four = kvplan.size_from_log(LLAMA, model="70b", tp_size=4)
    assert four.fits and adds_up(four) and sources(four)["overhead"] == "planned"  # NCCL's buffers come


def test_the_servers_own_model_by_another_name_keeps_its_terms() -> None:
    plan, same = kvplan.size_from_log(LLAMA), kvplan.size_from_log(LLAMA, model="8b")
    assert (same.memory, same.kv_cache, same.fits) == (plan.memory, plan.kv_cache, plan.fits)


def test_the_servers_own_model_in_16_bits_takes_more_than_the_8_it_is_stored_in(tmp_path: Path) -> None:
    stored = tmp_path / "fp8.log"
    name, line = "Llama-3.1-8B-Instruct", "took 15.0 GiB"
    stored.write_text(LLAMA.read_text().replace(name, f"{name}-FP8").replace(line, "took 8.5 GiB"))
    own = kvplan.size_from_log(stored, model="8b")
    assert own.memory.weights_bytes == round(8.5 * GIB) and sources(own)["weights"] == "reported"
    wide = kvplan.size_from_log(stored, model="8b", weight_dtype="bf16")
    assert wide.memory.weights_bytes == pytest.approx(15.0 * GIB, rel=0.01) and sources(wide)["weights"] == "planned"


def test_a_term_that_is_unknown_of_the_model_planned_has_no_source() -> None:
    plan = kvplan.size_from_log(LLAMA, num_layers=32, num_kv_heads=8, head_dim=128, num_parameters=8 * 10**9)
    assert plan.memory.activation_bytes is None and sources(plan)["activation"] is None


@pytest.mark.parametrize(("gpu", "usable", "fits"), [({"gpu": "l4"}, 20.27, False), ({"gpu": "h200"}, 128.62, True),
                                                     ({"gpu_memory_bytes": 141 * 10**9}, 120.81, True)])  # fmt: skip
def test_another_gpu_keeps_the_weights_and_has_its_own_kv_memory(
    gpu: dict[str, Any], usable: float, fits: bool
) -> None:
    plan = kvplan.size_from_log(LLAMA, **gpu)
    assert plan.memory.usable_bytes == pytest.approx(usable * GIB, rel=0.001)
    assert plan.fits is fits and adds_up(plan)
    assert plan.memory.weights_bytes == round(15.0 * GIB)
    found = sources(plan)
    assert (found["weights"], found["usable"], found["overhead"], found["kv_cache"]) == (
        "reported", "planned", "planned", "planned")  # fmt: skip


def test_the_servers_own_gpu_by_name_has_the_memory_the_driver_reported() -> None:
    plan, named = kvplan.size_from_log(LLAMA), kvplan.size_from_log(LLAMA, gpu="a100-80gb-sxm")
    assert named.memory.kv_cache_bytes == KV and named.memory.total_bytes == plan.memory.total_bytes
    assert sources(named) == sources(plan)


def test_a_moved_term_is_planned_and_says_what_was_reported() -> None:
    plan = kvplan.size_from_log(LLAMA, weight_dtype="fp8")
    assert sources(plan)["weights"] == sources(plan)["kv_cache"] == "planned" and adds_up(plan)
    assert plan.memory.sources["weights_bytes"].detail.startswith("line 3: Model loading took 15.0 GiB; −")


def test_where_a_log_names_neither_model_nor_gpu_the_figures_tell_whether_they_are_the_servers(tmp_path: Path) -> None:
    """15 GiB of weights are no 70B's, and 71 GiB of weights and KV no L4's."""
    bare = tmp_path / "bare.log"
    lines = LLAMA.read_text().replace("meta-llama/Llama-3.1-8B-Instruct", "/models/ours").splitlines()
    bare.write_text("\n".join(lines[:5]) + "\n")
    own = kvplan.size_from_log(bare, model="8b", gpu="a100-80gb-sxm")
    assert own.memory.kv_cache_bytes == KV and sources(own)["weights"] == "reported"
    assert kvplan.size_from_log(bare, model="8b", gpu="l4").fits is False
    assert kvplan.size_from_log(bare, model="70b", gpu="a100-80gb-sxm").fits is False
    with pytest.raises(InputError, match="not of 70b: its KV memory must be planned"):
        kvplan.size_from_log(bare, model="70b")


def test_figures_that_do_not_add_up_are_said_to_count_as_reported(tmp_path: Path) -> None:
    odd = tmp_path / "odd.log"
    odd.write_text(LLAMA.read_text().replace("memory: 56.21", "memory: 46.21"))
    messages = [advice.message for advice in kvplan.size_from_log(odd).advice]
    assert any("leave 55.98 GiB of usable memory, 46.21 GiB follow" in message for message in messages)


def test_the_command_answers_no_for_a_model_or_gpu_too_small(kvplan_cli: Callable[..., Ran]) -> None:
    for words in (["--model", "70b"], ["--gpu", "l4"]):
        asked = kvplan_cli("size", "--from-log", str(LLAMA), *words, "--check")
        assert asked.code == 1 and "DOES NOT FIT" in asked.out and "planned" in asked.out


def test_a_gpu_known_by_its_memory_alone_is_said_to_be_taken_for_a_newer_one() -> None:
    """vLLM's defaults are 1,024 requests and 8,192 tokens from 70 GiB on, but 256 and 2,048 on an A100."""
    note = next(advice for advice in kvplan.size_from_log(LLAMA).advice if advice.code == "unnamed_gpu").message
    assert "one with 79.25 GiB is taken for newer than an A100" in note and "on an A100 they are 256 requests" in note
    assert note in kvplan.check_log(LLAMA).notes
    named = kvplan.size_from_log(LLAMA, gpu="a100")
    stated = kvplan.size_from_log(LLAMA, max_num_seqs=256, max_num_batched_tokens=2048)
    alike = kvplan.size(model="8b", gpu_memory_bytes="40GiB")
    assert not any(advice.code == "unnamed_gpu" for plan in (named, stated, alike) for advice in plan.advice)


def test_what_cannot_be_worked_out_is_said() -> None:
    sglang = LOGS / "sglang-0.4-llama-8b.log"
    with pytest.raises(InputError, match="does not say how much memory a GPU has"):
        kvplan.size_from_log(sglang, gpu_memory_utilization=0.9)
    with pytest.raises(InputError, match="no memory is left for KV"):
        kvplan.size_from_log(LOGS / "vllm-0.26-glm-5.2-nvfp4-tp4-ep.log", gpu="b200", tp_size=1)
    with pytest.raises(InputError, match="the log is vllm's"):
        kvplan.size_from_log(LLAMA, engine="sglang")
    with pytest.raises(InputError, match="unknown request field 'tp'"):
        kvplan.size_from_log(LLAMA, tp=2)


def test_the_command_takes_flags_as_changes_and_sweeps_them(kvplan_cli: Callable[..., Ran], tmp_path: Path) -> None:
    one = kvplan_cli("size", "--from-log", str(LLAMA), "--kv-cache-dtype", "fp8", "--json")
    assert one.code == 0 and one.json["memory"]["kv_cache_bytes"] == KV
    assert one.json["memory"]["sources"]["weights_bytes"]["source"] == "reported"
    swept = kvplan_cli("size", "--from-log", str(LLAMA), "--kv-cache-dtype", "bf16,fp8", "--tp", "1,2")
    assert swept.code == 0 and "56.21" in swept.out and "63." in swept.out
    absent = kvplan_cli("size", "--from-log", str(tmp_path / "absent"))
    assert absent.code == 2 and absent.err.count("\n") == 1


def test_a_log_without_kv_memory_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.log"
    short.write_text("\n".join(LLAMA.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(InputError, match="no KV memory is reported"):
        kvplan.size_from_log(short)


@pytest.mark.parametrize("command", ["size", "itl"])
def test_options_that_cases_would_ignore_are_refused(
    kvplan_cli: Callable[..., Ran], tmp_path: Path, command: str
) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"model": "8b", "gpu": "h100", "context_tokens": 8192}\n')
    assert kvplan_cli(command, "--cases", str(cases)).code == 0
    assert kvplan_cli(command, "--cases", str(cases), "--json").code == 0
    refused = kvplan_cli(command, "--cases", str(cases), "--gpu", "h200", "--tp", "2")
    assert refused.code == 2 and refused.out == ""
    assert refused.err.startswith("error: --gpu, --tp beside --cases would be ignored")


def test_tokens_that_contradict_the_model_taken_are_said_first() -> None:
    """294,848 tokens in 62.99 GiB are 229,394 B each: Gemma 7B's 28 layers × 16 heads × 256, not Llama 8B's 131,072."""
    log = LOGS / "tensorrt-llm-0.17.log"
    wrong = kvplan.size_from_log(log, model="8b", context_tokens="8k")
    assert wrong.advice[0].code == "not_this_server"
    assert "294,848 tokens in 62.99 GiB, a plan of the server 516,014" in wrong.advice[0].message
    right = kvplan.size_from_log(log, num_layers=28, num_kv_heads=8, head_dim=256, context_tokens="8k")
    assert "not_this_server" not in {advice.code for advice in right.advice}
