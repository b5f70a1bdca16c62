"""``size --from-log`` starts from the server's own memory and changes only what it is told to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import Ran

import kvplan
from kvplan.errors import InputError
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
    assert reported == {"usable_bytes", "weights_bytes", "activation_bytes", "graph_bytes", "overhead_bytes",
                        "kv_cache_bytes"}  # fmt: skip
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
