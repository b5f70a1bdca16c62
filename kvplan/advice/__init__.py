"""What to change, with what it wins. Every sentence carries a number that another plan computed."""

from __future__ import annotations

from collections.abc import Iterator

from kvplan.advice import fit, waste
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.plan import Advice, SizePlan
from kvplan.memory.setup import Setup
from kvplan.model_config.types import beyond_claim


def advise(setup: Setup, plan: CachePlan, answer: SizePlan) -> tuple[Advice, ...]:
    """Advice for a plan, most pressing first."""
    found: list[Advice] = []
    for source in (
        fit.does_not_fit,
        fit.scheduler,
        fit.budget,
        _unnamed_gpu,
        _beyond_model,
        _no_experts,
        _warnings,
        waste.replication,
        waste.formats,
        waste.hybrid_block,
        waste.in_flight,
        waste.pool_split,
        waste.declared,
    ):
        found += source(setup, plan, answer)
    return tuple(found)


def _unnamed_gpu(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    if setup.taken_for_granted is not None:
        yield Advice(code="unnamed_gpu", message=setup.taken_for_granted)


def _beyond_model(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    longest = max(setup.context_tokens, setup.max_model_len_tokens)
    message = beyond_claim(longest, setup.model.max_context_tokens)
    if message is not None:
        yield Advice(code="beyond_model_context", message=message)


def _no_experts(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    if setup.request.ep and not setup.model.is_moe:
        yield Advice(code="no_experts", message=f"{setup.model.name} has no experts: --ep changes nothing")


def _warnings(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    for text in plan.warnings:
        yield Advice(code="engine_does_silently", message=text)
