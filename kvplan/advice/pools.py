"""Shares of an engine's pools that fit the requests."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.setup import Setup, cache_plan

WORTH_SAYING = 1.05


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
