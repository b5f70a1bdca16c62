"""From a question to a report: plans first, then everything that is said about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kvplan
from kvplan.document import words
from kvplan.document.answers import answers_of, deployment_of
from kvplan.document.launch import launches_of
from kvplan.document.measured import measured_of, rank_shape, slope_ratios
from kvplan.document.memory import segments_of, waste_of
from kvplan.document.parts import Advice
from kvplan.document.plans import Plans, make_plans
from kvplan.document.precisions import kernel_ratios, precisions_of, small_format
from kvplan.document.provenance import audit_of, fingerprints_of
from kvplan.document.schema import Report
from kvplan.document.surfaces import contexts_of, users_of, what_if
from kvplan.dtypes import AUTO, canonical_kv_dtype, kv_format
from kvplan.latency.kv import assumed_kv_dtype


def build(options: Mapping[str, Any]) -> Report:
    """The report on one deployment.

    Args:
        options: fields of ``SizeRequest`` and of ``Question``, or their short names.

    Raises:
        KvplanError: the question cannot be understood, the engine refuses the deployment, or a file cannot be read.

    """
    plans = make_plans(options)
    question, setup, sized = plans.question, plans.setup, plans.size
    shape = None if plans.line is None else rank_shape(plans.line.served)
    precisions = precisions_of(plans.formats, {} if plans.run is None else slope_ratios(plans.run, shape))
    possible = [p for p in precisions if p.forbidden is None]
    base = next((p for p in possible if kv_format(p.kv_cache_dtype).key_bits == 16), None)
    refused = [p for p in precisions if p.forbidden is not None]
    kernels = kernel_ratios(setup)
    deployment = deployment_of(plans)
    answers = answers_of(plans, deployment)
    segments = segments_of(plans)
    measured = None if plans.run is None else measured_of(plans.run, plans.formats)
    shown_too = [] if measured is None else [point.num_users for point in measured.points]
    axes = (users_of(setup, plans.formats, shown_too), contexts_of(setup))
    return Report(
        kvplan_version=kvplan.__version__,
        date=question.date,
        name=question.name or deployment.model,
        inputs={key: _scalar(value) for key, value in question.inputs.items()},
        deployment=deployment,
        answers=answers,
        precisions=precisions,
        fp8_sentences=words.fp8_sentences(small_format(precisions), base, refused, kernels, setup.engine.name),
        kernels=kernels,
        memory=segments,
        waste=waste_of(plans, segments),
        launch=launches_of(setup, plans.cache, fits=bool(sized.verdict)),
        what_if=what_if(question, setup, plans.formats, plans.room_bytes, axes),
        measured=measured,
        advice=[Advice(code=item.code, message=item.message) for item in sized.advice],
        notes=_notes(plans),
        audit=audit_of(plans, answers, precisions),
        fingerprints=fingerprints_of(plans),
    )


def _scalar(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else ",".join(map(str, value))


def _notes(plans: Plans) -> list[str]:
    """What was read into the model and the request, less what is advice already."""
    model = plans.size.model.notes if plans.size.model is not None else ()
    line, advice = plans.line, {item.message for item in plans.size.advice}
    if line is None:
        return list(model)
    notes = [*model, *(note for note in line.plans[0].facts.notes if note not in advice)]
    if canonical_kv_dtype(plans.question.size.kv_cache_dtype) == AUTO and plans.question.refused is None:
        served = line.served
        assumed, _ = assumed_kv_dtype(served.model, served.gpu, served.traits.engine, served.traits.precision,
                                      plans.question.size.weight_dtype)  # fmt: skip
        if assumed not in (AUTO, plans.cache.kv_cache_dtype):
            notes.append(
                f"times are of {plans.cache.kv_cache_dtype} KV, the engine's default; `kvplan itl` takes {assumed} for "
                f"this deployment unless told: --kv-cache-dtype {assumed} reports on that"
            )
    return notes
