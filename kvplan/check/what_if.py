"""What if: plans that start from what a server reported, and change some of it.

A reported term holds for what it was measured of: those of the model or of the GPU are planned anew for another one.
Any other change (ranks, weight precision, memory fraction, batched tokens) moves a term by as much as it moves the
planned one: what the plan gets wrong about this server cancels. Either is called ``planned``, what stays ``reported``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvplan.check.basis import Basis, basis_of
from kvplan.check.identity import Identity, identify, sized
from kvplan.check.server import Fact, ServerReport
from kvplan.errors import InputError
from kvplan.memory.budget import OUTSIDE
from kvplan.memory.engines import resolve_engine
from kvplan.memory.plan import Advice, Memory, SizePlan, TermSource
from kvplan.memory.request import make_request
from kvplan.search import size
from kvplan.units import GIB, format_bytes, format_gib

MEASURED = ("activation_bytes", "graph_bytes", "overhead_bytes")
FLAGS = {"weights_bytes": "--weights-memory", "kv_cache_bytes": "--kv-cache-memory-bytes"}
ALIKE_TOKENS = 0.05
"""How far the tokens that a server counts may be from those of its plan: engines that are approximated are near it."""
ROUNDING_BYTES = GIB // 20
"""What the two decimals of six printed terms may add up to, and a little more."""


@dataclass(frozen=True)
class WhatIf:
    """A server to start from.

    Attributes:
        report: what it said.
        stated: model and GPU as the user names them: the server's, where it does not name them itself, or others.

    """

    report: ServerReport
    stated: Mapping[str, Any]

    def plan(self, changes: Mapping[str, Any], *, compare: bool = True) -> SizePlan:
        """The plan with ``changes`` (fields of a sizing request) made to the server.

        Raises:
            KvplanError: the server's model is unknown, it reports no KV memory, or the change is impossible.

        """
        kv = self.report.facts.get("kv_cache_bytes")
        if kv is None or kv.number <= 0:
            raise InputError(f"{self.report.source}: no KV memory is reported in it",
                             hint="a log from the start of the server has it; or size without --from-log")  # fmt: skip
        engine = changes.get("engine")
        if engine is not None and resolve_engine(str(engine)).name != self.report.engine:
            raise InputError(f"the log is {self.report.engine}'s: its memory says nothing about {engine}",
                             hint="size without --from-log for another engine")  # fmt: skip
        who = identify(self.report, self.stated)
        after = basis_of(who.kept, {**who.planned, **changes})
        before = basis_of(self.report, who.server)
        moved = _moved(who.kept, before, after)
        terms = {name: term for name, term in moved.items() if _field(name) not in changes}
        options = {**after.options, **{_field(name): term.value_bytes for name, term in terms.items()}}
        plan = size(make_request(options), compare=compare)
        memory = plan.memory
        if memory.kv_cache_bytes is None:
            raise InputError(f"{who.others}: its KV memory must be planned, and is "
                             f"{memory.sources['kv_cache_bytes'].detail}",
                             hint="add --gpu" if memory.total_bytes is None else "add --weights-memory")  # fmt: skip
        anew = [name for name in who.planned_anew if _field(name) not in changes and getattr(memory, name) is not None]
        told = replace(plan, memory=replace(memory, sources=_sources(plan, who.kept, terms, anew, after)))
        notes = (*_doubts(who.kept, before), *_notes(told, self.report, terms, anew, who, after))
        return replace(told, advice=(*notes, *plan.advice))


def _field(name: str) -> str:
    """The field of a sizing request that sets a memory term."""
    return "kv_cache_memory_bytes" if name == "kv_cache_bytes" else name


@dataclass(frozen=True)
class _Moved:
    """A reported term after a change."""

    value_bytes: int
    fact: Fact
    change_bytes: int

    @property
    def detail(self) -> str:
        moved = ""
        if self.change_bytes:
            sign = "+" if self.change_bytes > 0 else "−"
            moved = f"; {sign} {format_gib(abs(self.change_bytes))} for what changes"
        return f"{self.fact.where}{moved}"


def _moved(report: ServerReport, before: Basis, after: Basis) -> dict[str, _Moved]:
    """The reported weights, KV memory and measured terms, after what changed."""
    old, new = (sized(b.options).memory for b in (before, after))
    found = {}
    weights = report.facts.get("weights_bytes")
    grown = (new.weights_bytes or 0) - (old.weights_bytes or 0)
    if weights is not None and old.weights_bytes and new.weights_bytes:
        value = round(weights.number * new.weights_bytes / old.weights_bytes)
        grown = value - int(weights.number)
        found["weights_bytes"] = _Moved(value, weights, grown)
    for name in MEASURED:
        fact = report.facts.get(name)
        if name == "graph_bytes":  # what the budget subtracts is an estimate, made before the graphs are
            fact = report.facts.get("graph_estimate_bytes", fact)
        if fact is not None and getattr(new, name) is not None:
            change = getattr(new, name) - (getattr(old, name) or 0)
            found[name] = _Moved(max(int(fact.number) + change, 0), fact, change)
    kv = report.facts.get("kv_cache_bytes")
    if kv is None:
        return found
    change = _usable_change(old, new, before, after) - grown
    if resolve_engine(str(after.options["engine"])).fraction_of != "static":
        change -= sum((getattr(new, name) or 0) - (getattr(old, name) or 0) for name in MEASURED)
    left = int(kv.number) + change
    if left <= 0:
        raise InputError(
            f"no memory is left for KV: weights and the engine's own memory are {format_bytes(-left)} a GPU too large",
            hint="more GPUs (--tp), smaller weights, or a larger memory fraction",
        )
    found["kv_cache_bytes"] = _Moved(left, kv, change)
    return found


def _usable_change(old: Memory, new: Memory, before: Basis, after: Basis) -> int:
    """How much more memory the engine may use."""
    if old.usable_bytes is not None and new.usable_bytes is not None:
        return new.usable_bytes - old.usable_bytes
    if before.options.get("gpu_memory_utilization") != after.options.get("gpu_memory_utilization"):
        raise InputError("the memory fraction changes, and the log does not say how much memory a GPU has",
                         hint="add --gpu, or --gpu-memory 80GiB")  # fmt: skip
    return 0


def _sources(plan: SizePlan, report: ServerReport, terms: Mapping[str, _Moved], anew: list[str], basis: Basis
             ) -> dict[str, TermSource]:  # fmt: skip
    """The sources of the plan's terms: ``reported`` as the server had them, ``planned`` where that no longer holds."""
    sources = dict(plan.memory.sources)
    for name in anew:
        sources[name] = replace(sources[name], source="planned")
    for name, term in terms.items():
        source = TermSource("planned" if term.change_bytes else "reported", term.detail, sources[name].override)
        sources[name] = replace(source, override=FLAGS.get(name, source.override))
    total, usable = report.facts.get("total_bytes"), report.facts.get("usable_bytes")
    fraction = report.value("gpu_memory_utilization")
    served = fraction is not None and basis.options["gpu_memory_utilization"] == fraction
    if total is not None:
        gpu = sources["total_bytes"].detail.split(", ")[0]
        line = total.where.partition(":")[0]
        sources["total_bytes"] = replace(sources["total_bytes"], source="reported", detail=f"{gpu}, {line}")
    if served and usable is not None:
        sources["usable_bytes"] = replace(sources["usable_bytes"], source="reported", detail=usable.where)
    elif served and plan.memory.usable_bytes is not None:
        detail = sources["usable_bytes"].detail.replace("(given)", "(the server's fraction)")
        sources["usable_bytes"] = replace(sources["usable_bytes"], source="planned", detail=detail)
    for name in _outside(plan):
        if not sources[name].detail.startswith(OUTSIDE):
            sources[name] = replace(sources[name], detail=OUTSIDE + sources[name].detail)
    return sources


