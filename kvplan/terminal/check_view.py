"""A check on the terminal: the verdict first, then every term, then why and what to change."""

from __future__ import annotations

from kvplan.check.result import CheckResult, Term
from kvplan.check.server import Value
from kvplan.check.terms import ESTIMATES
from kvplan.terminal.plain import Page
from kvplan.units import format_count, format_gib, format_percent, format_seconds

MARKS = {"agrees": "ok", "drifted": "DRIFTED", "not checked": "–"}


def show_check(page: Page, result: CheckResult) -> None:
    """Print the whole outcome."""
    plan, checked = result.plan, [term for term in result.terms if term.verdict != "not checked"]
    request, cache = plan.request, plan.kv_cache
    model = plan.model.name if plan.model is not None else "a model from flags"
    named = request.gpu is not None
    gpu = f" on {plan.memory.sources['total_bytes'].detail.split(',')[0]}" if named else ", no GPU named"
    layout = f", {request.layout}" if request.layout else ""
    version = result.report.value("engine_version") or cache.engine_version
    page.line(f"{result.report.source}: {model}{gpu}{layout} · {cache.engine} {version}, "
              f"{'exact rules' if cache.rules == 'exact' else 'approximation'}")  # fmt: skip
    page.line(_verdict(result, checked), "bold")
    page.line()
    rows = [_row(term) for term in result.terms]
    page.table(("term", "planned", "observed", "difference", "", "from"), rows, right=(1, 2, 3))
    page.line()
    for term in result.terms:
        if term.note and (term.verdict == "not checked" or term.name == "itl_s"):
            page.line(f"{term.label}: {term.note}", "dim")
    rough = [term for term in checked if term.name in ESTIMATES]
    if rough:
        labels = ", ".join(term.label for term in rough)
        page.line(f"{labels}: rough, held to {format_percent(result.tolerance)} of usable memory ({_room(rough)}); "
                  "what they make together shows in the KV memory", "dim")  # fmt: skip
    for event in result.report.events:
        page.line(f"{event.where}: {event.message}", "yellow" if event.is_failure else "dim")
    for note in (*result.report.notes, *result.notes):
        page.line(f"note: {note}", "yellow")
    if result.drifted:
        _causes(page, result)


def _verdict(result: CheckResult, checked: list[Term]) -> str:
    if result.drifted:
        return f"DRIFTED: {len(result.drifted)} of {format_count(len(checked), 'term')}"
    rough = [term for term in checked if term.name in ESTIMATES]
    within = f"{format_count(len(checked) - len(rough), 'term')} within tolerance"
    if rough:
        within += f", {format_count(len(rough), 'rough estimate')} within {_room(rough)}"
    if result.agrees:
        return f"AGREES: {within}"
    return f"INCONCLUSIVE: {within}, but none says how much KV memory there is"


def _mark(term: Term) -> str:
    """``ok``, and where it says little, that it does."""
    return MARKS[term.verdict] + (" (rough)" if term.name in ESTIMATES and term.verdict == "agrees" else "")


def _room(rough: list[Term]) -> str:
    """How far from the planned value an observation of rough estimates may be and still agree, at most."""
    return format_gib(max(int((term.high or 0) - float(term.planned or 0)) for term in rough))


def _causes(page: Page, result: CheckResult) -> None:
    for term in result.drifted:
        page.line(f"{term.label} as reported: {term.where}", "dim")
    if not result.causes:
        page.line(
            "no cause kvplan knows accounts for it: compare the settings in the log with `kvplan size --from-log`"
        )
        return
    page.line("likely causes: the arithmetic of each fits", "bold")
    for cause in result.causes:
        page.line(f"  • {cause.message}")
        page.line(f"    → {cause.fix}")


def _row(term: Term) -> tuple[str, ...]:
    return (term.label, _shown(term, term.planned), _shown(term, term.observed), _difference(term), _mark(term),
            term.source)  # fmt: skip


def _difference(term: Term) -> str:
    if term.difference is None:
        return "" if term.planned == term.observed else "differs" if term.verdict == "drifted" else ""
    if term.difference == 0:
        return "0"
    sign = "+" if term.difference > 0 else "−"
    if term.unit == "bytes":
        size = format_gib(int(abs(term.difference)))
        return "0" if size == "0.00 GiB" else f"{sign}{size}"
    if term.relative is None:
        return f"{sign}{abs(term.difference):,.2f}"
    return f"{sign}{format_percent(abs(term.relative))}"


def _shown(term: Term, value: Value | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return value
    if term.unit == "bytes":
        return format_gib(int(value))
    if term.unit == "s":
        return format_seconds(float(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
