"""One line of ITL over context, and the sentence that matters about it: slope ratio, break-even, where KV ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvplan.errors import KvplanError
from kvplan.latency.plan import ItlPlan
from kvplan.latency.planner import parameters_of, plan_points
from kvplan.latency.request import Point, check_length, make_itl_request
from kvplan.latency.serve import serve
from kvplan.latency.served import Served
from kvplan.latency.step import step_times
from kvplan.memory.limits import longest_held
from kvplan.memory.request import Source
from kvplan.traffic import Floats
from kvplan.units import ceil_div

BREAK_EVEN_GAIN = 0.02
"""Share of ITL a format must save to be worth anything."""

SEARCH_LIMIT_TOKENS = 2**30
SEARCH_POINTS = 200


@dataclass(frozen=True)
class ItlLine:
    """ITL of one deployment and batch over contexts.

    Attributes:
        intercept_s, slope_s_per_token: of the last point, where windows are full.
        is_piecewise: whether the slope differs between the points.
        slope_ratio: slope over that of 16-bit KV; None for 16-bit lines, or when 16 bits cannot be planned.
        slope_ratio_source, slope_ratio_detail: ``calibrated`` or ``assumed``, and from what.
        break_even_tokens: batch × context below which the format saves less than 2% of ITL; None when it never does.
        max_context_tokens: the longest context whose KV the batch holds at once; None when not even one token,
            when a stated ``max_num_seqs`` is less than the batch, or when memory is unknown.

    """

    label: str
    plans: tuple[ItlPlan, ...]
    intercept_s: float
    slope_s_per_token: float
    is_piecewise: bool
    slope_ratio: float | None
    slope_ratio_source: Source | None
    slope_ratio_detail: str
    break_even_tokens: int | None
    max_context_tokens: int | None
    memory_known: bool
    served: Served

    def as_dict(self) -> dict[str, Any]:
        """JSON form: the summary and its points."""
        facts = self.plans[0].facts
        return {
            "label": self.label,
            "request": {**facts.request, "batch_size": self.plans[0].point.batch_size},
            "intercept_s": self.intercept_s,
            "slope_s_per_token": self.slope_s_per_token,
            "is_piecewise": self.is_piecewise,
            "slope_ratio": self.slope_ratio,
            "slope_ratio_source": self.slope_ratio_source,
            "slope_ratio_detail": self.slope_ratio_detail,
            "break_even_tokens": self.break_even_tokens,
            "break_even_gain": BREAK_EVEN_GAIN,
            "max_context_tokens": self.max_context_tokens,
            "points": [plan.as_dict() for plan in self.plans],
        }


def make_line(label: str, options: dict[str, Any], contexts: Sequence[int], batch_size: int) -> ItlLine:
    """The line of a deployment over ``contexts``, ascending.

    Raises:
        KvplanError: the request cannot be understood, or the engine refuses it.

    """
    check_length(options, contexts[-1])
    served = serve(make_itl_request(options))
    plans = plan_points(served, [Point(context_tokens=c, batch_size=batch_size) for c in contexts])
    slopes = [plan.slope_s_per_token for plan in plans]
    ratio, source, detail, break_even = _against_16_bits(served, options, batch_size, contexts[-1])
    return ItlLine(
        label=label,
        plans=tuple(plans),
        intercept_s=plans[-1].intercept_s,
        slope_s_per_token=slopes[-1],
        is_piecewise=max(slopes) > min(slopes) * (1 + 1e-9),
        slope_ratio=ratio,
        slope_ratio_source=source,
        slope_ratio_detail=detail,
        break_even_tokens=break_even,
        max_context_tokens=_max_context(served, batch_size, contexts[-1]),
        memory_known=served.available_bytes is not None,
        served=served,
    )


def _max_context(served: Served, batch_size: int, asked_tokens: int) -> int | None:
    if served.available_bytes is None:
        return None
    each = ceil_div(batch_size, served.num_ranks)
    return longest_held(served.setup, served.plan, served.available_bytes, each, asked_tokens)


def _against_16_bits(served: Served, options: dict[str, Any], batch_size: int, context: int
                     ) -> tuple[float | None, Source | None, str, int | None]:  # fmt: skip
    """(slope ratio, source, detail, break-even) against the model's own 16 bits."""
    if served.kv_speed.source == "exact":
        return None, None, "", None
    try:
        half = serve(make_itl_request({**options, "kv_cache_dtype": served.model.dtype}))
    except KvplanError as error:
        return None, None, f"16-bit KV cannot be planned here: {error.message}", None
    last = np.array([float(context)])
    rank = served.batch_per_rank(np.array([float(batch_size)]))
    mine, theirs = float(served.kv_slope_s(rank, last)[0]), float(half.kv_slope_s(rank, last)[0])
    ratio = mine / theirs if theirs else None
    return ratio, served.kv_speed.source, served.kv_speed.detail, _break_even(served, half, batch_size)


