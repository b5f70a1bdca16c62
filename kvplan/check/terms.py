"""Term by term: what was planned beside what the server reported, and whether the two agree.

Weights and KV memory may differ by the tolerance; activations, graphs and other memory are rough estimates and may
differ by that share of the usable memory, which is said: what they make together shows in the KV memory. What the
allocator makes of the KV memory (blocks, tokens, concurrency) follows from rules: it is planned from the server's own
KV bytes, so that a drifted budget does not show twice, and may differ by what printing rounded off; by the tolerance
for engines whose allocator is not reproduced.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvplan.check.basis import Basis, basis_of, model_of, same_model
from kvplan.check.result import Term, Unit, Verdict
from kvplan.check.server import Fact, ServerReport, Value
from kvplan.dtypes import canonical_kv_dtype
from kvplan.errors import KvplanError
from kvplan.memory.engines import resolve_engine
from kvplan.memory.plan import SizePlan
from kvplan.memory.request import make_request
from kvplan.model_config import resolve_model
from kvplan.search import size
from kvplan.units import format_gib

SETTING_LABELS = {
    "tp_size": "tensor parallel", "pp_size": "pipeline parallel", "dp_size": "data parallel",
    "dcp_size": "decode context parallel", "kv_cache_dtype": "KV dtype", "block_size_tokens": "block size",
    "max_model_len_tokens": "longest request", "max_num_seqs": "requests a step",
    "max_num_batched_tokens": "tokens a step", "gpu_memory_utilization": "memory fraction",
    "enable_prefix_caching": "prefix caching", "ep": "expert parallel",
    "swa_full_tokens_ratio": "pool of windows", "mamba_full_memory_ratio": "pool of states",
}  # fmt: skip
MEMORY_LABELS = {
    "total_bytes": "GPU memory", "usable_bytes": "usable", "weights_bytes": "weights",
    "activation_bytes": "activation peak", "graph_bytes": "CUDA graphs", "overhead_bytes": "other",
    "kv_cache_bytes": "KV memory",
}  # fmt: skip
ESTIMATES = ("activation_bytes", "graph_bytes", "overhead_bytes")
_UNITS: dict[str, Unit] = {"block_size_tokens": "tokens", "max_model_len_tokens": "tokens",
                           "max_num_batched_tokens": "tokens", "gpu_memory_utilization": "share",
                           "swa_full_tokens_ratio": "share", "mamba_full_memory_ratio": "share"}  # fmt: skip


def plan_of(basis: Basis, **changes: Value | None) -> SizePlan:
    """The plan of a basis with some fields changed.

    Raises:
        KvplanError: it cannot be planned.

    """
    return size(make_request({**basis.options, **changes}), compare=False)


def all_terms(report: ServerReport, basis: Basis, plan: SizePlan, tolerance: float) -> tuple[Term, ...]:
    """Every term of memory and allocation, in the order a reader follows them."""
    return (
        *_start(report, plan),
        *_settings(report, basis, plan),
        *memory_terms(report, basis, plan, tolerance),
        *rule_terms(report, basis, plan, tolerance),
        *_demand(report, basis),
    )


def _start(report: ServerReport, plan: SizePlan) -> Iterator[Term]:
    """Whether the server started, where it says that it did not."""
    if not report.failures:
        return
    fits, event = plan.fits, report.failures[0]
    planned = {True: "starts", False: "does not fit", None: "unknown"}[fits]
    verdict: Verdict = "agrees" if fits is False else "drifted"
    yield Term("start", "start-up", "name", planned, event.code, "exact", event.where, verdict, note=event.message)


def _settings(report: ServerReport, basis: Basis, plan: SizePlan) -> Iterator[Term]:
    """Settings that the user stated and the server reports too."""
    if "engine" in basis.given:
        stated = resolve_engine(str(basis.given["engine"])).name
        same: Verdict = "agrees" if stated == report.engine else "drifted"
        yield Term("engine", "engine", "name", stated, report.engine, "given", "the wording of its lines", same)
    yield from _model(report, basis)
    for name, label in SETTING_LABELS.items():
        fact = report.facts.get(name) or (report.facts.get("observed_block_tokens") if "block" in name else None)
        if name not in basis.given or fact is None:
            continue
        planned, observed = getattr(plan.request, name), fact.value
        if name == "kv_cache_dtype":
            observed = _resolved_dtype(basis, str(observed))
        verdict: Verdict = "agrees" if planned == observed else "drifted"
        yield Term(name, label, _UNITS.get(name, "name" if isinstance(planned, str) else "count"), planned, observed,
                   "given", fact.where, verdict)  # fmt: skip


def _model(report: ServerReport, basis: Basis) -> Iterator[Term]:
    """The model that was stated, beside the one the server names."""
    fact, stated = report.facts.get("model"), basis.given.get("model")
    if fact is None or stated is None:
        return
    planned, theirs = resolve_model(stated), model_of(report)
    if theirs is None:
        yield Term("model", "model", "name", planned.name, fact.value, "given", fact.where, "not checked",
                   note="the server's name for it is not known here")  # fmt: skip
        return
    observed = resolve_model(theirs["model"])
    verdict: Verdict = "agrees" if same_model(planned, observed) else "drifted"
    yield Term("model", "model", "name", planned.name, observed.name, "given", fact.where, verdict)


def _resolved_dtype(basis: Basis, stated: str) -> str:
    """What the server's KV dtype comes to for this model."""
    try:
        return plan_of(basis, kv_cache_dtype=canonical_kv_dtype(stated)).kv_cache.kv_cache_dtype
    except KvplanError:
        return stated


