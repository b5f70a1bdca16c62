"""Likely causes of drift, each named only when its arithmetic fits.

Either the plan is made anew with one thing changed, and the terms that drifted then agree; or the server's own numbers
account for most of a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from kvplan.check.basis import Basis, model_of
from kvplan.check.changes import Change, gpus_of, memory_changes, rule_changes
from kvplan.check.result import Cause, Term
from kvplan.check.server import ServerReport
from kvplan.check.terms import SETTING_LABELS, memory_terms, plan_of, rule_terms
from kvplan.errors import KvplanError
from kvplan.memory.plan import SizePlan
from kvplan.units import GIB, format_gib, format_percent

RULES = frozenset(("num_blocks", "capacity_tokens", "max_concurrency", "needed_kv_bytes", "block_size_tokens"))
MEMORY = frozenset(("kv_cache_bytes", "usable_bytes", "weights_bytes"))
WORTH_NAMING = 0.15
"""Share of a difference that a term must account for to be named."""

MOST = 0.75
"""Share that the named terms must account for together, and not more than its inverse."""

RANKS_DIFFER = 0.03
"""How much less KV memory the smallest rank may have than another before something else is wrong."""

TAKEN_BYTES = GIB
"""Memory in use before the server starts that is worth a sentence; drivers hold some hundred MiB."""


def find_causes(report: ServerReport, basis: Basis, plan: SizePlan, terms: Sequence[Term], tolerance: float
                ) -> tuple[Cause, ...]:  # fmt: skip
    """Causes of the drifted terms, the settings that differ first."""
    drifted = {term.name: term for term in terms if term.verdict == "drifted"}
    found = [*_taken_before(report, drifted), *_overridden(report, drifted), *_other_gpu(plan, drifted)]
    settings = [term for term in drifted.values() if term.name in ("model", *SETTING_LABELS) and term.source == "given"]
    if settings:
        return (*found, *_settings(settings, drifted, report, basis, tolerance))
    rules = RULES & drifted.keys()
    if rules:
        found += [*_explaining(rule_changes(report, basis, plan), rules, report, basis, tolerance)] or (
            _smallest_rank(report, plan, drifted.get("capacity_tokens")) or _bytes_per_token(report, drifted)
        )
    memory = MEMORY & drifted.keys()
    if memory:
        found += [*_explaining(memory_changes(report, basis, plan), memory, report, basis, tolerance)] or (
            _contributions(drifted.get("kv_cache_bytes"), terms) or _unaccounted(report, tolerance)
        )
    return tuple(found)


def _settings(settings: Sequence[Term], drifted: Mapping[str, Term], report: ServerReport, basis: Basis,
              tolerance: float) -> Iterator[Cause]:  # fmt: skip
    """Settings that are not what was planned, and what drifts because of them."""
    theirs = {term.name: term.observed for term in settings}
    if "model" in theirs:  # with the weights as the server stores them
        theirs |= model_of(report) or {}
    remaining = {term.name for term in _terms_with(theirs, report, basis, tolerance) if term.verdict == "drifted"}
    explained = tuple(name for name in drifted if name in RULES | MEMORY and name not in remaining | theirs.keys())
    for term in settings:
        message = f"{term.label}: {term.planned} was planned, the server runs {term.observed}"
        yield Cause("setting", message, "start the server as planned, or plan what it runs", (term.name, *explained))


def _terms_with(fields: Mapping[str, Any], report: ServerReport, basis: Basis, tolerance: float) -> list[Term]:
    """Memory and rule terms of a plan with some fields changed; none where it cannot be planned."""
    other = Basis({**basis.options, **fields}, basis.given, ())
    try:
        plan = plan_of(other)
        return [*rule_terms(report, other, plan, tolerance), *memory_terms(report, other, plan, tolerance)]
    except KvplanError:
        return []


def _taken_before(report: ServerReport, drifted: Mapping[str, Term]) -> Iterator[Cause]:
    """Another process on the GPU: memory that was not free when the server started."""
    free, total = report.number("free_bytes"), report.number("total_bytes")
    if free is None or total is None or total - free < TAKEN_BYTES:
        return
    if "start" in drifted:
        yield Cause(
            "gpu_in_use",
            f"{format_gib(int(total - free))} of {format_gib(int(total))} were in use before the server started: "
            "a second process holds memory of this GPU",
            "look at nvidia-smi and stop it, or lower --gpu-memory-utilization to what is free",
            ("start",),
        )


def _overridden(report: ServerReport, drifted: Mapping[str, Term]) -> Iterator[Cause]:
    """A number of blocks that was set rather than worked out."""
    blocks = report.value("num_blocks_override")
    if blocks is not None and drifted.keys() & {"num_blocks", "capacity_tokens"}:
        yield Cause("blocks_override", f"the server was told to use {blocks:,} blocks, whatever memory it has",
                    "remove --num-gpu-blocks-override", ("num_blocks", "capacity_tokens"))  # fmt: skip


def _other_gpu(plan: SizePlan, drifted: Mapping[str, Term]) -> Iterator[Cause]:
    """GPUs that have as much memory as the server's, where that is not the planned one's."""
    total = drifted.get("total_bytes")
    if total is None or not isinstance(total.observed, int):
        return
    names = gpus_of(total.observed)
    if not names or plan.request.gpu in names:
        return
    message = (
        f"the server's GPU has {format_gib(total.observed)}, as {' or '.join(names)} has, "
        f"not {format_gib(plan.memory.total_bytes)}"
    )
    terms = tuple(name for name in ("total_bytes", "usable_bytes") if name in drifted)
    yield Cause("other_gpu", message, "name the server's GPU with --gpu (nvidia-smi shows it)", terms)


def _explaining(changes: Iterator[Change], names: Set[str], report: ServerReport, basis: Basis, tolerance: float
                ) -> Iterator[Cause]:  # fmt: skip
    """The changes under which none of ``names`` drifts any more."""
    for change in changes:
        fitting = [t for t in _terms_with(change.fields, report, basis, tolerance) if t.name in names]
        if len(fitting) == len(names) and all(term.verdict == "agrees" for term in fitting):
            fits = ", ".join(_fit(term) for term in fitting)
            yield Cause(change.code, f"{change.message}: {fits}", change.fix, tuple(term.name for term in fitting))


def _fit(term: Term) -> str:
    """``capacity 225,872 against 225,872``: planned so, against observed."""

    def shown(value: float) -> str:
        return format_gib(int(value)) if term.unit == "bytes" else f"{value:,.2f}".removesuffix(".00")

    planned, observed = term.planned, term.observed
    assert not isinstance(planned, str | None) and not isinstance(observed, str | None)
    return f"{term.label} would be {shown(planned)}, {shown(observed)} is reported"


def _smallest_rank(report: ServerReport, plan: SizePlan, capacity: Term | None) -> list[Cause]:
    """Blocks are the fewest of any rank; a log that shows another rank's memory promises a little too much."""
    kv, less = report.number("kv_cache_bytes"), -(capacity.relative or 0.0) if capacity is not None else 0.0
    if kv is None or plan.request.tp_size * plan.request.pp_size == 1 or not 0 < less <= RANKS_DIFFER:
        return []
    message = (
        f"the tokens are those of {format_gib(int(kv * (1 - less)))}, the log shows {format_gib(int(kv))}: every rank "
        "holds as many blocks as the one with the least memory"
    )
    fix = "look for the smallest figure over all ranks; even out what else their GPUs hold"
    return [Cause("smallest_rank", message, fix, ("capacity_tokens",))]


