"""What the cache holds that it need not, and what would win it back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kvplan.advice.pools import WORTH_SAYING, better_split
from kvplan.dtypes import kv_format
from kvplan.errors import KvplanError
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.limits import holds_with
from kvplan.memory.plan import Advice, FormatRow, SizePlan
from kvplan.memory.setup import Setup, cache_plan
from kvplan.model_config import AttentionCache
from kvplan.units import format_count, format_percent, format_ratio, format_tokens

NEARLY = 0.97


def replication(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """TP ranks that store the same heads or latents; what DCP would win."""
    copies = plan.num_copies
    if copies < 2:
        return
    latent = bool(setup.model.cache_kinds & {"mla", "compressed"})
    what = "the latent cache" if latent else "every KV head"
    times = "twice" if copies == 2 else f"{copies} times"
    heads = "" if latent else f" on {_kv_heads(setup)} KV heads"
    base = f"TP {setup.options.tp_size}{heads} stores {what} {times}"
    other = _sharded(setup, plan.dcp_size * copies)
    if other is None:
        yield Advice(code="replicated_heads", message=f"{base}; data-parallel attention would not")
        return
    now, then = plan.bytes_per_request(setup.context_tokens), other.bytes_per_request(setup.context_tokens)
    gain, dcp = now / then, plan.dcp_size * copies
    won = _won(setup, answer, {"dcp_size": dcp})
    yield Advice(code="replicated_heads", gain=gain,
                 message=f"{base}: DCP {dcp} wins {format_ratio(gain)} capacity{won}")  # fmt: skip


def _won(setup: Setup, answer: SizePlan, edits: dict[str, Any]) -> str:
    """What following advice comes to in whole requests; empty where memory is unknown, or no more of them run."""
    now, then = answer.answers.max_batch_at_context, holds_with(setup, edits)
    if now is None or then is None or then.requests <= now:
        return ""
    return f" ({format_count(then.requests, 'request')} instead of {now:,})"


def _sharded(setup: Setup, dcp_size: int) -> CachePlan | None:
    """The cache under decode context parallelism; None where the engine has none, or its rules were not read."""
    if not setup.engine.splits_contexts:
        return None
    try:
        return cache_plan(replace(setup, options=replace(setup.options, dcp_size=dcp_size)))
    except KvplanError:
        return None


def _kv_heads(setup: Setup) -> int:
    caches = (cache for layer in setup.model.layers for cache in layer.caches)
    return min(cache.num_kv_heads for cache in caches if isinstance(cache, AttentionCache))


def formats(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """What a smaller format really wins here, when the cache is 16-bit; why one wins less than advertised."""
    current = plan.kv_cache_dtype
    rows = {row.kv_cache_dtype: row for row in answer.comparison}
    mine = rows.get(current)
    if kv_format(current).key_bits == 16:
        fp8 = rows.get("fp8")
        if fp8 is not None and fp8.effective_gain is not None and fp8.effective_gain >= WORTH_SAYING:
            yield Advice(
                code="try_fp8", gain=fp8.effective_gain,
                message=f"fp8 KV holds {format_ratio(fp8.effective_gain)} as many tokens"
                + _why_less(setup, fp8) + "; check accuracy with calibrated scales, and latency: bytes are not speed",
            )  # fmt: skip
    elif mine is not None and mine.effective_gain is not None and mine.advertised_gain is not None:
        gain = mine.effective_gain
        if gain < mine.advertised_gain * NEARLY or (mine.scale_share or 0) > 0.01:
            yield Advice(
                code="less_than_advertised", gain=gain,
                message=f"{current} wins {format_ratio(gain)} here, not {format_ratio(mine.advertised_gain, 0)}"
                + _why_less(setup, mine),
            )  # fmt: skip


def _why_less(setup: Setup, row: FormatRow) -> str:
    reasons = []
    if row.scale_share and row.scale_share > 0.001:
        reasons.append(f"scales take {format_percent(row.scale_share)}")
    short = row.advertised_gain is not None and (row.effective_gain or 0) < row.advertised_gain * NEARLY
    if short and "state" in setup.model.cache_kinds:
        reasons.append("the state page pins the block")
    elif short and setup.model.cache_kinds & {"indexer"}:
        reasons.append("index keys keep their size")
    elif short and setup.model.cache_kinds & {"mla"} and row.kv_cache_dtype == "fp8_ds_mla":
        reasons.append("RoPE values stay bf16")
    return f" ({', '.join(reasons)})" if reasons else ""


def hybrid_block(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """Long blocks of hybrids: how much of the pool a short prompt holds."""
    if "state" not in setup.model.cache_kinds or not answer.kv_cache.num_blocks:
        return
    share = plan.blocks_per_request(1) / answer.kv_cache.num_blocks
    if share * setup.options.max_num_seqs > 1:
        fits_short = int(1 / share)
        yield Advice(
            code="long_blocks",
            message=f"blocks are {plan.block_size_tokens:,} tokens long: a one-token prompt holds "
            f"{plan.blocks_per_request(1)} of {answer.kv_cache.num_blocks:,} blocks, so at most {fits_short} "
            "requests run however short they are",
        )


def in_flight(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """What the in-flight reserve of windows costs, against 2,048 batched tokens."""
    if not setup.model.cache_kinds & {"sliding", "chunked", "compressed"} or plan.tokens_in_flight <= 4096:
        return
    smaller = replace(plan, tokens_in_flight=plan.tokens_in_flight * 2048 // setup.batched_tokens)
    gain = plan.bytes_per_request(setup.context_tokens) / smaller.bytes_per_request(setup.context_tokens)
    if gain >= WORTH_SAYING:
        yield Advice(
            code="in_flight_reserve", gain=gain,
            message=f"each window reserves {format_tokens(plan.tokens_in_flight)} tokens in flight: "
            f"--max-num-batched-tokens 2048 wins {format_ratio(gain)} capacity"
            f"{_won(setup, answer, {'max_num_batched_tokens': 2048})}, for slower prefill",
        )  # fmt: skip


def pool_split(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """Shares of SGLang's pools as requests of this length would have them."""
    found = better_split(setup, plan, answer.memory.kv_cache_bytes or 0)
    if found is not None:
        yield Advice(
            code="pool_split", gain=found.gain,
            message=f"requests of {format_tokens(setup.context_tokens)} tokens fill one pool and leave room in "
            f"another: {found.flag} wins {format_ratio(found.gain)} capacity"
            f"{_won(setup, answer, {found.field: found.ratio})}, with less kept of other prefixes",
        )  # fmt: skip


def declared(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """What ``auto`` made of a checkpoint that names a KV format."""
    quantization = setup.model.quantization
    if quantization is None or setup.request.kv_cache_dtype != "auto":
        return
    if quantization.kv_cache_format is not None:
        yield Advice(
            code="auto_resolved",
            message=f"auto became {plan.kv_cache_dtype}: the checkpoint asks for {quantization.kv_cache_format} KV",
        )
        return
    declared = quantization.kv_cache_declared
    if declared is not None and plan.kv_cache_dtype in ("bfloat16", "float16"):
        yield Advice(
            code="declared_not_used",
            message=f"the checkpoint names {declared} KV, but auto keeps 16 bits: pass --kv-cache-dtype {declared}",
        )
