"""What to change, with what it wins. Every sentence carries a number that another plan computed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import ceil, floor
from typing import Any, NamedTuple

from kvplan.dtypes import kv_format
from kvplan.errors import KvplanError
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.limits import kv_bytes_for, most_held
from kvplan.memory.plan import Advice, FormatRow, SizePlan
from kvplan.memory.planner import fits
from kvplan.memory.setup import Setup, budget_of, cache_plan, set_up, weights_of
from kvplan.model_config import AttentionCache
from kvplan.model_config.types import beyond_claim
from kvplan.units import format_count, format_gib, format_percent, format_ratio, format_tokens

WORTH_SAYING = 1.05
NEARLY = 0.97


def advise(setup: Setup, plan: CachePlan, answer: SizePlan) -> tuple[Advice, ...]:
    """Advice for a plan, most pressing first."""
    found: list[Advice] = []
    for source in (
        _does_not_fit,
        _scheduler,
        _budget,
        _unnamed_gpu,
        _beyond_model,
        _no_experts,
        _warnings,
        _replication,
        _formats,
        _hybrid_block,
        _in_flight,
        _pool_split,
        _declared,
    ):
        found += source(setup, plan, answer)
    return tuple(found)


def _no_experts(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    if setup.request.ep and not setup.model.is_moe:
        yield Advice(code="no_experts", message=f"{setup.model.name} has no experts: --ep changes nothing")


def _does_not_fit(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    if answer.fits is not False or answer.memory.excess_bytes:
        return
    memory, answers = answer.memory, answer.answers
    if answers.num_waiting and not answers.kv_short_bytes_per_gpu:
        return
    remedy, longest = _what_would_fit(setup, plan, answer), _longest_that_starts(setup, plan, answer)
    if memory.kv_cache_bytes is not None and memory.kv_cache_bytes <= 0:
        yield Advice(
            code="weights_do_not_fit",
            message=f"weights and the engine's own memory exceed usable memory by {format_gib(-memory.kv_cache_bytes)} "
            f"per GPU before any KV{remedy or '; use more GPUs or smaller weights (--weight-dtype)'}",
        )
        return
    if answer.too_long_tokens is not None:
        yield Advice(
            code="does_not_fit",
            message=f"the engine refuses to start: its longest request, {format_tokens(answer.too_long_tokens)} "
            f"tokens, is more than the KV memory holds; --max-model-len {longest} would do{remedy}",
        )
        return
    parts = []
    if answers.max_batch_at_context:
        held = format_count(answers.max_batch_at_context, "request")
        parts.append(f"{held} at {format_tokens(answers.context_tokens)} tokens")
    if answers.max_context_at_batch_tokens:
        who = f"batch {answers.batch_size}" if answers.batch_size else "one request"
        parts.append(f"{who} at {format_tokens(answers.max_context_at_batch_tokens)} tokens")
    starting = "" if longest is None else f", with --max-model-len {longest}"
    room = f"; what fits{starting}: {' or '.join(parts)}" if parts else ""
    short = format_gib(answers.kv_short_bytes_per_gpu)
    yield Advice(code="does_not_fit", message=f"KV is short by {short} per GPU{room}{remedy}")


def _longest_that_starts(setup: Setup, plan: CachePlan, answer: SizePlan) -> int | None:
    """The longest request with which the engine starts; None where the one it was told of does, or none would."""
    available = kv_bytes_for(setup, setup.batch_per_replica, answer.memory.kv_cache_bytes or 0)
    told = setup.request.max_model_len_tokens
    return None if told is None or plan.fits_one(available, told) else plan.max_context(available, 1, told)


def _what_would_fit(setup: Setup, plan: CachePlan, answer: SizePlan) -> str:
    """DCP over the same GPUs, the smallest larger TP, and the KV formats, under which the request fits."""
    options = []
    copies = _copies(plan)
    if copies > 1 and setup.engine.splits_contexts and _fits_with(setup, dcp_size=plan.dcp_size * copies):
        options.append(f"--dcp {plan.dcp_size * copies}")
    larger = (tp for tp in (2, 4, 8, 16) if tp > setup.options.tp_size and _fits_with(setup, tp_size=tp))
    options += [f"--tp {tp}" for tp in itertools.islice(larger, 1)]
    available = answer.memory.kv_cache_bytes
    if available is not None and available > 0:
        rows = (row for row in answer.comparison if row.forbidden is None and (row.effective_gain or 0) > 1)
        held = (r.kv_cache_dtype for r in rows if _fits_with(setup, kv_cache_dtype=r.kv_cache_dtype))
        options += [f"--kv-cache-dtype {name}" for name in itertools.islice(held, 1)]
    return f"; it would fit with {' or '.join(options)}" if options else ""


def _fits_with(setup: Setup, **fields: Any) -> bool:
    """Whether the request fits with some of its fields changed."""
    try:
        other = set_up(replace(setup.request, **fields))
        plan, budget = cache_plan(other), budget_of(other, weights_of(other))
    except KvplanError:
        return False
    return not budget.excess_bytes and fits(other, plan, budget) is True


def _copies(plan: CachePlan) -> int:
    """How many ranks store the same heads or latents."""
    copies = min((run.page.num_copies for g in plan.groups for run in g.runs if run.page.kind != "state"), default=1)
    return copies // plan.dcp_size


def _scheduler(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """Requests that wait, or would, because the engine runs fewer at once than there are or are held."""
    if answer.fits is None:
        return
    answers, replicas = answer.answers, setup.num_replicas
    each = " on each replica" if replicas > 1 else ""
    if answers.num_waiting:
        yield Advice(
            code="max_num_seqs",
            message=f"--max-num-seqs {setup.request.max_num_seqs} lets {answers.max_running:,} of "
            f"{format_count(answers.batch_size or 1, 'request')} run at once, and the rest wait"
            f"{_higher_limit(setup, plan, answer)}",
        )
        return
    stated, most = setup.request.max_num_seqs, max(answers.batch_size or 0, answers.max_batch_at_context or 0)
    if stated is not None or answers.max_running is None or answer.verdict is False or most <= answers.max_running:
        return
    default = answers.max_running // replicas
    runs = f"{plan.engine} {plan.version} runs {format_count(default, 'request')} at once{each} unless told"
    if setup.batch_per_replica > default:
        wanted = f"this plan takes --max-num-seqs {setup.batch_per_replica}"
    else:
        wanted = f"more, up to the {most:,} that are held, take --max-num-seqs"
    yield Advice(code="max_num_seqs", message=f"{runs}: {wanted}")


def _higher_limit(setup: Setup, plan: CachePlan, answer: SizePlan) -> str:
    """The limit that would let all requests run, or as many as KV memory holds; empty where that is no more."""
    unlimited = set_up(replace(setup.request, max_num_seqs=None))
    held = most_held(unlimited, plan, answer.memory.kv_cache_bytes or 0)
    limit = min(held, setup.batch_per_replica)
    running = min(limit * setup.num_replicas, setup.request.batch_size or 1)
    if limit <= (setup.request.max_num_seqs or 0) or not _fits_with(setup, max_num_seqs=limit, batch_size=running):
        return ""
    who = "all of them" if held >= setup.batch_per_replica else f"{running:,}, as many as the KV memory holds"
    return f"; --max-num-seqs {limit} would let {who}"


def _budget(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """A budget that was given and cannot be, or that leaves out a term."""
    memory = answer.memory
    if memory.excess_bytes:
        room = (memory.kv_cache_bytes or 0) - memory.excess_bytes
        most = f"; at most {format_gib(room)} would do" if room > 0 else ""
        if room > 0 and setup.request.kv_cache_memory_bytes is None:
            usable = memory.usable_bytes or 1
            fraction = floor(setup.fraction * (usable - memory.excess_bytes) / usable * 100) / 100
            most = f"; at most {setup.engine.fraction_flag} {fraction:g} would do"
        yield Advice(
            code="budget_beyond_gpu",
            message=f"weights, the KV bytes set aside and the engine's own memory exceed the GPU's memory by "
            f"{format_gib(memory.excess_bytes)}: the engine would run out of memory{most}",
        )
    elif (
        setup.request.kv_cache_memory_bytes is None
        and memory.kv_cache_bytes is not None
        and memory.activation_bytes is None
    ):
        yield Advice(
            code="activation_unknown",
            message="activation peak unknown without an architecture and not taken off: give --activation-memory",
        )


def _unnamed_gpu(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    if setup.taken_for_granted is not None:
        yield Advice(code="unnamed_gpu", message=setup.taken_for_granted)


def _beyond_model(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    longest = max(setup.context_tokens, setup.max_model_len_tokens)
    message = beyond_claim(longest, setup.model.max_context_tokens)
    if message is not None:
        yield Advice(code="beyond_model_context", message=message)


def _warnings(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    for text in plan.warnings:
        yield Advice(code="engine_does_silently", message=text)


def _replication(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """TP ranks that store the same heads or latents; what DCP would win."""
    copies = _copies(plan)
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
    gain = now / then
    yield Advice(code="replicated_heads", gain=gain,
                 message=f"{base}: DCP {plan.dcp_size * copies} wins {format_ratio(gain)} capacity")  # fmt: skip


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


def _formats(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
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


def _hybrid_block(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
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


def _in_flight(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """What the in-flight reserve of windows costs, against 2,048 batched tokens."""
    if not setup.model.cache_kinds & {"sliding", "chunked", "compressed"} or plan.tokens_in_flight <= 4096:
        return
    smaller = replace(plan, tokens_in_flight=plan.tokens_in_flight * 2048 // setup.batched_tokens)
    gain = plan.bytes_per_request(setup.context_tokens) / smaller.bytes_per_request(setup.context_tokens)
    if gain >= WORTH_SAYING:
        yield Advice(
            code="in_flight_reserve", gain=gain,
            message=f"each window reserves {format_tokens(plan.tokens_in_flight)} tokens in flight: "
            f"--max-num-batched-tokens 2048 wins {format_ratio(gain)} capacity, for slower prefill",
        )  # fmt: skip


def _pool_split(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """Shares of SGLang's pools as requests of this length would have them."""
    found = better_split(setup, plan, answer.memory.kv_cache_bytes or 0)
    if found is not None:
        yield Advice(
            code="pool_split", gain=found.gain,
            message=f"requests of {format_tokens(setup.context_tokens)} tokens fill one pool and leave room in "
            f"another: {found.flag} wins {format_ratio(found.gain)} capacity, with less kept of other prefixes",
        )  # fmt: skip


