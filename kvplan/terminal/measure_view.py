"""``kvplan measure`` on a terminal: the roofline first, what reaches it, then predictions against it all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplan.measure.analysis import CalibrationResult, CellRow, Comparison, MeasureReport
from kvplan.measure.step_plan import StepReport
from kvplan.terminal.console import add_row, make_table, print_line
from kvplan.units import format_bytes_per_s, format_count, format_percent, format_ratio, format_seconds, format_tokens

if TYPE_CHECKING:
    from rich.console import Console

MAX_SKIPPED = 12


def show_measure(console: Console, report: MeasureReport) -> None:
    """Print the whole report."""
    env = report.environment
    versions = f"torch {env['torch']}" + (f", triton {env['triton']}" if env["triton"] else "")
    driver = f" · driver {env['driver']}" if env["driver"] else ""
    print_line(console, f"{env['device_name']}{driver} · {versions} · kvplan {env['kvplan']}", "bold")
    for note in report.notes:
        print_line(console, f"note: {note}", "yellow")
    largest = max(point.read_bytes for point in report.roofline) / 1e9
    sizes = f"best of {len(report.roofline)} sizes up to {largest:,.2g} GB, this run"
    print_line(console, f"read roofline {format_bytes_per_s(report.roofline_bytes_per_s)} ({sizes})", "bold")
    for shape in dict.fromkeys(row.shape for row in report.cells):
        _shape_lines(console, report, shape)
        _cells(console, [row for row in report.cells if row.shape == shape])
        _formats(console, report, shape)
    _peers(console, report)
    if report.steps is not None:
        _steps(console, report.steps)
    _skipped(console, report)
    _prediction(console, report)
    _calibration(console, report.calibration)
    print_line(console, f"{format_count(len(report.cells), 'sample')} in {report.run_dir} · {report.elapsed_s:.0f} s")


def _shape_lines(console: Console, report: MeasureReport, shape: str) -> None:
    rows = [row for row in report.lines if row.shape == shape]
    if not rows:
        return
    console.print()
    table = make_table(
        "KV dtype", "batch", "at 0", "per 1k", "streams at", "roofline", "slope/bf16", "floor",
        title=f"Latency over context: {shape}", right=(1, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip
    for row in rows:
        add_row(
            table, row.kv_dtype, f"{row.batch_size:,}", _signed(row.intercept_s),
            _signed(1024 * row.slope_s_per_token), format_bytes_per_s(row.bytes_per_s) if row.bytes_per_s else "–",
            format_percent(row.roofline_fraction), format_ratio(row.slope_ratio, 3), format_ratio(row.floor, 3),
        )  # fmt: skip
    console.print(table)


def _error(share: float | None) -> str:
    return ("+" if share is not None and share > 0 else "") + format_percent(share)


def _signed(seconds: float) -> str:
    return format_seconds(seconds) if seconds >= 0 else f"−{format_seconds(-seconds)}"


def _cells(console: Console, rows: list[CellRow]) -> None:
    console.print()
    table = make_table("KV dtype", "batch", "context", "measured", "p10–p90", "roofline", "predicted", "error",
                       title="Predicted and measured", right=(1, 2, 3, 4, 5, 6, 7))  # fmt: skip
    for row in rows:
        spread = (row.p90_s - row.p10_s) / row.latency_s
        predicted = "–" if row.predicted_s is None else format_seconds(row.predicted_s)
        add_row(
            table, row.kv_dtype, f"{row.batch_size:,}", format_tokens(row.context_tokens),
            format_seconds(row.latency_s), format_percent(spread),
            format_percent(row.roofline_fraction), predicted, _error(row.prediction_error),
        )  # fmt: skip
    console.print(table)


def _formats(console: Console, report: MeasureReport, shape: str) -> None:
    console.print()
    table = make_table(
        "KV dtype", "gate error", "allowed", "format error", "registers", "spills",
        title="Gates, and what each format loses", right=(1, 2, 3, 4, 5),
    )  # fmt: skip
    for gate in report.gates:
        if gate.shape != shape:
            continue
        mine = [row for row in report.cells if row.kv_dtype == gate.kv_dtype and row.shape == gate.shape]
        add_row(
            table, gate.kv_dtype, "–" if gate.error is None else f"{gate.error:.1e}", f"{gate.tolerance:.0e}",
            "–" if gate.format_error is None else format_percent(gate.format_error, 2),
            _most([row.registers for row in mine]), _most([row.spills for row in mine]),
        )  # fmt: skip
    console.print(table)


def _most(values: list[int | None]) -> str:
    known = [value for value in values if value is not None]
    return str(max(known)) if known else "–"


def _peers(console: Console, report: MeasureReport) -> None:
    if not report.peers:
        return
    console.print()
    table = make_table("beside ours", "KV dtype", "batch", "context", "measured", "reads at", "ours = 1",
                       title="Others on the same sizes and format", right=(2, 3, 4, 5, 6), wrap=(0,))  # fmt: skip
    for row in report.peers:
        add_row(table, row.name, row.kv_dtype, f"{row.batch_size:,}", format_tokens(row.context_tokens),
                format_seconds(row.latency_s), format_bytes_per_s(row.bytes_per_s),
                format_ratio(row.speed_ratio))  # fmt: skip
    console.print(table)


def _steps(console: Console, steps: StepReport) -> None:
    console.print()
    table = make_table("KV dtype", "batch", "context", "ITL", "p10–p90", "predicted", "error",
                       title=f"Whole decode step: {steps.model}, random {steps.weight_dtype} weights",
                       right=(1, 2, 3, 4, 5, 6))  # fmt: skip
    for row in steps.rows:
        add_row(
            table, row.kv_dtype, f"{row.batch_size:,}", format_tokens(row.context_tokens), format_seconds(row.itl_s),
            format_percent((row.p90_s - row.p10_s) / row.itl_s),
            "–" if row.predicted_s is None else format_seconds(row.predicted_s),
            _error(row.prediction_error),
        )  # fmt: skip
    console.print(table)
    for line in steps.lines:
        ratio = ""
        if line.slope_ratio is not None and line.floor != 1:
            ratio = f"; slope {format_ratio(line.slope_ratio, 3)} bf16's, floor {format_ratio(line.floor, 3)}"
        sign = "+" if line.slope_s_per_token >= 0 else "−"
        per_1k = format_seconds(abs(1024 * line.slope_s_per_token))
        fit = f", R² {line.r_squared:.5f}" if line.num_points > 2 else ""  # two points are always on a line
        law = f"{_signed(line.intercept_s)} {sign} {per_1k} per 1k tokens of context{fit}"
        print_line(console, f"{line.kv_dtype}: {law}{ratio}")
    if steps.source is not None:
        print_line(console, f"predicted: {steps.source}")


def _skipped(console: Console, report: MeasureReport) -> None:
    if not report.skipped and not report.corrupt_lines:
        return
    console.print()
    for item in report.skipped[:MAX_SKIPPED]:
        print_line(console, f"skipped {item.cell}: {item.reason}", "yellow")
    if len(report.skipped) > MAX_SKIPPED:
        print_line(console, f"… and {len(report.skipped) - MAX_SKIPPED} more, in report.json", "yellow")
    for line in report.corrupt_lines:
        print_line(console, f"samples.jsonl line {line['line_number']} set aside: {line['reason']}", "yellow")


def _prediction(console: Console, report: MeasureReport) -> None:
    console.print()
    if report.prediction is None:
        print_line(console, "predicted: nothing; kvplan has no calibration of this device and no datasheet for it")
        return
    verdict = "within" if report.within_tolerance else "OUTSIDE"
    style = "bold green" if report.within_tolerance else "bold red"
    print_line(console, f"predicted vs measured: {_errors(report.prediction)}; {verdict} the tolerance of "
                   f"{format_percent(report.tolerance)}", style)  # fmt: skip
    print_line(console, f"predictions are {report.prediction.kind}: {report.prediction.source}")


def _errors(comparison: Comparison) -> str:
    return (f"median error {format_percent(comparison.median_error)}, worst {format_percent(comparison.worst_error)} "
            f"({comparison.worst_cell})")  # fmt: skip


def _calibration(console: Console, result: CalibrationResult | None) -> None:
    if result is None:
        return
    if result.path is None:
        print_line(console, f"not calibrated: {result.problem}", "yellow")
        return
    print_line(console, f"calibrated {result.gpu}: written to {result.path}")
    if result.after is not None:
        print_line(console, f"  fit of these samples: {_errors(result.after)}")