def _outside(plan: SizePlan) -> tuple[str, ...]:
    """Terms that the KV memory is not short of: those outside a static fraction, and graphs made after the cache."""
    if resolve_engine(plan.kv_cache.engine).fraction_of == "static":
        return MEASURED
    graphs, left = plan.memory.graph_bytes or 0, _left(plan.memory, MEASURED)
    if left is None or graphs <= ROUNDING_BYTES:
        return ()
    without = left + graphs - (plan.memory.kv_cache_bytes or 0)
    return ("graph_bytes",) if abs(without) <= ROUNDING_BYTES else ()


def _left(memory: Memory, measured: tuple[str, ...]) -> int | None:
    """What weights and ``measured`` leave of usable memory; None where there is no saying."""
    if memory.usable_bytes is None or memory.weights_bytes is None:
        return None
    return memory.usable_bytes - memory.weights_bytes - sum(getattr(memory, name) or 0 for name in measured)


def _notes(plan: SizePlan, report: ServerReport, terms: Mapping[str, _Moved], anew: list[str], who: Identity,
           basis: Basis) -> Iterator[Advice]:  # fmt: skip
    """Sentences that say where the terms come from."""
    memory, said = plan.memory, []
    kept = [name for name, term in terms.items() if not term.change_bytes]
    moved = [name for name in terms if name not in kept]
    if kept:
        said.append(f"{_listed(memory, kept)}: as reported in {report.source}")
    if moved:
        said.append(f"{_listed(memory, moved)}: as reported in {report.source}, moved by as much as the changes move "
                    "the planned budget")  # fmt: skip
    if anew:
        said.append(f"{_listed(memory, anew)}: planned, not reported: {who.others}")
    inside = tuple(name for name in MEASURED if not memory.sources[name].detail.startswith(OUTSIDE))
    left, kv = _left(memory, inside), memory.kv_cache_bytes or 0
    if "kv_cache_bytes" in terms and left is not None and abs(left - kv) > ROUNDING_BYTES:
        said.append(f"the terms leave {format_gib(left)} of usable memory, {format_gib(kv)} follow from what the "
                    "server reports: that is what counts")  # fmt: skip
    return (Advice("from_log", message) for message in (*said, *report.notes, *basis.notes))


def _doubts(report: ServerReport, before: Basis) -> Iterator[Advice]:
    """Tokens that the server counts in its KV bytes, where a plan of the server has others."""
    kv, counted = report.number("kv_cache_bytes"), report.number("capacity_tokens")
    if kv is None or not counted:
        return
    server = sized({**before.options, "kv_cache_memory_bytes": int(kv)})
    planned = server.kv_cache.capacity_tokens or 0
    if abs(planned - counted) > ALIKE_TOKENS * counted:
        yield Advice("not_this_server", f"the log counts {counted:,.0f} tokens in {format_gib(int(kv))}, a plan of the "
                     f"server {planned:,}: it runs another model, KV dtype, GPU or layout than is taken here, and what "
                     "follows is of that (`kvplan check --log` names causes)")  # fmt: skip


def _listed(memory: Memory, names: list[str]) -> str:
    """``weights 15.00 GiB, kv cache 56.21 GiB``."""
    return ", ".join(
        f"{name.removesuffix('_bytes').replace('_', ' ')} {format_gib(getattr(memory, name))}" for name in names
    )