class Split(NamedTuple):
    """A field of the request that shares memory out to pools, what it would be, and the gain in requests."""

    field: str
    ratio: float
    gain: float

    @property
    def flag(self) -> str:
        """The option that sets it."""
        return f"--{self.field.replace('_', '-')} {self.ratio:g}"


def better_split(setup: Setup, plan: CachePlan, kv_bytes: int) -> Split | None:
    """The share of windows or states that fits the context; None where little is won."""
    context, needs = setup.context_tokens, plan.pool_needs(setup.context_tokens)
    if kv_bytes <= 0 or len(needs) != 2 or not needs.get("tokens") or setup.counts_states:
        return None
    if "windows" in needs:  # beside the windows, that pool holds the chunks of two prefills in flight
        blocks = {pool.name: max(plan.groups[i].blocks(context, 0) for i in pool.groups) for pool in plan.pools}
        chunks = 2 * setup.batched_tokens / plan.block_size_tokens
        then = (kv_bytes - chunks * needs["windows"] / blocks["windows"]) / sum(needs.values())
        ratio = (blocks["windows"] + chunks / then) / blocks["tokens"] if then >= 1 else 1.0
        name, ratio = "swa_full_tokens_ratio", min(ceil(ratio * 100) / 100, 1.0)
    else:
        name, ratio = "mamba_full_memory_ratio", ceil(needs["states"] / needs["tokens"] * 100) / 100
    change: dict[str, Any] = {name: ratio}
    other = cache_plan(replace(setup, options=replace(setup.options, **change)))
    now, then = (_held(each, kv_bytes, context) for each in (plan, other))
    return Split(name, ratio, then / now) if now and then >= now * WORTH_SAYING else None


def _held(plan: CachePlan, kv_bytes: int, context_tokens: int) -> float:
    """Requests held, before rounding down to whole ones."""
    padded = (plan.pool_blocks(pool, kv_bytes) / plan.pool_request_blocks(pool) for pool in plan.padded_pools)
    return min([kv_bytes / plan.bytes_per_request(context_tokens), *padded])


def _declared(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
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
