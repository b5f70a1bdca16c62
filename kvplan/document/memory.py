"""Where the memory of one GPU goes, and what of it is wasted, each loss with what wins it back."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvplan.advice.pools import better_split
from kvplan.document.parts import Segment, SegmentKind, Waste
from kvplan.document.plans import Plans
from kvplan.memory.ledger import LABELS, waste_ledger
from kvplan.memory.limits import Holds, holds_with, longest_held, most_held
from kvplan.memory.request import Source
from kvplan.units import format_count, format_tokens

WORTH = 1.0005
"""Capacity over what it is now from which a remedy is worth naming."""
FULL_FRACTION = 0.95
"""The largest memory fraction of the whole GPU that is advised: the rest is for what the engine does not count."""

REASONS = {
    "null_block": "the engine keeps one block that no request may use",
    "remainder": "less than one block is left over",
    "rounding": "last blocks are partly empty, and windows reserve room for tokens in flight",
    "page_padding": "pages of unequal layers are padded to one size",
    "group_padding": "layers of unequal size share one pool of blocks",
    "state_copies": "states are copied at block boundaries so that prefixes can be reused",
    "replicated": "more ranks than KV heads",
    "pool_split": "memory is dealt to pools at start-up, and requests fill one of them first",
    "unused": "no whole further user fits",
    "reserve": "left to what the engine does not count: other processes, fragmentation",
    "set_aside": "the engine sets it aside for activations and graphs, whose peak is an estimate",
}
"""Why each loss is there, by the names of ``kvplan.memory.ledger`` and the segments."""

TERMS: tuple[tuple[str, str, str, SegmentKind], ...] = (
    ("weights_bytes", "weights", "weights", "weights"),
    ("activation_bytes", "activations", "activation peak", "engine"),
    ("graph_bytes", "graphs", "CUDA graphs", "engine"),
    ("overhead_bytes", "overhead", "context and libraries", "engine"),
)
WASTED = ("replicated", "page_padding", "group_padding", "rounding", "state_copies", "null_block", "remainder")


def segments_of(plans: Plans) -> list[Segment]:
    """One GPU's memory from weights to headroom, at the users asked for or as many as fit; it adds up to the whole."""
    memory, lines = plans.size.memory, _ledger(plans)
    total = memory.total_bytes or 0
    found = []
    for key, name, label, kind in TERMS:
        term = memory.sources[key]
        value = getattr(memory, key)
        if value:
            found.append(Segment(name=name, label=label, kind=kind, bytes=value, source=term.source,
                                 detail=term.detail, override=term.override))  # fmt: skip
    found += _kv_segments(lines, "exact" if plans.cache.exact else "assumed")
    if memory.excess_bytes:
        kv = memory.sources["kv_cache_bytes"]
        found.append(Segment(name="kv", label="KV cache", kind="kv", bytes=memory.kv_cache_bytes or 0, source=kv.source,
                             detail=kv.detail, override=kv.override))  # fmt: skip
    left = total - sum(segment.bytes for segment in found)
    usable = memory.sources["usable_bytes"]
    if left >= 0:
        given = plans.setup.request.kv_cache_memory_bytes is not None
        label = "left over" if given else "outside the engine's fraction"
        reserve = Segment(name="reserve", label=label, kind="reserve", bytes=left,
                          source=usable.source, detail=usable.detail, override=usable.override)  # fmt: skip
        return [*found, reserve]
    short = Segment(name="short", label="more than the GPU has", kind="short", bytes=left, source="assumed",
                    detail="the terms above exceed the GPU's memory", override="--tp, --weight-dtype")  # fmt: skip
    return [*found, short]


def _ledger(plans: Plans) -> dict[str, int]:
    if plans.room_bytes <= 0:
        return {}
    setup, context = plans.setup, plans.setup.context_tokens
    held = min(most_held(setup, plans.cache, plans.room_bytes), setup.batch_per_replica)
    return waste_ledger(plans.cache, plans.room_bytes, context, held).lines


def _kv_segments(lines: dict[str, int], source: Source) -> list[Segment]:
    parts: list[tuple[str, str, SegmentKind, int]] = [
        ("kv", "keys, values and states", "kv", lines.get("live", 0)),
        ("scales", "scales", "scales", lines.get("scales", 0)),
        ("padding", "copies, padding and rounding", "waste", sum(lines.get(name, 0) for name in WASTED)),
        ("pools", "room of other pools", "waste", lines.get("pool_split", 0)),
        ("headroom", "free for more users", "headroom", lines.get("unused", 0)),
    ]
    return [
        Segment(name=name, label=label, kind=kind, bytes=value, source=source,
                detail="waste ledger of the engine's allocation rules", override="--kv-cache-dtype, --batch")
        for name, label, kind, value in parts if value
    ]  # fmt: skip


