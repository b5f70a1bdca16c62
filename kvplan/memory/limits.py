"""How many requests one replica holds, and how long, where limits beyond the plan take memory of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from kvplan.errors import KvplanError
from kvplan.memory.budget import Budget
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.setup import Setup, budget_of, cache_plan, set_up, weights_of

UNCLAIMED_CONTEXT = 2**20
"""The longest context that is looked for where a model claims none."""


def kv_bytes_for(setup: Setup, num_requests: int, available_bytes: int) -> int:
    """KV bytes of a GPU once each replica is told to run ``num_requests`` at once.

    ``available_bytes`` is what the plan as it is has. An engine's default, or a limit that is stated, moves nothing.
    """
    default, planned = setup.default_num_seqs, setup.options.max_num_seqs
    if default is None or setup.request.kv_cache_memory_bytes is not None:
        return available_bytes
    wanted = max(num_requests, default)
    if wanted == planned:
        return available_bytes
    return available_bytes + _activation_bytes(setup, planned) - _activation_bytes(setup, wanted)


def _activation_bytes(setup: Setup, max_num_seqs: int) -> int:
    other = replace(setup, options=replace(setup.options, max_num_seqs=max_num_seqs))
    return budget_of(other, None).activation.value_bytes or 0


def kv_bytes_at(setup: Setup, longest_tokens: int, available_bytes: int) -> int:
    """KV bytes of a GPU told of requests so long, and of a stated longest one; below 0, what is missing on it.

    Of long ones SGLang keeps less on AMD, and its table of them may take more than the fraction leaves.
    ``available_bytes`` is what it has with the longest request of the plan.
    """
    longest = max(longest_tokens, setup.request.max_model_len_tokens or 0)
    if longest == setup.max_model_len_tokens or setup.request.kv_cache_memory_bytes is not None:
        return available_bytes
    options = replace(setup.options, longest_tokens=longest)
    if setup.engine.table_bytes(options) == setup.engine.table_bytes(setup.options):
        return available_bytes  # and so the share that is kept, of an engine that has no table
    weights = weights_of(setup)
    now, then = (budget_of(each, weights).room_bytes or 0 for each in (setup, replace(setup, options=options)))
    return available_bytes + then - now


def longest_held(
    setup: Setup, plan: CachePlan, available_bytes: int, num_requests: int, at_least_tokens: int = 0
) -> int | None:
    """The longest context that ``num_requests`` of one replica hold at once, up to the model's.

    None when none is, or when the scheduler, as it was told, runs fewer at once. ``at_least_tokens`` are looked at
    although they are beyond the model, as those of the plan are.
    """
    if setup.at_once(num_requests) < num_requests:
        return None
    limit = max(setup.model.max_context_tokens or UNCLAIMED_CONTEXT, setup.max_model_len_tokens, at_least_tokens)
    room = kv_bytes_for(setup, num_requests, available_bytes)
    found = plan.max_context(max(room, kv_bytes_at(setup, 1, room)), num_requests, limit)
    if found is None or kv_bytes_at(setup, found, room) == kv_bytes_at(setup, 1, room):
        return found
    low, high = 0, found
    while low < high:
        middle = (low + high + 1) // 2
        held = plan.max_batch(kv_bytes_at(setup, middle, room), middle) >= num_requests
        low, high = (middle, high) if held else (low, middle - 1)
    return low or None


def most_held(setup: Setup, plan: CachePlan, available_bytes: int, context_tokens: int | None = None) -> int:
    """Requests of ``context_tokens`` (the plan's) that one replica holds, told to run as many, as far as it may be."""
    context = context_tokens or setup.context_tokens
    available_bytes = kv_bytes_at(setup, context, available_bytes)

    def held_with(limit: int) -> int:
        return plan.max_batch(kv_bytes_for(setup, limit, available_bytes), context)

    low, default = 0, setup.default_num_seqs
    most = held_with(low)
    if default is None or most <= default:
        return setup.at_once(most)
    low = default
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if held_with(middle) >= middle else (low, middle - 1)
    return setup.at_once(low)


def planned_with(setup: Setup, edits: dict[str, Any]) -> tuple[Setup, CachePlan, Budget] | None:
    """The plan with fields of the request changed; None when that cannot be planned."""
    try:
        other = set_up(replace(setup.request, **edits))
        return other, cache_plan(other), budget_of(other, weights_of(other))
    except KvplanError:
        return None


class Holds(NamedTuple):
    """What a plan holds at its context, over all replicas: requests, and the same before rounding down to whole ones.

    What runs at once, and the memory that many take, is in ``requests`` only.
    """

    requests: int
    fractional: float

    @classmethod
    def of(cls, setup: Setup, plan: CachePlan, available_bytes: int) -> Holds:
        """What ``plan`` holds of ``setup``'s context in ``available_bytes`` of each GPU."""
        room, replicas = max(available_bytes, 0), setup.num_replicas
        needed = plan.bytes_per_request(setup.context_tokens)
        return cls(most_held(setup, plan, room) * replicas, replicas * room / needed)


def holds_with(setup: Setup, edits: dict[str, Any]) -> Holds | None:
    """What is held at the same context with fields of the request changed; None when that cannot be planned."""
    found = planned_with(setup, edits)
    if found is None:
        return None
    other, plan, budget = found
    return None if budget.room_bytes is None else Holds.of(other, plan, budget.room_bytes)
