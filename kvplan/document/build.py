"""From a question to a report: plans first, then everything that is said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import kvplan
from kvplan.document import words
from kvplan.document.launch import launches_of
from kvplan.document.measured import Run, measured_of, rank_shape, read_run, slope_ratios
from kvplan.document.memory import segments_of, waste_of
from kvplan.document.parts import Advice, Answers, Deployment, Interval, Latency, LatencyBasis
from kvplan.document.precisions import Format, formats_of, kernel_ratios, precisions_of, small_format
from kvplan.document.provenance import audit_of, fingerprints_of
from kvplan.document.question import Question, make_question, with_lengths
from kvplan.document.schema import Report
from kvplan.document.surfaces import contexts_of, users_of, what_if
from kvplan.dtypes import AUTO, canonical_kv_dtype, kv_format
from kvplan.errors import InputError, KvplanError, UnsupportedError
from kvplan.latency.kv import attention_calibration
from kvplan.latency.plan import ItlPlan
from kvplan.latency.planner import plan_points
from kvplan.latency.request import Point
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.explain import explained
from kvplan.memory.ledger import waste_ledger
from kvplan.memory.plan import SizePlan
from kvplan.memory.setup import Setup, cache_plan, set_up
from kvplan.search import size


def build(options: Mapping[str, Any]) -> Report:
    """The report on one deployment.

    Args:
        options: fields of ``SizeRequest`` and of ``Question``, or their short names.

    Raises:
        KvplanError: the question cannot be understood, the engine refuses the deployment, or a file cannot be read.

    """
    question, plan = _planned(make_question(options))
    setup = set_up(question.size)
    question = with_lengths(question, setup.context_tokens)
    cache = cache_plan(setup)
    available = plan.memory.kv_cache_bytes
    if available is None:
        raise InputError(f"the memory of {setup.request.gpu or 'this GPU'} is unknown", hint="add --gpu-memory 80GiB")
    gpu = setup.gpu.name if setup.gpu is not None else ""
    if question.calibration is not None:  # an unusable file is an error, not a precision without times
        attention_calibration(gpu, setup.engine.name, question.calibration)
    room = max(available, 0)
    run = None if question.measured is None else read_run(question.measured, gpu)
    formats = formats_of(question, setup, cache, room, contexts_of(setup))
    return _report(question, plan, setup, cache, formats, run)


def _planned(question: Question) -> tuple[Question, SizePlan]:
    """The plan; where the engine refuses the KV format, that of the model's default, and the question says so.

    Raises:
        KvplanError: the request cannot be planned with any KV format.

    """
    try:
        return question, size(question.size)
    except UnsupportedError as error:
        asked = canonical_kv_dtype(question.size.kv_cache_dtype)
        fallback = replace(question.size, kv_cache_dtype=AUTO)
        try:
            plan = size(fallback)
        except KvplanError:
            raise error from None
        return replace(question, size=fallback, refused=asked, refusal=error.message), plan


def _report(question: Question, plan: SizePlan, setup: Setup, cache: CachePlan, formats: list[Format], run: Run | None
            ) -> Report:  # fmt: skip
    room = max(plan.memory.kv_cache_bytes or 0, 0)
    chosen = next((fmt for fmt in formats if fmt.is_chosen), None)
    line = None if chosen is None else chosen.line
    ratios = {} if run is None else slope_ratios(run, None if line is None else rank_shape(line.served))
    precisions = precisions_of(formats, ratios)
    deployment = _deployment(question, plan, setup, cache, line.plans[0] if line is not None else None)
    answers = _answers(question, plan, setup, deployment, chosen)
    said = words.answer_sentences(deployment, answers)
    if question.refused is not None:
        said.insert(0, words.instead_of(question.refused, deployment, bool(plan.fits), answers))
    answers = answers.model_copy(update={"sentences": said})
    kernels = kernel_ratios(setup)
    measured = None if run is None else measured_of(run, formats)
    counts = [] if measured is None else sorted({point.num_users for point in measured.points})
    axes = (users_of(setup, formats, counts), contexts_of(setup))
    small = small_format(precisions)
    base = next((p for p in precisions if p.forbidden is None and kv_format(p.kv_cache_dtype).key_bits == 16), None)
    segments = segments_of(plan, _ledger(cache, plan, setup, room))
    limit = _users_per_replica(plan, setup)
    return Report(
        kvplan_version=kvplan.__version__,
        date=question.date,
        name=question.name or deployment.model,
        inputs={key: _scalar(value) for key, value in question.inputs.items()},
        deployment=deployment,
        answers=answers,
        precisions=precisions,
        fp8_sentences=words.fp8_sentences(
            small, base, [p for p in precisions if p.forbidden], kernels, setup.engine.name
        ),
        kernels=kernels,
        memory=segments,
        waste=waste_of(setup, cache, plan, segments),
        launch=launches_of(setup, cache.version, deployment.kv_cache_dtype, limit, fits=bool(plan.fits)),
        what_if=what_if(question, setup, formats, room, axes),
        measured=measured,
        advice=[Advice(code=item.code, message=item.message) for item in plan.advice],
        notes=[
            *(plan.model.notes if plan.model is not None else ()),
            *(() if line is None else line.plans[0].facts.notes),
        ],
        audit=audit_of(explained(plan), setup, answers, precisions, formats),
        fingerprints=fingerprints_of(question, setup, has_times=line is not None),
    )


def _scalar(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else ",".join(map(str, value))


def _ledger(cache: CachePlan, plan: SizePlan, setup: Setup, room: int) -> dict[str, int]:
    """The ledger at the users asked for (one, when no number was), or at as many as fit."""
    if room <= 0:
        return {}
    held = min(cache.max_batch(room, setup.context_tokens), setup.batch_per_replica)
    return waste_ledger(cache, room, setup.context_tokens, held).lines


def _users_per_replica(plan: SizePlan, setup: Setup) -> int | None:
    return setup.batch_per_replica if plan.fits and setup.request.batch_size is not None else None


def _deployment(
    question: Question, plan: SizePlan, setup: Setup, cache: CachePlan, point: ItlPlan | None
) -> Deployment:
    facts, gpu = plan.model, setup.gpu
    assert facts is not None and gpu is not None
    request = setup.request
    sizes = (("TP", request.tp_size), ("PP", request.pp_size), ("DP", request.dp_size), ("DCP", request.dcp_size))
    layout = ", ".join([*(f"{name} {count}" for name, count in sizes if count > 1), *(["EP"] if request.ep else [])])
    return Deployment(
        model=facts.name,
        architecture=facts.architecture,
        num_parameters=facts.num_parameters,
        weight_format=point.facts.request["weight_dtype"] if point is not None else facts.weight_format,
        gpu=gpu.name,
        gpu_name=gpu.display_name,
        num_gpus=plan.answers.num_gpus,
        layout=layout or "TP 1",
        engine=setup.engine.name,
        engine_version=cache.version,
        rules="exact" if cache.exact else "approximation",
        kv_cache_dtype=cache.kv_cache_dtype,
        context_tokens=setup.context_tokens,
        num_users=request.batch_size,
        input_tokens=question.input_tokens,
        output_tokens=question.output_tokens,
        lengths_given=question.lengths_given,
    )


def _answers(
    question: Question, plan: SizePlan, setup: Setup, deployment: Deployment, chosen: Format | None
) -> Answers:
    answers, memory = plan.answers, plan.memory
    kv = memory.kv_cache_bytes or 0
    held = answers.max_batch_at_context or 0
    short = answers.kv_short_bytes_per_gpu or 0
    reserved = kv - answers.kv_needed_bytes_per_gpu
    line = None if chosen is None else chosen.line
    now = limit = None
    if line is not None:
        users = deployment.num_users or 1
        if plan.fits:
            now = _latency("now", question, setup, line.served, users)
        if held > 0:
            limit = _latency("limit", question, setup, line.served, held)
    problem = chosen.problem if chosen is not None else None
    point = None if line is None else line.plans[0]
    return Answers(
        fits=bool(plan.fits) and question.refused is None,
        headline=words.headline(deployment, bool(plan.fits), held, kv)
        if question.refusal is None
        else f"No: {question.refusal}.",
        sentences=[],
        max_users=held,
        max_context_tokens=answers.max_context_at_batch_tokens,
        kv_cache_bytes=memory.kv_cache_bytes,
        kv_needed_bytes=answers.kv_needed_bytes_per_gpu,
        kv_headroom_bytes=-short if short else reserved,
        now=now,
        limit=limit,
        basis=LatencyBasis(
            source=None if point is None else point.source,
            detail="" if point is None else point.facts.source_detail,
            interval_note="" if point is None else point.interval_note,
            problem=problem,
        ),
    )


def _latency(label: str, question: Question, setup: Setup, served: Any, users: int) -> Latency:
    points: Sequence[Point] = (
        Point(context_tokens=setup.context_tokens, batch_size=users),
        Point(input_tokens=question.input_tokens, output_tokens=question.output_tokens, concurrency=users),
    )
    step, load = plan_points(served, points)
    assert load.load is not None
    return Latency(
        label=label,
        num_users=users,
        context_tokens=setup.context_tokens,
        itl=_interval(step.itl_s, step.interval_s),
        tpot=_interval(load.load.tpot_s, load.load.tpot_interval_s),
        ttft=_interval(load.load.ttft_s, load.load.ttft_interval_s),
        tokens_per_s_per_user=load.tokens_per_s_per_user,
        tokens_per_s_per_gpu=load.tokens_per_s_per_gpu,
    )


def _interval(value: float, bounds: tuple[float, float]) -> Interval:
    return Interval(value_s=value, low_s=bounds[0], high_s=bounds[1])