def memory_terms(report: ServerReport, basis: Basis, plan: SizePlan, tolerance: float) -> Iterator[Term]:
    """Terms of one GPU's memory: the planned budget beside what the server measured."""
    for name, label in MEMORY_LABELS.items():
        fact, planned, about = report.facts.get(name), getattr(plan.memory, name), plan.memory.sources[name]
        if name == "graph_bytes":  # what the budget subtracts is an estimate, made before the graphs are
            fact = report.facts.get("graph_estimate_bytes", fact)
        source: str = about.source or "unknown"
        if name == "graph_bytes" and source == "exact":
            continue  # a version that does not count graphs
        if fact is None:
            if name == "kv_cache_bytes" and planned is not None and "num_blocks" not in report.facts:
                yield Term(name, label, "bytes", planned, None, source, "", "not checked",
                           note="the server did not report it")  # fmt: skip
            continue
        if name == "usable_bytes" and source == "given" and "gpu_memory_utilization" not in basis.given:
            source = "planned" if basis.given.keys() & {"gpu", "gpu_memory_bytes"} else "reported"  # of whose memory
        why = _unchecked(plan, name)
        if why is not None:
            yield Term(name, label, "bytes", planned, fact.value, source, fact.where, "not checked", note=why)
            continue
        allowed = fact.error + 1 + tolerance * _scale(name, fact, report)
        note = f"rough estimate, may be off by {format_gib(int(allowed))}" if name in ESTIMATES else ""
        yield _judged(name, label, "bytes", planned, fact, planned - allowed, planned + allowed, source, note)


def _unchecked(plan: SizePlan, name: str) -> str | None:
    """Why there is nothing to hold a memory term against; None when there is."""
    about = plan.memory.sources[name]
    if getattr(plan.memory, name) is None:
        return about.detail
    if name == "kv_cache_bytes" and about.source == "given":
        return "given, not planned"
    static = resolve_engine(plan.kv_cache.engine).fraction_of == "static"
    return "does not move the KV cache here" if static and name in ESTIMATES else None


def _scale(name: str, fact: Fact, report: ServerReport) -> float:
    """What the tolerance of a term is a share of: itself, or for rough estimates the memory they are taken from."""
    if name in ESTIMATES:
        usable = report.number("usable_bytes")
        return usable or sum(report.number(other) or 0.0 for other in ("weights_bytes", "kv_cache_bytes"))
    return abs(fact.number) * (0.2 if name in ("total_bytes", "usable_bytes") else 1.0)


