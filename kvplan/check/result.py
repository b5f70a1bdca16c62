"""The outcome of a check: typed, what the command line prints and ``--json`` serialises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from kvplan.check.server import ServerReport, Value
from kvplan.memory.plan import SizePlan

SCHEMA_VERSION = 1
Verdict = Literal["agrees", "drifted", "not checked"]
Outcome = Literal["agrees", "drifted", "inconclusive"]
TELLING = ("kv_cache_bytes", "num_blocks", "capacity_tokens", "max_concurrency", "needed_kv_bytes", "start")
"""Terms that say how much KV memory there is, or that there is not enough of it to start."""
Unit = Literal["bytes", "tokens", "count", "requests", "s", "share", "name"]


@dataclass(frozen=True, slots=True)
class Term:
    """One quantity, planned and observed.

    Attributes:
        unit: of ``planned``, ``observed``, ``low`` and ``high``; bytes are per GPU.
        low, high: what an observation may be and still agree; None for names, which must be equal.
        source: where the planned value comes from: ``exact``, ``assumed``, ``calibrated``, ``given``,
            ``reported`` (the server's own), ``planned`` (the server's memory fraction of the GPU stated).
        where: where the server said it.

    """

    name: str
    label: str
    unit: Unit
    planned: Value | None
    observed: Value | None
    source: str
    where: str
    verdict: Verdict
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Observed less planned; None for names and unknowns."""
        if isinstance(self.planned, str) or isinstance(self.observed, str) or None in (self.planned, self.observed):
            return None
        return float(self.observed or 0) - float(self.planned or 0)

    @property
    def relative(self) -> float | None:
        """``difference`` as a share of planned; None where planned is 0 or unknown."""
        return None if self.difference is None or not self.planned else self.difference / float(self.planned)


@dataclass(frozen=True, slots=True)
class Cause:
    """A likely cause whose arithmetic fits: what it explains, the numbers, and what to change."""

    code: str
    message: str
    fix: str
    terms: tuple[str, ...]


@dataclass(frozen=True)
class CheckResult:
    """A plan held against a server.

    Attributes:
        report: what the server said.
        plan: what was expected of a server so configured.
        terms: each quantity both of them know, and those only one knows as ``not checked``.
        causes: of the drifted terms.
        tolerance: relative difference that memory and latency may have.

    """

    report: ServerReport
    plan: SizePlan
    terms: tuple[Term, ...]
    causes: tuple[Cause, ...]
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def drifted(self) -> tuple[Term, ...]:
        """Terms outside their tolerance."""
        return tuple(term for term in self.terms if term.verdict == "drifted")

    @property
    def verdict(self) -> Outcome:
        """``drifted`` when a term is, ``inconclusive`` when none that says how much KV there is could be checked."""
        if self.drifted:
            return "drifted"
        telling = any(term.name in TELLING and term.verdict == "agrees" for term in self.terms)
        return "agrees" if telling else "inconclusive"

    @property
    def agrees(self) -> bool:
        """Whether every term that could be checked agrees, and they say how much KV there is."""
        return self.verdict == "agrees"

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        plan = self.plan.as_dict()
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.report.source,
            "engine": self.report.engine,
            "engine_version": self.plan.request.engine_version,
            "verdict": self.verdict,
            "tolerance": self.tolerance,
            "request": plan["request"],
            "terms": [_term(term) for term in self.terms],
            "causes": [
                {"code": c.code, "message": c.message, "fix": c.fix, "terms": list(c.terms)} for c in self.causes
            ],
            "events": [
                {"code": e.code, "message": e.message, "where": e.where, "is_failure": e.is_failure}
                for e in self.report.events
            ],
            "reported": {name: fact.as_dict() for name, fact in sorted(self.report.facts.items())},
            "rules": self.plan.kv_cache.rules,
            "notes": [*self.report.notes, *self.notes],
        }

    def to_json(self, indent: int | None = None) -> str:
        """``as_dict`` as JSON."""
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)


def _term(term: Term) -> dict[str, Any]:
    return {
        "name": term.name, "unit": term.unit, "planned": term.planned, "observed": term.observed,
        "difference": term.difference, "relative": term.relative, "low": term.low, "high": term.high,
        "source": term.source, "where": term.where, "verdict": term.verdict, "note": term.note,
    }  # fmt: skip
