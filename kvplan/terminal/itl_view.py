"""``kvplan itl`` on a terminal: a table, the lines, and the sentence that matters about each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvplan.latency.lines import BREAK_EVEN_GAIN, ItlLine, traffic_of
from kvplan.latency.plan import DEFINITIONS, ItlPlan
from kvplan.latency.planner import collective_latency_s, kernel_kv_stream, parameters_of
from kvplan.latency.step import stream_share
from kvplan.terminal.plain import Page
from kvplan.terminal.plot import PlotLine, draw
from kvplan.units import format_bytes, format_bytes_per_s, format_percent, format_seconds, format_tokens

LINK_NAMES = {"nvlink": "NVLink", "xgmi": "xGMI", "pcie": "PCIe"}

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
            _explain(page, line.served, line.plans[-1], line.label)


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
            _explain(page, served, plan, label)


def _explain(page: Page, served: Served, plan: ItlPlan, label: str) -> None:
    """The formula with the numbers in it, and the traffic behind them."""
    parts, traffic = plan.breakdown, traffic_of(served, plan)
    page.line(f"{label} at {plan.context_tokens:,.0f} tokens: {format_seconds(plan.itl_s)} =", "bold")
    peak = served.peaks.bandwidth_bytes_per_s
    read, kv = traffic["weights_read_bytes"], traffic["kv_read_bytes"]
    total = sum(read.values())
    rows = [
        (
            "weights",
            parts.weights_s,
            f"{format_bytes(total)} read a step and GPU; {format_seconds(total / peak)} at {format_bytes_per_s(peak)}",
        ),
        (
            "compute",
            parts.compute_s,
            f"{traffic['matrix_flops'] / 1e9:,.1f} GFLOP of matrix products, where weights do not hide them",
        ),
        (
            "kv",
            parts.kv_s,
            f"{format_bytes(kv)} read, {format_bytes(traffic['kv_stored_bytes'])} stored; "
            f"{format_seconds(kv / peak)} at peak",
        ),
        (
            "collectives",
            parts.collectives_s,
            _collectives(served, plan, traffic["collectives"]),
        ),
        ("overhead", parts.overhead_s, f"{served.traffic.num_kernels:,} kernels, the step, and its sequences"),
    ]
    for name, seconds, how in rows:
        page.line(f"  {name:<12}{format_seconds(seconds):>10}  {how}")
    experts = traffic["expert_share_read"]
    shown = ", ".join(f"{name} {format_bytes(size)}" for name, size in read.items() if size)
    page.line(f"  weights: {shown}", "dim")
    if experts is not None:
        page.line(
            f"  experts touched: {experts:.1%} of {served.traffic.num_experts}, skewed routing; uniform: "
            f"1 − (1 − {served.traffic.top_k_experts}/{served.traffic.num_experts})^tokens = "
            f"{traffic['expert_share_uniform']:.1%}",
            "dim",
        )
    for part in traffic["kv_layers"]:
        limit = "" if part["limit_tokens"] is None else f", at most {format_tokens(part['limit_tokens'])} tokens"
        page.line(
            f"  kv: {part['num_layers']} {part['kind']} layers read {format_bytes(part['read_bytes'])}{limit}",
            "dim",
        )
    for text in _parameters(served, plan):
        page.line(f"  {text}", "dim")
    page.line(f"  roofline (bytes at peak, nothing else): {format_seconds(plan.roofline_s)}", "dim")
    page.line(f"  KV format: {served.kv_speed.detail}", "dim")


def _collectives(served: Served, plan: ItlPlan, counts: Mapping[str, int]) -> str:
    """How many messages of each kind, through what, and what one takes: its latency, and the data it moves."""
    kinds = {"all_reduce_count": "all-reduces", "all_to_all_count": "all-to-alls", "p2p_count": "sends"}
    found = {name: counts[key] for key, name in kinds.items() if counts[key]}
    if not found:
        return "one GPU: none"
    link = LINK_NAMES[served.gpu.link_kind or "pcie"]
    each, start = plan.breakdown.collectives_s / sum(found.values()), collective_latency_s(served)
    named = ", ".join(f"{count} {name}" for name, count in found.items())
    return f"{named} over {link}: {format_seconds(start)} each and {format_seconds(max(each - start, 0))} of data"


def _parameters(served: Served, plan: ItlPlan) -> list[str]:
    """What the parameters of this deployment are, in words."""
    p = parameters_of(served)
    is_moe = served.traffic.num_experts > 0
    kernel_s = format_seconds(math.exp(p["kernel_moe_s"] if is_moe else p["kernel_dense_s"]))
    experts = f", experts at {float(stream_share(p['expert_stream'])):.0%}" if is_moe else ""
    weights, kv = (float(stream_share(p[name])) for name in ("weight_stream", "kv_stream"))
    step, sequence = (format_seconds(math.exp(p[n])) for n in ("step_s", "sequence_s"))
    found = [
        f"{plan.source}: weights at {weights:.0%} of peak bandwidth{experts}, KV at {kv:.0%}; "
        f"{kernel_s} a kernel, {step} a step, {sequence} a sequence"
    ]
    kernel = kernel_kv_stream(served)
    if kernel is not None:
        found.append(f"the attention kernel alone, as calibrated, reads 16-bit KV at {kernel:.0%} of peak bandwidth")
    return found
