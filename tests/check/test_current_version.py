"""Start-up logs made of what vLLM 0.33's own allocator gave: read as text, each agrees, and blocks off are seen."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from kvplan.check.log import read_stream
from kvplan.check.reconcile import reconcile
from kvplan.check.result import CheckResult

GPUS = {"sm90": "h100-sxm", "sm100": "b200"}
EVERY = 29
"""One case in so many: a prime, so that models, formats and ranks are all met."""


@pytest.fixture(scope="module")
def cases(data: Path) -> list[dict[str, Any]]:
    with gzip.open(data / "vllm_kv_oracle.jsonl.gz", "rt") as file:
        every = [json.loads(line) for number, line in enumerate(file) if number % EVERY == 0]
    return [case for case in every if case["fits"] and case.get("tokens")]


def start_up(case: dict[str, Any], data: Path, tokens: int) -> str:
    """What vLLM 0.33 prints of this case."""
    blocks = "" if case["block_size_requested"] is None else f", 'block_size': {case['block_size_requested']}"
    ranks = (case.get("extra") or {}).get("decode_context_parallel_size", 1)
    return (
        f"INFO [utils.py:233] non-default args: {{'max_num_seqs': {case['max_num_seqs']}, "
        f"'max_num_batched_tokens': {case['max_num_batched_tokens']}{blocks}}}\n"
        "INFO [core.py:121] Initializing a V1 LLM engine (v0.33.0) with config: "
        f"model='{data / 'model_configs' / case['model']}', max_seq_len={case['max_model_len']}, "
        f"tensor_parallel_size={case['tp']}, decode_context_parallel_size={ranks}, "
        f"kv_cache_dtype={case['kv_cache_dtype']}, enable_prefix_caching={case['prefix_caching']}\n"
        f"INFO [gpu_worker.py:692] Available KV cache memory: {case['available_bytes'] / 2**30:.2f} GiB\n"
        f"INFO [kv_cache_utils.py:2464] GPU KV cache size: {tokens:,} tokens, Maximum concurrency for "
        f"{case['max_model_len']:,} tokens per request: {case['max_concurrency']:.2f}x\n"
        "INFO [gpu_worker.py:955] Replace gpu_memory_utilization config with `--kv-cache-memory=1073741824` (1.0 GiB) "
        f"to fit into requested memory. Current kv cache memory in use is {case['available_bytes']} bytes.\n"
    )


def checked(case: dict[str, Any], data: Path, tokens: int | None = None) -> CheckResult:
    log = start_up(case, data, case["tokens"] if tokens is None else tokens)
    report = read_stream(io.BytesIO(log.encode()), "log")
    return reconcile(report, {"gpu": GPUS[case["platform"]], "kv_cache_memory_bytes": case["available_bytes"]})


def test_what_the_allocator_gave_agrees_to_the_token(cases: list[dict[str, Any]], data: Path) -> None:
    assert len(cases) > 200 and len({case["model"] for case in cases}) > 50
    for case in cases:
        result = checked(case, data)
        assert result.agrees, (
            case["model"],
            case["kv_cache_dtype"],
            [(t.name, t.planned, t.observed) for t in result.drifted],
        )
        assert result.plan.kv_cache.rules == "exact"


def test_a_block_more_or_less_is_drift(cases: list[dict[str, Any]], data: Path) -> None:
    for case in cases[::10]:
        block = max(case["tokens"] // case["num_blocks"], 1)
        for tokens in (case["tokens"] - 2 * block, case["tokens"] + 2 * block):
            assert not checked(case, data, tokens).agrees, case["model"]
