"""How many requests hold their KV at once, for many contexts in one go. The rules are the sizing rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kvplan.memory.cache_plan import CachePlan, Pool
from kvplan.memory.pages import Group, Page

if TYPE_CHECKING:
    import numpy.typing as npt  # takes 2 ms, and only types need it

Ints: TypeAlias = "npt.NDArray[np.int64]"


def max_batches(plan: CachePlan, available_bytes: int, context_tokens: Any) -> Ints:
    """``plan.max_batch`` at every context: requests of that length that hold their blocks at once on one rank."""
    contexts = np.asarray(context_tokens, dtype=np.int64)
    if available_bytes <= 0:
        return np.zeros_like(contexts)
    if plan.unified_pool:
        blocks = sum((_group_blocks(g, plan, contexts) for g in plan.groups), np.zeros_like(contexts))
        usable = max(plan.num_blocks(available_bytes) - plan.reserved_blocks, 0)
        return np.asarray(usable // np.maximum(blocks, 1), dtype=np.int64)
    pools = plan.pools or (Pool("all", 1.0, tuple(range(len(plan.groups)))),)
    needed = np.zeros_like(contexts)
    for groups in plan.rank_groups:
        for pool in pools:
            held = sum(
                (
                    _group_blocks(plan.groups[index], plan, contexts) * groups[index].bytes_per_block
                    for index in pool.groups
                    if groups[index].num_layers
                ),
                np.zeros_like(contexts),
            )
            needed = np.maximum(needed, np.ceil(held / pool.share).astype(np.int64))
    held = np.asarray(available_bytes // np.maximum(needed, 1), dtype=np.int64)
    return np.minimum(held, plan.max_batch(available_bytes, 1)) if plan.padded_pools else held


def _group_blocks(group: Group, plan: CachePlan, contexts: Ints) -> Ints:
    found = [_blocks(run.page, contexts, plan.tokens_in_flight, plan.dcp_size) for run in group.runs]
    return np.maximum.reduce(found) if found else np.zeros_like(contexts)


def _blocks(page: Page, contexts: Ints, in_flight: int, dcp_size: int) -> Ints:
    """``Page.blocks`` on an array."""
    block = page.block_size_tokens
    if page.kind == "state":
        return np.full_like(contexts, page.blocks_per_request)
    if page.window_tokens is not None:
        reach = page.window_tokens + in_flight - (0 if page.kind == "chunked" else 1)
        extra = 0 if page.kind == "chunked" else 1
        return np.asarray(_ceil_div(np.minimum(reach, contexts), block) + extra)
    return np.asarray(_ceil_div(_ceil_div(contexts, dcp_size), block))


def _ceil_div(values: Ints, divisor: int) -> Ints:
    return np.asarray((values + divisor - 1) // divisor, dtype=np.int64)