def _bytes_per_token(report: ServerReport, drifted: Mapping[str, Term]) -> list[Cause]:
    """What a token takes on the server, where nothing else accounts for its capacity."""
    kv, capacity = report.number("kv_cache_bytes"), drifted.get("capacity_tokens")
    if (
        kv is None
        or capacity is None
        or not isinstance(capacity.observed, int)
        or not isinstance(capacity.planned, int)
    ):
        return []
    if capacity.observed <= 0 or capacity.planned <= 0 or abs(capacity.relative or 0.0) < RANKS_DIFFER:
        return []
    message = (
        f"the server stores {kv / capacity.observed:,.0f} B a token, the plan {kv / capacity.planned:,.0f} B: "
        "another model, layout or KV dtype"
    )
    return [Cause("bytes_per_token", message, "check --model, --tp and --kv-cache-dtype", ("capacity_tokens",))]


_WHY = {
    "graph_bytes": ("cuda_graphs", "capture fewer graphs with a smaller --max-num-seqs, or plan with --graph-memory"),
    "activation_bytes": ("activations", "a smaller --max-num-batched-tokens; or plan with --activation-memory"),
    "overhead_bytes": ("other_memory", "a second process (nvidia-smi) or NCCL; plan with --overhead-memory"),
    "weights_bytes": ("weights", "a draft model, an adapter or padding is in it: plan with --weights-memory"),
    "total_bytes": ("gpu_memory", "not the GPU that was planned for, or ECC and MIG take some: --gpu-memory"),
}  # fmt: skip


def _contributions(kv: Term | None, terms: Sequence[Term]) -> list[Cause]:
    """The terms that take what the KV memory lacks (or give what it gains), where together they account for it."""
    missing = -(kv.difference or 0.0) if kv is not None else 0.0
    if not missing:
        return []
    found: list[tuple[float, Term]] = []
    for term in terms:
        if term.name in _WHY and term.difference is not None:
            taken = -term.difference if term.name == "total_bytes" else term.difference
            if taken / missing >= WORTH_NAMING:
                found.append((taken, term))
    if not MOST <= sum(taken for taken, _ in found) / missing <= 1 / MOST:
        return []
    causes = []
    for taken, term in sorted(found, key=lambda pair: -abs(pair[0])):
        code, fix = _WHY[term.name]
        more = "more" if (term.difference or 0.0) > 0 else "less"
        message = (
            f"{term.label}: {format_gib(int(abs(taken)))} {more} than planned, "
            f"{format_percent(taken / missing, 0)} of the difference in KV memory"
        )
        causes.append(Cause(code, message, fix, ("kv_cache_bytes", term.name)))
    return causes


def _unaccounted(report: ServerReport, tolerance: float) -> list[Cause]:
    """Usable memory that is in no term the server reports."""
    names = ("usable_bytes", "weights_bytes", "activation_bytes", "overhead_bytes", "kv_cache_bytes")
    numbers = [report.number(name) for name in names]
    if any(number is None for number in numbers):
        return []
    usable, *terms = (number or 0.0 for number in numbers)
    rest = usable - sum(terms) - (report.number("graph_estimate_bytes") or 0.0)
    if rest < tolerance * terms[-1]:
        return []
    message = (
        f"{format_gib(int(rest))} of the {format_gib(int(usable))} usable are in no term the server reports: "
        f"{format_gib(int(sum(terms)))} are weights, activations, other and KV"
    )
    fix = "look for a second process that started meanwhile (nvidia-smi), or a fixed --kv-cache-memory-bytes"
    return [Cause("unaccounted", message, fix, ("kv_cache_bytes",))]
