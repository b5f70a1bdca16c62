"""Where the bytes of the KV budget go: live tokens, scales, and each kind of waste. The lines add up to the budget."""

from __future__ import annotations

from dataclasses import dataclass

from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.pages import Group

LABELS = {
    "live": "keys, values and states in use",
    "scales": "scales in use",
    "replicated": "copies of heads other ranks hold too",
    "page_padding": "padding inside pages",
    "group_padding": "padding between groups of unequal size",
    "rounding": "block rounding and in-flight reserve",
    "state_copies": "state copies for prefix caching",
    "null_block": "null block",
    "pool_split": "room in other pools when the tightest is full",
    "unused": "blocks no further request fits in",
    "remainder": "bytes that make no whole block",
}


@dataclass(frozen=True)
class Ledger:
    """Bytes of one GPU's KV budget when it holds ``num_requests`` of ``context_tokens``.

    ``lines`` has every name of ``LABELS``; they sum to ``total_bytes``.
    """

    num_requests: int
    context_tokens: int
    total_bytes: int
    lines: dict[str, int]


def waste_ledger(plan: CachePlan, available_bytes: int, context_tokens: int, num_requests: int) -> Ledger:
    """Account for ``available_bytes`` when ``num_requests`` requests of ``context_tokens`` are held."""
    lines = dict.fromkeys(LABELS, 0)
    rank = max(plan.rank_groups, key=lambda groups: _rank_request_bytes(plan, groups, context_tokens))
    pool = plan.pool_bytes_per_block
    for group, mine in zip(plan.groups, rank, strict=True):
        blocks = group.blocks(context_tokens, plan.tokens_in_flight, plan.dcp_size)
        _add_group(lines, mine, blocks, context_tokens, plan, num_requests, pool)
    claimed = num_requests * plan.bytes_per_request(context_tokens)
    if plan.unified_pool:
        num_blocks = plan.num_blocks(available_bytes)
        reserved = min(max(plan.reserved_blocks, 0), num_blocks)
        lines["null_block"] = reserved * pool
        lines["unused"] = (num_blocks - reserved) * pool - claimed
        lines["remainder"] = available_bytes - num_blocks * pool
    else:
        lines["pool_split"] = claimed - num_requests * plan.held_bytes(context_tokens)
        lines["unused"] = available_bytes - claimed
    return Ledger(num_requests, context_tokens, available_bytes, lines)


def _rank_request_bytes(plan: CachePlan, groups: tuple[Group, ...], context_tokens: int) -> int:
    """What makes a pipeline rank the fullest: pages of one request's blocks."""
    return sum(
        group.bytes_per_block * group.blocks(context_tokens, plan.tokens_in_flight, plan.dcp_size)
        for group in groups
        if group.num_layers
    )


def _add_group(lines: dict[str, int], group: Group, blocks: int, context: int, plan: CachePlan, requests: int,
               pool: int) -> None:  # fmt: skip
    if plan.unified_pool:
        lines["group_padding"] += requests * blocks * (pool - group.bytes_per_block)
    for run in group.runs:
        page, layers = run.page, run.num_layers
        live, scales = page.live_bytes(context, plan.dcp_size)
        content = blocks * page.content_bytes
        lines["page_padding"] += requests * layers * blocks * page.padding_bytes
        if page.kind == "state":
            lines["state_copies"] += requests * layers * (content - page.state_bytes)
        else:
            lines["rounding"] += requests * layers * (content - live - scales)
        copies = max(page.num_copies // plan.dcp_size, 1)
        duplicated = (live + scales) * (copies - 1) // copies
        live -= min(duplicated, live)
        shared = min(duplicated, page.live_bytes(context, plan.dcp_size)[0])
        lines["live"] += requests * layers * live
        lines["scales"] += requests * layers * (scales - (duplicated - shared))
        lines["replicated"] += requests * layers * duplicated
