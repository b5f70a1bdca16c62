"""What is suggested works when it is followed."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import kvplan
from kvplan.errors import KvplanError
from kvplan.gpu import gpu_names
from kvplan.profiles import names

FIELDS = {
    "tp": "tp_size", "dcp": "dcp_size", "kv-cache-dtype": "kv_cache_dtype", "max-model-len": "max_model_len_tokens",
    "max-num-seqs": "max_num_seqs",
}  # fmt: skip


def _asked(source: random.Random, models: list[str]) -> dict[str, Any]:
    pick = source.choice
    asked: dict[str, Any] = {
        "model": pick(models), "gpu": pick(gpu_names()), "tp_size": pick([1, 1, 2, 4, 8]),
        "engine": pick(["vllm", "vllm", "sglang", "tensorrt-llm"]),
        "context_tokens": pick([1000, 8192, 32768, 131072]), "batch_size": pick([1, 3, 16, 64, 300, 2000]),
    }  # fmt: skip
    rarely: dict[str, list[Any]] = {
        "max_num_seqs": [8, 32, 512], "kv_cache_dtype": ["fp8", "nvfp4", "int4_per_token_head"], "pp_size": [2],
        "max_model_len_tokens": [131072, 262144], "dp_size": [2, 3], "max_num_batched_tokens": [2048, 32768],
    }  # fmt: skip
    return asked | {name: pick(values) for name, values in rarely.items() if source.random() < 0.2}


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _changes(asked: dict[str, Any], said: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The changes with which a message says that the request fits."""
    for flag, value in re.findall(r"--([a-z-]+) (\w+)", said.partition("it would fit with ")[2]):
        yield "would fit", {FIELDS[flag]: int(value) if value.isdecimal() else value}
    told = {FIELDS[name]: int(value) for name, value in re.findall(r"what fits, with --([a-z-]+) (\d+)", said)}
    for count in re.findall(r"what fits[^:]*: ([\d,]+) requests? at", said):
        yield "requests", told | {"batch_size": _number(count)}
    for tokens in re.findall(r"(?:batch \d+|one request) at ([\d,]+) tokens", said):
        yield "context", told | {"context_tokens": _number(tokens)}
    for tokens in re.findall(r"--max-model-len (\d+) would do", said):
        yield "longest", {"max_model_len_tokens": int(tokens)}
    for limit, count in re.findall(r"--max-num-seqs (\d+) would let (all|[\d,]+)", said):
        batch = asked["batch_size"] if count == "all" else _number(count)
        yield "limit", {"max_num_seqs": int(limit), "batch_size": batch}
    for count in re.findall(r"up to the ([\d,]+) that are held", said):
        limit = -(-_number(count) // asked.get("dp_size", 1))
        yield "held", {"max_num_seqs": limit, "batch_size": _number(count)}


def test_what_is_said_to_fit_fits() -> None:
    source, models = random.Random(1), list(names("models"))
    tried: Counter[str] = Counter()
    for _ in range(800):
        asked = _asked(source, models)
        try:
            plan = kvplan.size(**asked)
        except KvplanError:
            continue
        for advice in plan.advice:
            for what, changes in _changes(asked, advice.message):
                tried[what] += 1
                assert kvplan.size(**asked | changes).verdict is True, (asked, advice.message, changes)
    assert set(tried) == {"would fit", "requests", "context", "longest", "limit", "held"}


def test_the_largest_batch_counts_the_memory_that_its_own_limit_takes() -> None:
    """Beyond vLLM's 256 on an A100, each sequence of the limit takes 151,936 logits × 8 B of activation."""
    asked: dict[str, Any] = {"model": "qwen3-vl-32b", "gpu": "a100", "tp_size": 8, "context_tokens": 4096}
    most = kvplan.size(**asked).answers.max_batch_at_context
    assert most is not None and most > 256
    assert kvplan.size(**asked, batch_size=most).fits is True
    assert kvplan.size(**asked, batch_size=most + 1).fits is False
    assert [kvplan.itl(**asked, batch_size=count).fits for count in (most, most + 1)] == [True, False]
    report = kvplan.report(**asked)
    held = dict(zip(report.what_if.contexts_tokens, report.what_if.surfaces[0].max_users, strict=True))
    assert report.answers.max_users == held[4096] == most


def test_a_limit_is_not_raised_beyond_what_memory_holds() -> None:
    """Eight H100s hold 42 requests of 32k."""
    asked: dict[str, Any] = {"model": "70b", "gpu": "h100", "tp_size": 8, "context_tokens": 32768}
    plan = kvplan.size(**asked, batch_size=64, max_num_seqs=32)
    said = next(advice.message for advice in plan.advice if advice.code == "max_num_seqs")
    assert said.endswith("--max-num-seqs 42 would let 42, as many as the KV memory holds")
    none = kvplan.size(model="70b", gpu="h100", context_tokens=32768, batch_size=64, max_num_seqs=32)
    assert [a.message for a in none.advice if a.code == "max_num_seqs"] == [
        "--max-num-seqs 32 lets 32 of 64 requests run at once, and the rest wait"
    ]


def test_a_pool_of_windows_is_not_advised_beyond_all_tokens() -> None:
    """Requests of 1,000 tokens want the pool of windows as large as that of tokens, which is the most SGLang takes."""
    plan = kvplan.size(model="gemma-4-26b-a4b", gpu="mi325x", tp_size=8, engine="sglang", context_tokens=1000)
    said = next(advice for advice in plan.advice if advice.code == "pool_split")
    assert "--swa-full-tokens-ratio 1 wins" in said.message
    asked: dict[str, Any] = {"kv_cache_memory_bytes": plan.memory.kv_cache_bytes, "swa_full_tokens_ratio": 1.0}
    then = kvplan.size(model="gemma-4-26b-a4b", gpu="mi325x", tp_size=8, engine="sglang", context_tokens=1000, **asked)
    now, most = plan.answers.max_batch_at_context, then.answers.max_batch_at_context
    assert now and most and said.gain == pytest.approx(most / now, rel=0.01)


def _won(asked: dict[str, Any], fix: str) -> dict[str, Any]:
    """The fields that a remedy of the waste ledger sets."""
    if fix == "--no-enable-prefix-caching":
        return {"enable_prefix_caching": False}
    names = {"gpu_memory_utilization": "gpu_memory_utilization", "mem_fraction_static": "gpu_memory_utilization",
             "block_size": "block_size_tokens", "dp": "dp_size", "tp": "tp_size", "dcp": "dcp_size"}  # fmt: skip
    found = {}
    for flag, value in re.findall(r"--([a-z-]+) ([\d.]+)", fix):
        name = flag.replace("-", "_")
        found[names.get(name, name)] = float(value) if "." in value or "ratio" in flag else int(value)
    return found


def test_the_requests_that_advice_promises_are_held_when_it_is_followed() -> None:
    """DCP, pools and fewer tokens in flight: whole requests, the memory that a higher limit takes counted."""
    flags = {"DCP": "dcp_size"} | {
        f"--{name.replace('_', '-')}": name
        for name in ("swa_full_tokens_ratio", "mamba_full_memory_ratio", "max_num_batched_tokens")
    }
    source, seen = random.Random(5), Counter[str]()
    models = ["deepseek-v3", "qwen3-235b-a22b", "gemma-4-31b", "nemotron-h-56b", "gpt-oss-120b", "qwen3-next-80b-a3b"]
    for _ in range(60):
        asked: dict[str, Any] = {
            "model": source.choice(models), "gpu": source.choice(["h100", "h200", "b200"]),
            "engine": source.choice(["vllm", "sglang"]), "tp_size": source.choice([2, 8, 16]),
            "context_tokens": source.choice([1000, 8192, 20_000, 100_000]),
        }  # fmt: skip
        try:
            plan = kvplan.size(**asked)
        except KvplanError:
            continue
        for advice in plan.advice:
            promised = re.search(r"(\S+) ([\d.]+) wins .*\(([\d,]+) requests? instead of ([\d,]+)\)", advice.message)
            if promised is None:
                continue
            flag, value, then, now = promised.groups()
            change = {flags[flag]: float(value) if "ratio" in flag else int(value)}
            held = kvplan.size(**asked, **change).answers.max_batch_at_context
            assert (plan.answers.max_batch_at_context, held) == (int(now.replace(",", "")), int(then.replace(",", "")))
            seen[advice.code] += 1
    assert min(seen[code] for code in ("replicated_heads", "pool_split", "in_flight_reserve")) > 2, seen


def test_what_the_waste_ledger_says_is_won_is_won() -> None:
    source, models = random.Random(2), list(names("models"))
    tried: Counter[str] = Counter()
    for _ in range(150):
        asked = _asked(source, models)
        try:
            report = kvplan.report(**asked)
        except KvplanError:
            continue
        asked["kv_cache_dtype"] = report.deployment.kv_cache_dtype  # one that is refused is not that asked for
        for waste in report.waste:
            longest = re.search(r"may go up to ([\d,]+) tokens", waste.fix or "")
            if longest is not None:
                users = min(asked["batch_size"], report.answers.max_users)
                grown = asked | {"context_tokens": _number(longest[1]), "batch_size": users}
                grown.pop("max_model_len_tokens", None)
                assert kvplan.size(**grown).verdict is True, (asked, waste)
            elif waste.fix is not None and waste.wins_users is not None and not waste.fix.startswith("room"):
                then = kvplan.size(**asked | _won(asked, waste.fix)).answers.max_batch_at_context or 0
                assert then - report.answers.max_users == waste.wins_users, (asked, waste)
            tried[waste.name] += waste.fix is not None
    assert {"unused", "reserve", "rounding", "replicated", "pool_split"} <= set(tried)


def test_longer_requests_that_leave_sglang_less_memory_on_amd_are_counted_with_it() -> None:
    """From 8,193 tokens a request on, aiter keeps a part of the fraction: 64 requests of 1k may not grow to 38k."""
    asked: dict[str, Any] = {"model": "qwen3-235b-a22b", "gpu": "mi300x", "tp_size": 8, "engine": "sglang",
                             "batch_size": 64}  # fmt: skip
    longest = kvplan.size(**asked, context_tokens=1000).answers.max_context_at_batch_tokens
    assert longest is not None and longest > 8192
    assert kvplan.size(**asked, context_tokens=longest).fits and not kvplan.size(**asked, context_tokens=38_557).fits
