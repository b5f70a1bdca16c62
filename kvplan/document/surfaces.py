"""Every KV format over users × contexts: what the curves, the break-even map and the page's controls show."""

from __future__ import annotations

from collections.abc import Sequence

from kvplan.document.parts import Surface, WhatIf
from kvplan.document.precisions import Format
from kvplan.document.question import Question
from kvplan.latency.plan import ItlPlan
from kvplan.latency.planner import plan_points
from kvplan.latency.request import Point
from kvplan.memory.limits import longest_held, most_held
from kvplan.memory.setup import Setup
from kvplan.units import ceil_div

SMALLEST_CONTEXT = 1024
LARGEST_CONTEXT = 2**20
LEAST_USERS, MOST_USERS = 16, 4096


def contexts_of(setup: Setup) -> list[int]:
    """Contexts doubling from 1k to the model's own limit (at most 1M) or a stated one, and the report's."""
    asked = setup.context_tokens
    end = setup.request.max_model_len_tokens or max(
        min(setup.model.max_context_tokens or asked, LARGEST_CONTEXT), setup.max_model_len_tokens, 4096
    )
    return sorted({*_doubling(min(SMALLEST_CONTEXT, asked), end), asked})


def users_of(setup: Setup, formats: Sequence[Format], measured: Sequence[int]) -> list[int]:
    """Numbers of users doubling from 1 to what any format holds, and those asked for, held or measured."""
    held = [fmt.row.max_batch_at_context or 0 for fmt in formats if fmt.plan is not None]
    asked = setup.request.batch_size or 1
    top = min(max(asked, LEAST_USERS, *held), MOST_USERS)
    chosen = [fmt.row.max_batch_at_context or 0 for fmt in formats if fmt.is_chosen and fmt.plan is not None]
    return sorted({*_doubling(1, top), asked, *(count for count in (*chosen, *measured) if count >= 1)})


def _doubling(first: int, last: int) -> list[int]:
    found = [first]
    while found[-1] < last:
        found.append(min(found[-1] * 2, last))
    return found


def what_if(question: Question, setup: Setup, formats: Sequence[Format], available_bytes: int,
            axes: tuple[list[int], list[int]]) -> WhatIf:  # fmt: skip
    """The formats that the engine takes, over (users, contexts)."""
    users, contexts = axes
    share = question.output_tokens / (question.input_tokens + question.output_tokens)
    request = setup.request
    return WhatIf(
        users=users,
        contexts_tokens=contexts,
        output_share=share,
        kv_cache_bytes=max(available_bytes, 0),
        num_gpus=request.tp_size * request.pp_size * request.dp_size,
        num_replicas=setup.num_replicas,
        surfaces=[_surface(fmt, setup, available_bytes, users, contexts, share) for fmt in formats if fmt.plan],
    )


def _surface(fmt: Format, setup: Setup, available: int, users: list[int], contexts: list[int], share: float) -> Surface:
    plan, line = fmt.plan, fmt.line
    assert plan is not None
    replicas = setup.num_replicas
    each = [ceil_div(count, replicas) for count in users]
    limits = [longest_held(setup, plan, available, n) for n in each]
    held = [most_held(setup, plan, available, context) * replicas for context in contexts]
    needed = [plan.bytes_per_request(context) for context in contexts]
    common = {
        "kv_cache_dtype": fmt.name,
        "max_users": held,
        "bytes_per_request": needed,
        "limit_context_tokens": limits,
    }
    if line is None:
        return Surface.model_validate(common)
    steps = plan_points(line.served, [Point(context_tokens=c, batch_size=u) for u in users for c in contexts])
    loads = plan_points(line.served, [load_point(c, share, u) for u in users for c in contexts])
    ends = iter(plan_points(line.served, [Point(context_tokens=limit, batch_size=count)
                                          for limit, count in zip(limits, users, strict=True) if limit]))  # fmt: skip
    at_limit = [next(ends) if limit else None for limit in limits]

    def rows(values: list[float]) -> list[list[float]]:
        width = len(contexts)
        return [values[start : start + width] for start in range(0, len(values), width)]

    times = {
        "itl_s": rows([step.itl_s for step in steps]),
        "itl_low_s": rows([step.interval_s[0] for step in steps]),
        "itl_high_s": rows([step.interval_s[1] for step in steps]),
        "tpot_s": rows([_load(load, "tpot_s") for load in loads]),
        "ttft_s": rows([_load(load, "ttft_s") for load in loads]),
        "limit_itl_s": [None if end is None else end.itl_s for end in at_limit],
        "limit_low_s": [None if end is None else end.interval_s[0] for end in at_limit],
        "limit_high_s": [None if end is None else end.interval_s[1] for end in at_limit],
    }
    return Surface.model_validate(common | times)


def load_point(context_tokens: int, output_share: float, users: int) -> Point:
    """A closed loop of users whose prompt and answer fill the context."""
    answer = max(1, round(context_tokens * output_share))
    return Point(input_tokens=max(1, context_tokens - answer), output_tokens=answer, concurrency=users)


def _load(plan: ItlPlan, name: str) -> float:
    assert plan.load is not None
    value: float = getattr(plan.load, name)
    return value