def _break_even(served: Served, half: Served, batch_size: int) -> int | None:
    """Tokens in flight (batch × context) at which the format starts to save 2% of the 16-bit ITL, at this batch."""
    rank = served.batch_per_rank(np.array([float(batch_size)]))
    parameters = parameters_of(half)

    def gain(context: Floats) -> Floats:
        slow = step_times(parameters, half.step_features(rank, context)).total_s
        fast = step_times(parameters, served.step_features(rank, context)).total_s
        return np.asarray(1 - fast / slow)

    contexts = np.geomspace(1, SEARCH_LIMIT_TOKENS, SEARCH_POINTS)
    for _ in range(2):
        enough = np.flatnonzero(gain(contexts) >= BREAK_EVEN_GAIN)
        if not len(enough):
            return None
        first = int(enough[0])
        contexts = np.linspace(contexts[max(first - 1, 0)], contexts[first], SEARCH_POINTS)
    return round(float(contexts[np.flatnonzero(gain(contexts) >= BREAK_EVEN_GAIN)[0]]) * batch_size)


def with_detail(line: ItlLine) -> ItlPlan:
    """The only point of a line, with traffic and the line's summary beside it."""
    plan = line.plans[0]
    summary = line.as_dict()
    keys = ("is_piecewise", "slope_ratio", "slope_ratio_source", "slope_ratio_detail", "break_even_tokens",
            "break_even_gain", "max_context_tokens")  # fmt: skip
    return plan._replace(detail={"traffic": traffic_of(line.served, plan), **{key: summary[key] for key in keys}})


def traffic_of(served: Served, plan: ItlPlan) -> dict[str, Any]:
    """Bytes and FLOPs of one step on one GPU, by part; stored and read KV apart."""
    traffic, deployment = served.traffic, served.deployment
    if plan.load is not None:
        per_rank = plan.load.running_requests / deployment.attention_dp_size / deployment.num_replicas
    else:
        per_rank = float(served.batch_per_rank(float(plan.point.batch_size or 1)))
    context = int(plan.context_tokens)
    tokens = max(per_rank / deployment.pp_size, 1.0) * deployment.attention_dp_size
    evenness = math.exp(parameters_of(served)["routing_evenness"])
    share = float(traffic.expert_share_read(tokens, evenness))
    weights = {
        name: int(part.resident_bytes * (share if name == "expert" else 1)) for name, part in traffic.weights.items()
    }
    matrix = sum(traffic.matrix_flops_per_token(name) for name in traffic.weights) * tokens / deployment.tp_group_size
    kv = [
        {
            "kind": part.kind, "num_layers": part.num_layers,
            "read_bytes": int(part.read_bytes_in_blocks(context) * per_rank),
            "scale_bytes_per_token": part.scale_bytes_per_state * part.num_layers / part.tokens_per_state,
            "limit_tokens": None if part.limit_states is None else part.limit_states * part.tokens_per_state,
        }
        for part in traffic.kv
    ]  # fmt: skip
    return {
        "weights_read_bytes": weights,
        "expert_share_read": share if traffic.num_experts else None,
        "expert_share_uniform": float(traffic.expert_share_read(tokens)) if traffic.num_experts else None,
        "kv_read_bytes": sum(int(str(part["read_bytes"])) for part in kv),
        "kv_stored_bytes": int(served.plan.bytes_per_request(context) * per_rank),
        "kv_layers": kv,
        "activation_bytes": int(np.asarray(traffic.activation_bytes(per_rank))),
        "matrix_flops": matrix,
        "attention_flops": float(np.asarray(traffic.kv_flops(float(context)))) * per_rank,
        "collectives": _collectives(served, per_rank),
    }


def _collectives(served: Served, per_rank: float) -> dict[str, Any]:
    traffic, deployment = served.traffic, served.deployment
    spread = deployment.attention_dp_size > 1 and deployment.expert_parallel_size > 1
    return {
        "all_reduce_count": 0 if spread else traffic.num_collectives,
        "all_to_all_count": traffic.num_collectives if spread else 0,
        "p2p_count": deployment.pp_size - 1,
        "message_bytes": int(np.asarray(traffic.message_bytes(per_rank))) if deployment.num_gpus > 1 else 0,
    }
