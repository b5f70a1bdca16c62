"""A plan and a server's report, reconciled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvplan.check.basis import basis_of
from kvplan.check.causes import find_causes
from kvplan.check.latency import latency_term
from kvplan.check.result import CheckResult
from kvplan.check.server import ServerReport
from kvplan.check.terms import all_terms, plan_of
from kvplan.errors import InputError
from kvplan.memory.request import make_request
from kvplan.memory.setup import set_up

TOLERANCE = 0.05


def reconcile(report: ServerReport, given: Mapping[str, Any], tolerance: float = TOLERANCE) -> CheckResult:
    """Hold a plan against a report.

    Args:
        report: what the server said.
        given: fields of a sizing request that the user states; the server's own settings fill in the rest.
        tolerance: relative difference that memory and latency may have.

    Raises:
        KvplanError: the server's model is unknown, the request is impossible, or nothing could be compared.

    """
    if not 0 < tolerance < 1:
        raise InputError(f"a tolerance of {tolerance:.0%} makes no sense", hint="--tolerance 5 allows 5%")
    basis = basis_of(report, given)
    plan = plan_of(basis)
    terms = all_terms(report, basis, plan, tolerance)
    latency = latency_term(report, basis, tolerance)
    terms = (*terms, latency) if latency is not None else terms
    if all(term.verdict == "not checked" for term in terms):
        missing = "; ".join(dict.fromkeys(term.note for term in terms if term.note)) or "it reports no memory term"
        raise InputError(f"{report.source}: nothing in it can be held against a plan: {missing}",
                         hint="name the GPU with --gpu, or give the whole start-up log")  # fmt: skip
    causes = find_causes(report, basis, plan, terms, tolerance)
    granted = set_up(make_request(basis.options)).taken_for_granted
    notes = basis.notes if granted is None else (*basis.notes, granted)
    return CheckResult(report, plan, terms, causes, tolerance, notes)