def rule_terms(report: ServerReport, basis: Basis, plan: SizePlan, tolerance: float) -> Iterator[Term]:
    """What the allocation rules make of the server's own KV bytes, or of the planned ones when it reports none."""
    kv = report.facts.get("kv_cache_bytes")
    bounds = [plan, plan, plan]
    origin = "from the planned KV memory"
    if kv is not None and kv.number > 0:
        margin = int(kv.error) + 1
        bounds = [plan_of(basis, kv_cache_memory_bytes=max(int(kv.number) + m, 1)) for m in (-margin, 0, margin)]
        origin = "from the server's own KV memory"
    slack = 0.0 if kv is not None and plan.kv_cache.engine == "vllm" else tolerance
    yield from _block(report, basis, plan)
    for name, label, unit in (("num_blocks", "blocks", "count"), ("capacity_tokens", "capacity", "tokens"),
                              ("max_concurrency", "max concurrency", "requests")):  # fmt: skip
        fact = report.facts.get(name)
        low, middle, high = (getattr(bound.kv_cache, name) for bound in bounds)
        if fact is None:
            continue
        source = _rules_source(plan)
        if middle is None:
            yield Term(name, label, unit, None, fact.value, source, fact.where, "not checked",  # type: ignore[arg-type]
                       note="no KV memory to plan from: name the GPU with --gpu")  # fmt: skip
            continue
        room = slack * abs(middle) + fact.error + (0.0 if name == "max_concurrency" else 0.5)
        yield _judged(name, label, unit, middle, fact, low - room, high + room, source, origin)  # type: ignore[arg-type]
    yield from _needs(report, plan, tolerance)


def _block(report: ServerReport, basis: Basis, plan: SizePlan) -> Iterator[Term]:
    """The block size the engine worked out, where the user stated none."""
    fact = report.facts.get("observed_block_tokens")
    if fact is None or "block_size_tokens" in basis.given:
        return
    planned = plan.kv_cache.block_size_tokens
    yield _judged("block_size_tokens", "block size", "tokens", planned, fact, planned, planned, _rules_source(plan), "")


def _needs(report: ServerReport, plan: SizePlan, tolerance: float) -> Iterator[Term]:
    """What the engine says one request of the longest length needs, when it refuses to start for it."""
    fact = report.facts.get("needed_kv_bytes")
    if fact is not None:
        planned = plan.kv_cache.bytes_per_request
        allowed = fact.error + tolerance * planned
        yield _judged("needed_kv_bytes", "KV of the longest request", "bytes", planned, fact, planned - allowed,
                      planned + allowed, _rules_source(plan), "")  # fmt: skip


def _demand(report: ServerReport, basis: Basis) -> Iterator[Term]:
    """The requests that were planned for, against what the server's own KV memory holds of them as it is set."""
    kv, wanted = report.facts.get("kv_cache_bytes"), basis.given.get("batch_size")
    if kv is None or wanted is None or kv.number <= 0:
        return
    unreported = {name: value for name, value in basis.given.items() if name not in report.facts}
    held = plan_of(basis_of(report, unreported), kv_cache_memory_bytes=int(kv.number)).answers
    verdict: Verdict = "agrees" if (held.max_batch_at_context or 0) >= wanted else "drifted"
    label = f"requests of {held.context_tokens:,}"
    where = f"KV memory, {kv.where}"
    yield Term("batch_size", label, "count", wanted, held.max_batch_at_context, "given", where, verdict, float(wanted))


def _rules_source(plan: SizePlan) -> str:
    return "exact" if plan.kv_cache.rules == "exact" else "approximation"


def _judged(name: str, label: str, unit: Unit, planned: float, fact: Fact, low: float, high: float, source: str,
            note: str) -> Term:  # fmt: skip
    verdict: Verdict = "agrees" if low <= fact.number <= high else "drifted"
    return Term(name, label, unit, planned, fact.value, source, fact.where, verdict, low, high, note)
