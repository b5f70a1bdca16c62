"""From latency requests to plans, many at once: cases of one deployment are one set of array operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvplan.errors import InputError, KvplanError, shorten
from kvplan.latency.intervals import Interval, point_intervals
from kvplan.latency.kv import attention_calibration, is_latent
from kvplan.latency.latent import LATENT_ELEMENTS, latent_calibration
from kvplan.latency.load import load_state
from kvplan.latency.parameters import serving_calibration
from kvplan.latency.plan import Breakdown, DeploymentFacts, ItlPlan, Load
from kvplan.latency.request import ALL_FIELDS, POINT_NAMES, Point, make_itl_request, make_point
from kvplan.latency.serve import serve
from kvplan.latency.served import Served
from kvplan.latency.step import StepTimes, load_times, log_share_of, slope_s_per_token, step_times
from kvplan.memory.request import unknown_field
from kvplan.model_config.types import AttentionCache
from kvplan.roofline import step_bound_s
from kvplan.traffic import Floats

if TYPE_CHECKING:
    from kvplan.calibration.attention import AttentionCalibration
    from kvplan.calibration.latent import LatentCalibration

_POINTS = frozenset(POINT_NAMES)
SLOPE_BATCH = 64.0
SLOPE_CONTEXTS = (32_768.0, 65_536.0)


def plan_one(options: Mapping[str, Any]) -> ItlPlan:
    """The plan of one request.

    Raises:
        KvplanError: the request cannot be understood, or the engine refuses it.

    """
    served = serve(make_itl_request(options))
    return plan_points(served, [make_point(options)])[0]


def plan_cases(cases: Iterable[Mapping[str, Any]]) -> list[ItlPlan | KvplanError]:
    """A plan for each case, in order; a case that cannot be planned has its error in its place."""
    answers: list[ItlPlan | KvplanError | None] = []
    groups: dict[Any, tuple[dict[str, Any], list[int], list[Point]]] = {}
    for number, case in enumerate(cases):
        answers.append(None)
        try:
            if not isinstance(case, Mapping):
                raise InputError(
                    f"a case must be an object of request fields, not {shorten(case, 40)}",
                    hint='like {"model": "70b", "gpu": "h200", "context_tokens": 32768, "batch_size": 16}',
                )
            point = make_point(case)
            key = tuple([(name, type(value), value) for name, value in case.items() if name not in _POINTS])
            group = groups.get(key)
        except KvplanError as error:
            stray = [name for name in case if name not in ALL_FIELDS] if isinstance(case, Mapping) else []
            answers[number] = unknown_field(str(stray[0]), ALL_FIELDS) if stray else error
            continue
        except TypeError:
            answers[number] = InputError(
                "a request field holds a list or an object", hint="fields are text and numbers"
            )
            continue
        if group is None:
            group = groups[key] = ({k: v for k, v in case.items() if k not in _POINTS}, [], [])
        group[1].append(number)
        group[2].append(point)
    for fixed, numbers, points in groups.values():
        found: Sequence[ItlPlan | KvplanError]
        try:
            found = plan_points(serve(make_itl_request(fixed)), points)
        except KvplanError as error:
            found = [error] * len(points)
        for number, answer in zip(numbers, found, strict=True):
            answers[number] = answer
    return [answer for answer in answers if answer is not None]


def plan_points(served: Served, points: Sequence[Point]) -> list[ItlPlan]:
    """Plans of many points of one deployment, in order."""
    steps = [i for i, point in enumerate(points) if not point.is_load]
    loads = [i for i, point in enumerate(points) if point.is_load]
    found: list[ItlPlan | None] = [None] * len(points)
    parameters = parameters_of(served)
    facts = facts_of(served)
    for numbers, plan in ((steps, _plan_steps), (loads, _plan_loads)):
        if numbers:
            planned = plan(served, facts, parameters, [points[i] for i in numbers])
            for number, answer in zip(numbers, planned, strict=True):
                found[number] = answer
    return [answer for answer in found if answer is not None]


def parameters_of(served: Served) -> dict[str, float]:
    """The parameters of a deployment; where no serving measurement covers GPU and engine but a kernel calibration does,
    or a calibration was given, KV streams at what the kernel reaches.
    """
    parameters = serving_calibration().parameters(served.traits)
    reached = kernel_kv_stream(served) if _kv_is_the_kernels(served) else None
    if reached is not None:
        parameters["kv_stream"] = log_share_of(reached)
    return parameters


def _kv_is_the_kernels(served: Served) -> bool:
    """Whether KV streams at what the kernel reaches, where one is calibrated, not at what serving showed."""
    here = f"{served.traits.gpu}|{served.traits.engine}"
    return served.request.calibration is not None or here not in serving_calibration().gpu_engines


def kernel_kv_stream(served: Served) -> float | None:
    """Share of peak bandwidth the calibrated attention kernel reads this model's 16-bit KV at; None without one.

    Of latent attention only a calibration that was given says it, of the fewest heads its kernel multiplies with.
    """
    if is_latent(served.model):
        return _latent_kv_stream(served)
    calibration = attention_calibration(served.gpu.name, served.setup.engine.name, served.request.calibration)
    if calibration is None:
        return None
    shapes = [c for layer in served.model.layers for c in layer.caches if isinstance(c, AttentionCache)]
    if not shapes:
        return None
    shape = next((c for c in shapes if c.kind == "full"), shapes[0])
    tp = served.deployment.attention_tp_size
    kv_heads, q_heads = max(1, shape.num_kv_heads // tp), max(1, shape.num_q_heads // tp)
    times = calibration.latency_s(SLOPE_BATCH, np.array(SLOPE_CONTEXTS), max(q_heads, kv_heads), kv_heads,
                                  shape.head_dim, shape.head_dim_v, 0, "bf16")  # fmt: skip
    slope = float(times[1] - times[0]) / (SLOPE_CONTEXTS[1] - SLOPE_CONTEXTS[0])
    moved = SLOPE_BATCH * kv_heads * (shape.head_dim + shape.head_dim_v) * 2
    return min(moved / slope / served.peaks.bandwidth_bytes_per_s, 1.0) if slope > 0 else None


def _latent_kv_stream(served: Served) -> float | None:
    given, row = _given_latent(served), 2 * LATENT_ELEMENTS
    slope = None if given is None else given.slope_s("bfloat16", 1, row)
    return None if slope is None else min(row / slope / served.peaks.bandwidth_bytes_per_s, 1.0)


def _given_latent(served: Served) -> LatentCalibration | None:
    """The calibration of latent attention that was given."""
    heads, path = served.latent_heads, served.request.calibration
    if heads is None or path is None:
        return None
    return latent_calibration(served.gpu.name, served.setup.engine.name, heads, path)


def collective_latency_s(served: Served) -> float:
    """Seconds of one collective of a step, the data it moves apart."""
    p = parameters_of(served)
    return float(np.exp(p["collective_s"] + p["residual"] - p["accepted"])) * served.collective_factor


def facts_of(served: Served) -> DeploymentFacts:
    """What every point of the deployment shares."""
    source, detail = serving_calibration().status(served.traits)
    dcp = served.plan.dcp_size
    kernel: AttentionCalibration | LatentCalibration | None = _given_latent(served)
    if not is_latent(served.model) and _kv_is_the_kernels(served):
        kernel = attention_calibration(served.gpu.name, served.setup.engine.name, served.request.calibration)
    detail += "" if kernel is None else f"; KV as {kernel.source}"
    return DeploymentFacts(
        request=served.request.as_dict(),
        num_gpus=served.deployment.num_gpus,
        describe=", ".join([served.deployment.describe(), *([f"DCP {dcp}"] if dcp > 1 else [])]),
        source=source,
        source_detail=detail,
        notes=served.notes,
        claimed_context_tokens=served.model.max_context_tokens,
    )


def _bound_s(served: Served, parameters: dict[str, float], per_rank: Floats, context: Floats) -> Floats:
    evenness = float(np.exp(parameters["routing_evenness"]))
    return np.asarray(step_bound_s(served.traffic, served.peaks, per_rank, context, evenness))


def _column(points: Sequence[Point], name: str) -> Floats:
    return np.array([getattr(point, name) for point in points], dtype=float)


def _plan_steps(served: Served, facts: DeploymentFacts, parameters: dict[str, float], points: Sequence[Point]
                ) -> list[ItlPlan]:  # fmt: skip
    context, batch = _column(points, "context_tokens"), _column(points, "batch_size")
    per_rank = served.batch_per_rank(batch)
    times = step_times(parameters, served.step_features(per_rank, context))
    slope = np.asarray(slope_s_per_token(parameters, served.kv_slope_s(per_rank, context)))
    capacity = served.max_batch(context, per_rank)
    limit = served.setup.most_at_once or np.inf
    fits = [None] * len(points) if capacity is None else ((batch <= capacity) & (per_rank <= limit)).tolist()
    bound = _bound_s(served, parameters, per_rank, context).tolist()
    interval = point_intervals(served, per_rank * served.deployment.attention_dp_size, context)
    return _assemble(facts, points, context, times, slope, bound, fits, interval)


def _plan_loads(served: Served, facts: DeploymentFacts, parameters: dict[str, float], points: Sequence[Point]
                ) -> list[ItlPlan]:  # fmt: skip
    inputs, outputs, clients = (_column(points, n) for n in ("input_tokens", "output_tokens", "concurrency"))
    spread = _column(points, "length_spread")
    step, load, context, running = load_state(served, inputs, outputs, clients, spread)
    times = load_times(parameters, step, load)
    slope = np.asarray(slope_s_per_token(parameters, served.kv_slope_s(running, context)))
    ranks = served.deployment.attention_dp_size * served.deployment.num_replicas
    bound = _bound_s(served, parameters, running, context).tolist()
    interval = point_intervals(served, np.asarray(step.sequences), context)
    tpot, ttft, wait = (np.asarray(values) for values in (times.tpot_s, times.ttft_s, times.prefill_wait_s))
    mine = np.asarray(load.has_spread).astype(int), np.arange(len(points))
    t_low, t_high = interval.ttft_low[mine], interval.ttft_high[mine]
    share = clients / ranks
    waiting = [_wait(served, float(c), bool(w)) for c, w in zip(clients, running < share - 1e-9, strict=True)]
    columns = (
        tpot,
        tpot * interval.low,
        tpot * interval.high,
        ttft,
        ttft * t_low,
        ttft * t_high,
        wait,
        running * ranks,
    )
    loads = [
        Load(a, (b, c), d, (e, f), g, h, note)
        for (a, b, c, d, e, f, g, h), note in zip(
            zip(*(x.tolist() for x in columns), strict=True), waiting, strict=True
        )
    ]
    if not served.told and served.max_running is not None:  # a default is no "no": it can be set
        share = np.minimum(share, served.max_running)
    one = served.max_batch(inputs + outputs)
    fits = [None] * len(points) if one is None else ((running >= share - 1e-9) & (one >= 1)).tolist()
    return _assemble(facts, points, context, times.step, slope, bound, fits, interval, loads)


def _wait(served: Served, clients: float, waits: bool) -> str | None:
    """Why some clients wait for a slot, in words; None when none do."""
    if not waits:
        return None
    limit = served.scheduler_limit(clients)
    return f"{limit or 'KV is short'}: some clients wait for a slot, and TTFT leaves that wait out"


def _assemble(facts: DeploymentFacts, points: Sequence[Point], context: Floats, times: StepTimes, slope: Floats,
              bound: list[float], fits: Sequence[bool | None], interval: Interval, loads: list[Load] | None = None
              ) -> list[ItlPlan]:  # fmt: skip
    total = np.asarray(times.total_s)
    parts = np.broadcast_arrays(
        total, times.weights_s, times.kv_s, times.compute_s, times.collectives_s, times.overhead_s
    )
    breakdowns = [Breakdown(*row) for row in zip(*(part.tolist() for part in parts[1:]), strict=True)]
    columns = (context, total, total - slope * context, slope, total * interval.low, total * interval.high)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    no_loads: list[Load | None] = [None] * len(points)
    return [
        ItlPlan(facts, point, ctx, itl, intercept, per_token, breakdown, (low, high), note, floor, fit, load)
        for point, (ctx, itl, intercept, per_token, low, high), breakdown, note, floor, fit, load in zip(
            points, rows, breakdowns, interval.notes, bound, fits, loads or no_loads, strict=True
        )
    ]