class Remedy(NamedTuple):
    """A change that wins bytes back: words, and the request fields it sets."""

    words: str
    edits: dict[str, Any]


def waste_of(plans: Plans, segments: list[Segment]) -> list[Waste]:
    """The waste ledger, largest first: every line with bytes in it, its remedy and the users that adds."""
    setup, plan = plans.setup, plans.size
    lines = [(line.name, line.label, line.bytes) for line in plan.ledger if line.name not in ("live", "scales")]
    reserve = next((segment for segment in segments if segment.name == "reserve"), None)
    if reserve is not None and setup.engine.fraction_of != "free" and setup.request.kv_cache_memory_bytes is None:
        lines.append(("reserve", reserve.label, reserve.bytes))
    now = Holds.of(setup, plans.cache, plans.room_bytes)
    found = [_line(plans, now, line) for line in lines if line[2] > 0]
    return sorted(found, key=lambda waste: -waste.bytes)


def _line(plans: Plans, now: Holds, line: tuple[str, str, int]) -> Waste:
    name, label, size = line
    share = size / (plans.size.memory.total_bytes or 1)
    if name == "unused":
        return _unused(plans, size, share)
    best: tuple[Holds, str] | None = None
    for remedy in _remedies(plans, name):
        then = holds_with(plans.setup, remedy.edits)
        if then is not None and then.fractional > now.fractional * WORTH and (best is None or then > best[0]):
            best = (then, remedy.words)
    note = REASONS.get("set_aside" if name == "reserve" and plans.setup.engine.fraction_of == "static" else name, "")
    if best is None:
        return Waste(name=name, label=label, bytes=size, share=share, note=note)
    then, words = best
    gain = then.fractional / now.fractional - 1 if now.fractional else None
    return Waste(name=name, label=label, bytes=size, share=share, fix=words, wins_users=then.requests - now.requests,
                 wins_capacity=gain, note=note)  # fmt: skip


def _unused(plans: Plans, size: int, share: float) -> Waste:
    """Free blocks: room for more users, or for more context of those there are."""
    setup, cache, available = plans.setup, plans.cache, plans.room_bytes
    users = plans.size.ledger_requests or 0
    more = most_held(setup, cache, available) - users
    label = LABELS["unused"]
    if more > 0:
        fix = f"room for {format_count(more * setup.num_replicas, 'more user')}"
        return Waste(name="unused", label="free blocks", bytes=size, share=share, fix=fix, 
                     note="headroom, not loss: more users fill it")  # fmt: skip
    longest = longest_held(setup, cache, available, users) if users else None
    grows = longest is not None and longest > setup.context_tokens
    room = f"the same users may go up to {format_tokens(longest)} tokens" if grows else None
    return Waste(name="unused", label=label, bytes=size, share=share, fix=room, 
                 note=REASONS["unused"])  # fmt: skip


def _remedies(plans: Plans, name: str) -> list[Remedy]:
    setup, cache, request = plans.setup, plans.cache, plans.setup.request
    if name == "pool_split":
        split = better_split(setup, cache, plans.room_bytes)
        return [] if split is None else [Remedy(split.flag, {split.field: split.ratio})]
    if name == "replicated":
        copies = cache.num_copies
        dcp, tp = cache.dcp_size * copies, request.tp_size // max(copies, 1)
        words = f"decode context parallel {dcp} (--dcp {dcp})"
        found = [Remedy(words, {"dcp_size": dcp})] if setup.engine.splits_contexts else []
        if tp >= 1 and copies > 1:
            dp = request.dp_size * copies
            found.append(Remedy(f"TP {tp} × {dp} replicas (--tp {tp} --dp {dp})", {"tp_size": tp, "dp_size": dp}))
        return found
    if name == "reserve":
        flag, full = setup.engine.fraction_flag, FULL_FRACTION
        if setup.engine.fraction_of == "static":  # its default leaves what activations and graphs need
            full = setup.engine.default_fraction(setup.model, setup.options).value
        return [Remedy(f"{flag} {full:g}", {"gpu_memory_utilization": full})] if setup.fraction < full else []
    found = []
    if name == "state_copies" and request.enable_prefix_caching:
        found.append(Remedy("--no-enable-prefix-caching", {"enable_prefix_caching": False}))
    if name == "rounding":
        if setup.model.cache_kinds & {"sliding", "chunked", "compressed"} and setup.batched_tokens > 2048:
            found.append(Remedy("--max-num-batched-tokens 2048", {"max_num_batched_tokens": 2048}))
        if cache.block_size_tokens > 16:
            found.append(Remedy("--block-size 16", {"block_size_tokens": 16}))
    return found
