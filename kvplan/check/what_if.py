"""What if: plans that start from what a server reported, and change some of it.

KV memory and weights are the server's own. A change that moves the memory budget (ranks, weights, memory fraction,
batched tokens) moves the KV memory by as much as it moves the planned budget: what the plan gets wrong about this
server cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvplan.check.basis import Basis, basis_of
from kvplan.check.server import Fact, ServerReport
from kvplan.errors import InputError
from kvplan.memory.engines import resolve_engine
from kvplan.memory.plan import Advice, Memory, SizePlan, TermSource
from kvplan.memory.request import make_request
from kvplan.search import size
from kvplan.units import format_bytes, format_gib

IDENTITY = (
    "model",
    "gpu",
    "gpu_memory_bytes",
    "num_layers",
    "num_kv_heads",
    "head_dim",
    "num_parameters",
    "window_tokens",
)
"""Fields that say what the server is, not what would be different about it."""

MEASURED = ("activation_bytes", "graph_bytes", "overhead_bytes")
FLAGS = {"weights_bytes": "--weights-memory", "kv_cache_bytes": "--kv-cache-memory-bytes"}


@dataclass(frozen=True)
class WhatIf:
    """A server to start from.

    Attributes:
        report: what it said.
        identity: what the user says of it (model, GPU), where it does not itself.

    """

    report: ServerReport
    identity: Mapping[str, Any]

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
        before = basis_of(self.report, self.identity)
        after = basis_of(self.report, {**self.identity, **changes})
        moved = _moved(self.report, kv, before, after)
        terms = {name: term for name, term in moved.items() if _field(name) not in changes}
        options = {**after.options, **{_field(name): term.value_bytes for name, term in terms.items()}}
        return _told(size(make_request(options), compare=compare), self.report, terms, after)


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


def _moved(report: ServerReport, kv: Fact, before: Basis, after: Basis) -> dict[str, _Moved]:
    """The server's weights and KV memory, and its measured terms, after what changed."""
    old, new = (size(make_request(b.options), compare=False).memory for b in (before, after))
    found = {}
    weights = report.facts.get("weights_bytes")
    grown = (new.weights_bytes or 0) - (old.weights_bytes or 0)
    if weights is not None and old.weights_bytes and new.weights_bytes:
        value = round(weights.number * new.weights_bytes / old.weights_bytes)
        grown = value - int(weights.number)
        found["weights_bytes"] = _Moved(value, weights, grown)
    for name in MEASURED:
        fact = report.facts.get(name)
        if fact is not None and getattr(new, name) is not None:
            change = getattr(new, name) - (getattr(old, name) or 0)
            found[name] = _Moved(max(int(fact.number) + change, 0), fact, change)
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
    names = ("gpu_memory_utilization", "gpu", "gpu_memory_bytes")
    if any(before.options.get(name) != after.options.get(name) for name in names):
        raise InputError("the memory fraction changes, and the log does not say how much memory a GPU has",
                         hint="add --gpu, or --gpu-memory 80GiB")  # fmt: skip
    return 0


def _told(plan: SizePlan, report: ServerReport, terms: Mapping[str, _Moved], basis: Basis) -> SizePlan:
    """The plan with the sources of the reported terms, and a sentence that says where they come from."""
    sources = dict(plan.memory.sources)
    for name, term in terms.items():
        sources[name] = TermSource("reported", term.detail, FLAGS.get(name, sources[name].override))
    fraction = report.facts.get("gpu_memory_utilization")
    if fraction is not None and basis.options["gpu_memory_utilization"] == fraction.value:
        sources["usable_bytes"] = replace(sources["usable_bytes"], source="reported")
    stated = [
        f"{name.removesuffix('_bytes').replace('_', ' ')} {format_gib(term.value_bytes)}"
        for name, term in terms.items()
    ]
    message = f"{', '.join(stated)}: as reported in {report.source}"
    if any(term.change_bytes for term in terms.values()):
        message += "; moved by as much as the changes move the planned budget"
    notes = [Advice("from_log", message), *(Advice("from_log", note) for note in (*report.notes, *basis.notes))]
    return replace(plan, memory=replace(plan.memory, sources=sources), advice=(*notes, *plan.advice))
