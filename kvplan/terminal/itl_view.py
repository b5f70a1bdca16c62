"""``kvplan itl`` on a terminal: a table, the lines, and the sentence that matters about each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplan.latency.lines import BREAK_EVEN_GAIN, ItlLine
from kvplan.latency.plan import DEFINITIONS, ItlPlan
from kvplan.terminal.itl_explain import show_step
from kvplan.terminal.plain import Page
from kvplan.terminal.plot import PlotLine, draw
from kvplan.units import format_bytes, format_percent, format_seconds, format_tokens

if TYPE_CHECKING:
    from kvplan.latency.served import Served


def _headline(page: Page, served: Served, plan: ItlPlan) -> None:
    facts = plan.facts
    precision = facts.request["weight_dtype"]
    count = facts.num_gpus
    page.line(
        f"{served.model.name} · {precision} weights · {count} × {served.gpu.display_name} ({facts.describe})", "bold"
    )
    page.line(f"{facts.request['engine']} {facts.request['engine_version']} · {facts.source}: {facts.source_detail}")
    for note in plan.notes:
        page.line(f"note: {note}", "yellow")


def _headlines(page: Page, pairs: list[tuple[Served, ItlPlan]]) -> None:
    """One headline for each deployment that differs in more than its KV format."""
    shown = set()
    for served, plan in pairs:
        key = (served.gpu.name, plan.facts.describe, plan.notes)
        if key not in shown:
            shown.add(key)
            _headline(page, served, plan)
    page.line()


def show_lines(page: Page, lines: list[ItlLine], failures: list[tuple[str, str]], *, explain: bool = False) -> None:
    """Everything about ITL over context."""
    _headlines(page, [(line.served, line.plans[-1]) for line in lines])
    _table(page, lines)
    _plot(page, lines)
    for line in lines:
        _sentence(page, line)
    for label, message in failures:
        page.line(f"{label}: no: {message}", "dim")
    page.line(f"80% intervals: {lines[0].plans[0].interval_note}", "dim")
    page.line(f"ITL: {DEFINITIONS['itl_s']}", "dim")
    if explain:
        for line in lines:
            page.line()
            show_step(page, line.served, line.plans[-1], line.label)


def _short_labels(labels: list[str]) -> tuple[str, list[str]]:
    """(heading, labels): of several lists, the words that all labels have in one place go into the heading.

    ``h100, TP 4, batch 8`` becomes ``h100, 4, 8`` below ``…, TP, batch``.
    """
    parts = [[part.rpartition(" ")[::2] for part in label.split(", ")] for label in labels]
    if len(parts[0]) < 2:
        return "", labels
    return ", ".join(word or "…" for word, _ in parts[0]), [", ".join(value for _, value in each) for each in parts]


def _table(page: Page, lines: list[ItlLine]) -> None:
    rows = []
    heading, labels = _short_labels([line.label for line in lines])
    for line, label in zip(lines, labels, strict=True):
        for number, plan in enumerate(line.plans):
            low, high = plan.interval_s
            cells = [
                format_seconds(plan.itl_s),
                f"{low * 1e3:.1f}–{high * 1e3:.1f} ms",
                f"{plan.tokens_per_s_per_user:,.1f}",
                f"{plan.tokens_per_s_per_gpu:,.0f}",
            ]
            if plan.fits is False:
                cells = ["–", "does not fit", "–", "–"]
            rows.append([label if number == 0 else "", format_tokens(plan.point.context_tokens), *cells])
    page.table([heading, "context", "ITL", "80% interval", "tok/s/user", "tok/s/GPU"], rows, right=(1, 2, 3, 4, 5))
    page.line()


def _plot(page: Page, lines: list[ItlLine]) -> None:
    drawn = [PlotLine(line.label, _drawn_points(line)) for line in lines]
    drawn = [line for line in drawn if len(line.points) > 1]
    if not drawn:
        return
    longest = max(x for line in drawn for x, _ in line.points)
    for row in draw(drawn, ("0", f"{format_tokens(int(longest))} tokens"), width=min(page.width, 80) - 2):
        page.raw(row)
    page.line()


def _drawn_points(line: ItlLine) -> tuple[tuple[float, float], ...]:
    """(context, ms) of the points that fit, up to the longest context that does."""
    points = [(float(p.point.context_tokens or 0), p.itl_s * 1e3) for p in line.plans if p.fits is not False]
    end = line.max_context_tokens
    if points and len(points) < len(line.plans) and end is not None and end > points[-1][0]:
        points.append((float(end), (line.intercept_s + line.slope_s_per_token * end) * 1e3))
    return tuple(points)


def sentence(line: ItlLine) -> str:
    """Intercept, slope, ratio with its source, break-even, and where the KV ends."""
    if _is_too_large(line.served):
        return f"{line.label}: {_too_large(line.served)}, so there is no line to quote."
    batch = line.plans[0].point.batch_size or 1
    slope = line.slope_s_per_token * 1024
    text = (
        f"{line.label}: {format_seconds(line.intercept_s)} + {format_seconds(slope)} per 1k tokens at batch {batch:,}"
    )
    if line.is_piecewise:
        text += " (steeper while windows fill)"
    if line.slope_ratio is not None:
        text += (
            f"; slope {line.slope_ratio:.2f}× that of 16-bit KV, {line.slope_ratio_source} ({line.slope_ratio_detail})"
        )
    elif line.slope_ratio_detail:
        text += f"; {line.slope_ratio_detail}"
    if line.slope_ratio is not None:
        if line.break_even_tokens is None:
            text += f"; it never saves {format_percent(BREAK_EVEN_GAIN, 0)} of ITL"
        else:
            text += (
                f"; below {format_tokens(line.break_even_tokens)} tokens in flight (batch × context) it saves less "
                f"than {format_percent(BREAK_EVEN_GAIN, 0)}"
            )
    return f"{text}; {_ending(line)}."


def _never_runs(served: Served, plan: ItlPlan) -> bool:
    """Whether KV of not one request under load fits."""
    return _is_too_large(served) or (plan.fits is False and plan.load is not None and plan.load.wait_note is None)


def _is_too_large(served: Served) -> bool:
    """Whether nothing is left for KV."""
    return served.available_bytes is not None and served.available_bytes <= 0


def _too_large(served: Served) -> str:
    short = format_bytes(-(served.available_bytes or 0))
    request, engine = served.setup.request, served.setup.engine
    if request.kv_cache_memory_bytes is not None:
        return f"does not fit: the KV bytes given are {short} more than each GPU has left"
    if request.gpu_memory_utilization is not None and engine.fraction_of == "static":
        fraction = f"{engine.fraction_flag} {request.gpu_memory_utilization:g}"
        return f"does not fit: with {fraction}, {short} are missing on each GPU"
    return f"does not fit: weights and the engine's own memory exceed usable memory by {short} a GPU before any KV"


def _ending(line: ItlLine) -> str:
    limit = line.served.scheduler_limit(line.plans[0].point.batch_size or 1)
    if limit is not None and line.served.told:
        return f"{limit}, so this batch never does"
    return _kv_ending(line) + ("" if limit is None else f"; {limit}")


def _kv_ending(line: ItlLine) -> str:
    if not line.memory_known:
        return "memory unknown, so nothing is said about what fits"
    if line.max_context_tokens is None:
        return "the KV of this batch does not fit at any context"
    model_max = line.served.model.max_context_tokens
    if model_max is not None and line.max_context_tokens >= model_max:
        return f"the KV fits up to the model's own {format_tokens(model_max)} tokens"
    return f"the KV no longer fits beyond {format_tokens(line.max_context_tokens)} tokens"


def _sentence(page: Page, line: ItlLine) -> None:
    page.line(sentence(line))


def show_load(page: Page, plans: list[tuple[str, ItlPlan, Served]], *, explain: bool = False) -> None:
    """TPOT and TTFT of each plan."""
    _headlines(page, [(served, plan) for _, plan, served in plans])
    rows = []
    heading, labels = _short_labels([label for label, *_ in plans])
    for label, (_, plan, served) in zip(labels, plans, strict=True):
        assert plan.load is not None
        load = plan.load
        (low, high), (first, last) = load.tpot_interval_s, load.ttft_interval_s
        if _never_runs(served, plan):
            rows.append([label, "0", "–", "does not fit", "–", "–", "–"])
            continue
        rows.append(
            [
                label,
                f"{load.running_requests:,.0f}",
                format_seconds(load.tpot_s),
                f"{low * 1e3:,.1f}–{high * 1e3:,.1f}",
                format_seconds(load.ttft_s),
                f"{first:,.2f}–{last:,.2f}",
                f"{plan.tokens_per_s_per_gpu:,.0f}",
            ]
        )
    page.table(
        [heading, "running", "TPOT", "80%, ms", "TTFT", "80%, s", "tok/s/GPU"],
        rows,
        right=(1, 2, 3, 4, 5, 6),
    )
    page.line()
    for label, plan, served in plans:
        assert plan.load is not None
        if _never_runs(served, plan):
            why = _too_large(served) if _is_too_large(served) else "does not fit: KV holds not one request so long"
            page.line(f"{label}: {why}.")
            continue
        share = plan.load.prefill_wait_s / plan.load.tpot_s
        waiting = "" if plan.load.wait_note is None else f"; {plan.load.wait_note}"
        page.line(
            f"{label}: of TPOT, {format_seconds(plan.itl_s)} is the decode step and {format_percent(share, 0)} "
            f"waiting for other requests' prefill{waiting}.",
        )
    page.line(f"intervals: {plans[0][1].interval_note}", "dim")
    for name in ("tpot_s", "ttft_s"):
        page.line(f"{name.removesuffix('_s').upper()}: {DEFINITIONS[name]}", "dim")
    lengths = (
        "" if plans[0][1].point.length_spread is not None else "; lengths average 0.95 of nominal (--length-spread)"
    )
    page.line(
        f"closed loop: each client sends its next request when the last one ends; chunked prefill{lengths}", "dim"
    )
    if explain:
        for label, plan, served in plans:
            page.line()
            show_step(page, served, plan, label)
