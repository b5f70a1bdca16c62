"""The part of a report that is signed: what is served, whether it fits, how many users, how fast."""

from __future__ import annotations

from kvplan.document import words
from kvplan.document.parts import Answers, Deployment, Interval, Latency, LatencyBasis
from kvplan.document.plans import Plans
from kvplan.latency.planner import plan_points
from kvplan.latency.request import Point
from kvplan.latency.served import Served


def deployment_of(plans: Plans) -> Deployment:
    """What is served, on what, and for whom."""
    facts, request, question = plans.size.model, plans.setup.request, plans.question
    assert facts is not None
    return Deployment(
        model=facts.name,
        architecture=facts.architecture,
        num_parameters=facts.num_parameters,
        weight_format=facts.weight_format,
        gpu=plans.gpu.name,
        gpu_name=plans.gpu.display_name,
        num_gpus=plans.size.answers.num_gpus,
        layout=plans.size.request.layout or "TP 1",
        engine=plans.setup.engine.name,
        engine_version=plans.cache.version,
        rules="exact" if plans.cache.exact else "approximation",
        kv_cache_dtype=plans.cache.kv_cache_dtype,
        context_tokens=plans.setup.context_tokens,
        num_users=request.batch_size,
        input_tokens=question.input_tokens,
        output_tokens=question.output_tokens,
        lengths_given=question.lengths_given,
    )


def answers_of(plans: Plans, deployment: Deployment) -> Answers:
    """The answer in numbers and in sentences."""
    sized, kv_bytes = plans.size.answers, plans.size.memory.kv_cache_bytes or 0
    fits, refusal, excess = bool(plans.size.verdict), plans.question.refusal, plans.size.memory.excess_bytes
    short = excess or sized.kv_short_bytes_per_gpu or 0
    line, now, limit = plans.line, None, None
    if line is not None:
        now = _latency("now", plans, line.served, deployment.num_users or 1) if fits else None
        limit = _latency("limit", plans, line.served, plans.served) if plans.served else None
    if excess:
        headline = words.beyond_gpu(deployment, kv_bytes, excess)
    elif sized.num_waiting and not short:
        headline = words.not_at_once(deployment, plans.served, plans.held)
    else:
        told = sized.max_running_source == "given"
        runs = words.running_limit(deployment, plans.served, plans.held, sized.max_running, told)
        headline = words.headline(deployment, fits, plans.served, kv_bytes, plans.size.too_long_tokens, runs)
    answers = Answers(
        fits=fits and refusal is None,
        headline=headline if refusal is None else f"No: {refusal}.",
        sentences=[],
        max_users=plans.served,
        max_context_tokens=None if excess else sized.max_context_at_batch_tokens,
        kv_cache_bytes=kv_bytes,
        kv_needed_bytes=sized.kv_needed_bytes_per_gpu,
        kv_headroom_bytes=-short if short else kv_bytes - sized.kv_needed_bytes_per_gpu,
        now=now,
        limit=limit,
        basis=_basis(plans),
    )
    said = [] if excess else words.answer_sentences(deployment, answers, plans.held)
    if plans.question.refused is not None:
        said.insert(0, words.instead_of(plans.question.refused, deployment, headline))
    return answers.model_copy(update={"sentences": said})


def _basis(plans: Plans) -> LatencyBasis:
    if plans.line is None:
        return LatencyBasis(source=None, detail="", interval_note="", problem=plans.chosen.problem)
    point = plans.line.plans[0]
    return LatencyBasis(source=point.source, detail=point.facts.source_detail, interval_note=point.interval_note,
                        problem=None)  # fmt: skip


def _latency(label: str, plans: Plans, served: Served, users: int) -> Latency:
    """One decode step at the full context, and a closed loop with the report's prompts and answers."""
    question, context = plans.question, plans.setup.context_tokens
    step, load = plan_points(served, [
        Point(context_tokens=context, batch_size=users),
        Point(input_tokens=question.input_tokens, output_tokens=question.output_tokens, concurrency=users),
    ])  # fmt: skip
    assert load.load is not None
    return Latency(
        label=label,
        num_users=users,
        context_tokens=context,
        itl=_interval(step.itl_s, step.interval_s),
        tpot=_interval(load.load.tpot_s, load.load.tpot_interval_s),
        ttft=_interval(load.load.ttft_s, load.load.ttft_interval_s),
        tokens_per_s_per_user=load.tokens_per_s_per_user,
        tokens_per_s_per_gpu=load.tokens_per_s_per_gpu,
    )


def _interval(value: float, bounds: tuple[float, float]) -> Interval:
    return Interval(value_s=value, low_s=bounds[0], high_s=bounds[1])
