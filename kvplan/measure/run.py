"""A run from its options to its report."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvplan.calibration.latent import FLOPS_PER_ROW
from kvplan.errors import InputError
from kvplan.kernels.formats import LATENT_ROW_BYTES
from kvplan.measure import run_folder
from kvplan.measure.analysis import (
    CalibrationResult,
    MeasureReport,
    cell_rows,
    compare,
    line_rows,
    peer_rows,
)
from kvplan.measure.backend import Backend, open_backend
from kvplan.measure.options import Options, resolve_request
from kvplan.measure.plan import MeasureRequest
from kvplan.measure.predict import Predictor, find_predictor
from kvplan.measure.runner import BASE, Clock, Run, Say
from kvplan.measure.step_plan import StepPredictor, StepReport, step_lines, step_model, step_rows
from kvplan.samples import Sample
from kvplan.units import format_seconds

BUDGET_S = {"quick": 60.0, "thorough": 600.0}


def measure(options: Options, say: Say = lambda _: None, started_s: float | None = None) -> MeasureReport:
    """Measure the device at hand and hold predictions against it.

    Args:
        options: what to measure.
        say: gets one line of progress at a time.
        started_s: ``time.monotonic()`` when the time budget began (now).

    Raises:
        InputError: the request cannot be measured, or the run folder cannot be used.
        AnswerIsNo: a kernel failed its gate, or did not run; what was recorded before is kept.
        MissingDependencyError: no torch, no triton or no GPU.

    """
    started_s = time.monotonic() if started_s is None else started_s
    resumed = None if options.resume is None else run_folder.read_request(options.resume)
    backend = open_backend(options.device if resumed is None else resumed.device)
    request = resumed or resolve_request(options, backend)
    clock = Clock(started_s, options.budget_s or BUDGET_S[request.effort])
    _check_budget(clock, request, backend)
    if options.resume is not None:
        folder = run_folder.reopen(options.resume, backend.environment)
    else:
        path = options.run_dir or run_folder.default_path(backend.environment.gpu)
        folder = run_folder.create(path, request, backend.environment)
    say(f"{backend.environment.device_name}: records go to {folder.path}")
    predictor = find_predictor(backend.environment, request.latent_heads)
    try:
        run = Run(request, backend, folder, clock, say)
        run.go()
        return _report(run, predictor, options)
    except KeyboardInterrupt:
        say(f"what was recorded is kept; go on with: kvplan measure --resume {folder.path}")
        raise


def _check_budget(clock: Clock, request: MeasureRequest, backend: Backend) -> None:
    need = backend.defaults.setup_s + backend.defaults.family_s * len(request.families)
    if clock.left_s() < need:
        raise InputError(
            f"a budget of {format_seconds(clock.budget_s)} is too small: {format_seconds(clock.elapsed_s())} went into "
            f"starting, and roofline and gates of {len(request.families)} formats take about {format_seconds(need)}",
            hint=f"give --budget {max(1, round(2 * (need + clock.elapsed_s()) + 0.5))}s or more, or fewer formats",
            code="budget_too_small",
        )


def _report(run: Run, predictor: Predictor | None, options: Options) -> MeasureReport:
    """The report of everything in the folder, written there too; ends by calibrating."""
    samples, own = run.folder.samples()[0], run.folder.has_calibrated()
    roof = run.roofline_bytes_per_s
    rows = cell_rows(samples, roof, predictor.latency_s if predictor else None)
    prediction = compare(rows, predictor.kind, predictor.source) if predictor else None
    calibration = _calibrate(run, roof) if options.calibrate else None
    if calibration is not None and calibration.path is not None:
        predictor = find_predictor(run.backend.environment, run.request.latent_heads)
    notes = _notes(run, samples)
    if own and prediction is not None and prediction.kind == "calibrated":
        notes.append("this run has written a calibration before: where it is still the one in use, predictions are of "
                     "samples it was fitted to")  # fmt: skip
    report = MeasureReport(
        run_dir=str(run.folder.path), request=run.request.as_dict(),
        environment=run.backend.environment.as_dict(), notes=notes,
        roofline_bytes_per_s=roof, roofline=run.roofline, gates=run.gates, lines=line_rows(samples, roof),
        cells=rows, peers=peer_rows(run.folder.records("peers"), samples), skipped=run.skipped,
        corrupt_lines=[{"line_number": line.line_number, "reason": line.reason} for line in run.corrupt],
        tolerance=options.tolerance, prediction=prediction,
        within_tolerance=None if prediction is None else prediction.median_error <= options.tolerance,
        calibration=calibration, steps=_step_report(run, predictor), elapsed_s=run.clock.elapsed_s(),
    )  # fmt: skip
    run.folder.write_report(report.to_json() + "\n")
    return report


def _step_report(run: Run, predictor: Predictor | None) -> StepReport | None:
    """The whole steps of the folder beside what this run's calibration and ``kvplan itl`` make of them."""
    records = run.folder.records("steps")
    if not records or run.request.model is None:
        return None
    model, environment = step_model(run.request.model, run.request.step_weight_dtype), run.backend.environment
    families = run.request.families
    predict = None
    if predictor is not None and environment.profile:
        predict = StepPredictor(run.request.model, model, environment, predictor.latency_s, predictor.source)
    rows = step_rows(records, families, predict)
    source = predict.source if predict is not None else None
    return StepReport(model.name, model.weight_dtype, model.weight_bytes, source, rows, step_lines(rows, families))


def _calibrate(run: Run, roof: float) -> CalibrationResult:
    from kvplan.measure.fit import calibrate_run

    return calibrate_run(run.folder, run.backend.environment, roof)


def _notes(run: Run, samples: Sequence[Sample]) -> list[str]:
    notes = []
    kind = run.backend.environment.kind
    if kind == "cpu":
        notes.append("a CPU is not a GPU: this is the torch reference in float32 on this CPU, and FP8 will not be "
                     "faster here")  # fmt: skip
    if kind == "rocm":
        notes.append("the kernels have not been tested on ROCm")
    if run.request.latent_heads is not None:
        notes.append(_latent_note(run.request.latent_heads))
    if not any(sample.kv_dtype == BASE for sample in samples):
        notes.append("no slope ratios: bf16 was not measured")
    return notes


def _latent_note(num_heads: int) -> str:
    """Why many heads do not reach the read roofline: FLOPs of the two products over bytes of a row."""
    wide, narrow = (num_heads * FLOPS_PER_ROW / LATENT_ROW_BYTES[name] for name in ("bf16", "fp8_e4m3"))
    return (f"latent attention multiplies each row with all {num_heads} query heads, {wide:.0f} FLOPs a byte in bf16 "
            f"and {narrow:.0f} in fp8: with many heads that takes longer than reading it")  # fmt: skip
