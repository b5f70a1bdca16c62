"""A run: gates, roofline, cells and peers under a time budget, each record kept as it is taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from kvplan.errors import AnswerIsNo, InputError
from kvplan.measure import run_folder
from kvplan.measure.analysis import (
    CalibrationResult,
    MeasureReport,
    cell_rows,
    compare,
    line_rows,
    peer_rows,
)
from kvplan.measure.backend import (
    Backend,
    CellOutOfMemory,
    Gate,
    KernelFailure,
    RooflinePoint,
    StepTimer,
    Timed,
    open_backend,
)
from kvplan.measure.options import PEERS, Options, resolve_request
from kvplan.measure.plan import (
    BUILD_FACTOR,
    MEMORY_SHARE,
    Cell,
    Family,
    MeasureRequest,
    Skipped,
    plan_cells,
)
from kvplan.measure.predict import Predictor, find_predictor
from kvplan.measure.run_folder import RunFolder
from kvplan.measure.step_plan import (
    WEIGHT_BYTES,
    StepPredictor,
    StepReport,
    distinct_layers,
    step_lines,
    step_model,
    step_rows,
)
from kvplan.samples import CorruptLine, Sample
from kvplan.units import format_bytes, format_bytes_per_s, format_seconds

Say = Callable[[str], None]

REPLAYS = {"quick": 20, "thorough": 50}
BUDGET_S = {"quick": 60.0, "thorough": 600.0}
BASE = "bfloat16"
PEER_SIZES = ("num_q_heads", "num_kv_heads", "head_dim", "batch_size", "context_tokens")


class _Clock:
    """The time budget, and how far estimates are off on this device."""

    def __init__(self, started_s: float, budget_s: float) -> None:
        self.started_s, self.budget_s = started_s, budget_s
        self.estimated_s = self.spent_s = 0.0

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def left_s(self) -> float:
        return self.budget_s - self.elapsed_s()

    def has_room(self, estimate_s: float) -> bool:
        pace = self.spent_s / self.estimated_s if self.estimated_s else 1.0
        return estimate_s * min(max(pace, 0.05), 20.0) <= self.left_s()

    def record(self, estimate_s: float, spent_s: float) -> None:
        self.estimated_s += estimate_s
        self.spent_s += spent_s


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
    clock = _Clock(started_s, options.budget_s or BUDGET_S[request.effort])
    _check_budget(clock, request, backend)
    if options.resume is not None:
        folder = run_folder.reopen(options.resume, backend.environment)
    else:
        path = options.run_dir or run_folder.default_path(backend.environment.gpu)
        folder = run_folder.create(path, request, backend.environment)
    say(f"{backend.environment.device_name}: records go to {folder.path}")
    predictor = find_predictor(backend.environment)
    try:
        run = _Run(request, backend, folder, clock, say)
        run.go()
        return run.report(predictor, options)
    except KeyboardInterrupt:
        say(f"what was recorded is kept; go on with: kvplan measure --resume {folder.path}")
        raise


def _check_budget(clock: _Clock, request: MeasureRequest, backend: Backend) -> None:
    need = backend.defaults.setup_s + backend.defaults.family_s * len(request.families)
    if clock.left_s() < need:
        raise InputError(
            f"a budget of {format_seconds(clock.budget_s)} is too small: {format_seconds(clock.elapsed_s())} went into "
            f"starting, and roofline and gates of {len(request.families)} formats take about {format_seconds(need)}",
            hint=f"give --budget {max(1, round(2 * (need + clock.elapsed_s()) + 0.5))}s or more, or fewer formats",
            code="budget_too_small",
        )


def _step(timer: StepTimer, cell: Cell, *, replays: int, seed: int) -> Timed:
    return timer.time(cell.family, cell.batch_size, cell.context_tokens, layers=cell.layers, replays=replays)


class _Run:
    """One run on one device: what it found so far."""

    def __init__(self, request: MeasureRequest, backend: Backend, folder: RunFolder, clock: _Clock, say: Say) -> None:
        self.request, self.backend, self.folder, self.clock, self.say = request, backend, folder, clock, say
        self.gates: list[Gate] = []
        self.roofline: list[RooflinePoint] = []
        self.skipped: list[Skipped] = []
        self.corrupt: list[CorruptLine] = []

    def go(self) -> None:
        """Gates, roofline, cells, peers, in this order."""
        for family in self.request.families:
            self._gate(family)
        self._roofline()
        done, self.corrupt = self.folder.samples()
        for line in self.corrupt:
            self.say(f"{self.folder.samples_path} line {line.line_number}: {line.reason}; set aside in corrupt.txt")
        self._cells({run_folder.cell_key(sample) for sample in done})
        for name in self.request.compare:
            self._peers(name)
        if self.request.step_context_tokens:
            self._steps()

    def _gate(self, family: Family) -> None:
        try:
            gate = self.backend.gate(family, self.request.seed)
        except (KernelFailure, CellOutOfMemory) as error:
            raise AnswerIsNo(f"gate of {family.describe()}: the kernel did not run: {error}; nothing of it was timed",
                             hint="fewer formats leave it out", code="gate_failed") from error  # fmt: skip
        self.gates.append(gate)
        self.folder.add("gates", {**asdict(gate), "passed": gate.passed})
        if not gate.passed:
            off = "its output is not finite" if gate.error is None else f"the kernel is off by {gate.error:.1e}"
            raise AnswerIsNo(
                f"gate of {family.describe()}: {off} (largest relative error of a row against the float64 reference), "
                f"{gate.tolerance:.0e} is allowed; nothing of it was timed",
                hint=f"records: {self.folder.path}", code="gate_failed",
            )  # fmt: skip
        self.say(f"gate {family.kv_dtype}: error {gate.error:.1e}, {gate.tolerance:.0e} allowed")

    def _roofline(self) -> None:
        try:
            self.roofline = self.backend.read_roofline()
        except (KernelFailure, CellOutOfMemory) as error:
            raise AnswerIsNo(f"the read kernel did not run: {error}", code="kernel_failed") from error
        for point in self.roofline:
            self.folder.add("roofline", {**asdict(point), "bytes_per_s": point.bytes_per_s})
        self.say(f"read roofline: {format_bytes_per_s(self.roofline_bytes_per_s)}")

    @property
    def roofline_bytes_per_s(self) -> float:
        """The best read rate of any size."""
        return max(point.bytes_per_s for point in self.roofline)

    def _cells(self, done: set[tuple[Any, ...]]) -> None:
        cells, self.skipped = self._planned(self.request)
        for number, cell in enumerate(cells, 1):
            if cell.key in done:
                continue
            time_it = partial(self.backend.time, cell, tune=self.request.effort == "thorough")
            timed = self._timed(cell, cell.describe(), time_it)
            if timed is not None:
                self.folder.add_sample(self._sample(cell, timed))
                rate = timed.read_bytes / timed.latency_s
                share = rate / self.roofline_bytes_per_s
                self.say(f"[{number}/{len(cells)}] {cell.describe()}: {format_seconds(timed.latency_s)}, "
                         f"{format_bytes_per_s(rate)}, {share:.0%} of the roofline")  # fmt: skip
        if not self.folder.samples()[0]:
            raise InputError(
                f"no cell was timed: {self.skipped[0].cell}: {self.skipped[0].reason}",
                hint="a larger --budget, or a smaller --batch and --ctx", code="nothing_measured",
            )  # fmt: skip

    def _planned(self, request: MeasureRequest) -> tuple[list[Cell], list[Skipped]]:
        return plan_cells(
            request,
            free_bytes=self.backend.free_bytes(),
            l2_bytes=self.backend.environment.l2_cache_bytes,
            max_layers=self.backend.defaults.max_layers,
        )

    def _peers(self, name: str) -> None:
        if reason := self.backend.peer_missing(name):
            self.skipped.append(Skipped(PEERS[name], reason))
            return
        done = {(r["name"], r.get("kv_dtype", BASE), *(r[size] for size in PEER_SIZES))
                for r in self.folder.records("peers")}  # fmt: skip
        dtypes = tuple(d for d in (BASE, "fp8") if d in self.request.kv_dtypes and name != "torch") or (BASE,)
        for shape in self.request.shapes:
            if shape.window_tokens is not None:
                continue
            cells, skipped = self._planned(replace(self.request, shapes=(shape,), kv_dtypes=dtypes))
            self.skipped += [Skipped(f"{name}: {item.cell}", item.reason) for item in skipped]
            for cell in cells:
                sizes = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, cell.batch_size, cell.context_tokens)
                if (PEERS[name], cell.family.kv_dtype, *sizes) in done:
                    continue
                label = f"{name}: {cell.describe()}"
                timed = self._timed(cell, label, partial(self.backend.time_peer, name, cell), optional=True)
                if timed is not None:
                    record = {"name": PEERS[name], "kv_dtype": cell.family.kv_dtype}
                    self.folder.add("peers", {**record, **dict(zip(PEER_SIZES, sizes, strict=True)), **asdict(timed)})
                    self.say(f"{label}: {format_seconds(timed.latency_s)}")

    def _steps(self) -> None:
        model, batch = step_model(self.request.model or ""), max(self.request.batch_sizes)
        done = {(r["kv_dtype"], r["batch_size"], r["context_tokens"]) for r in self.folder.records("steps")}
        weights = model.weight_bytes * self.backend.defaults.step_bytes_per_weight // WEIGHT_BYTES
        room = int(self.backend.free_bytes() * MEMORY_SHARE)
        free = room - weights
        if free <= 0:
            reason = f"its weights need {format_bytes(weights)}, {format_bytes(room)} are free"
            self.skipped.append(Skipped(f"whole step of {model.name}", reason))
            return
        timer: StepTimer | None = None
        for context in sorted(set(self.request.step_context_tokens)):
            for family in self.request.families:
                layers = distinct_layers(family, batch, context, model.num_layers)
                cell = Cell(family, batch, context, layers)
                name = f"whole step, {cell.describe()}"
                need = int(layers * cell.layer_bytes * BUILD_FACTOR)
                if (family.kv_dtype, batch, context) in done:
                    continue
                if need > free:
                    self.skipped.append(Skipped(name, f"needs {format_bytes(need)}, {format_bytes(free)} are free"))
                    continue
                timer = timer or self.backend.open_step(model, self.request.seed)
                timed = self._timed(replace(cell, layers=model.num_layers), name, partial(_step, timer, cell))
                if timed is not None:
                    record = {"kv_dtype": family.kv_dtype, "batch_size": batch, "context_tokens": context}
                    self.folder.add("steps", {**record, "distinct_layers": layers, **asdict(timed)})
                    self.say(f"{name}: {format_seconds(timed.latency_s)}")

    def _timed(self, cell: Cell, name: str, time_it: Callable[..., Timed], *, optional: bool = False) -> Timed | None:
        """Time a cell if the budget has room and the memory holds it; None, and listed, otherwise.

        A kernel of ours that does not run ends the run; an ``optional`` one is listed.
        """
        replays = REPLAYS[self.request.effort]
        estimate = self.backend.estimate_s(cell, replays)
        if not self.clock.has_room(estimate):
            self.skipped.append(Skipped(name, f"the time budget of {format_seconds(self.clock.budget_s)} is spent"))
            return None
        begin = time.monotonic()
        try:
            timed = time_it(replays=replays, seed=self.request.seed)
        except CellOutOfMemory as error:
            self.skipped.append(Skipped(name, f"out of memory: {error}"))
            self.say(f"{name}: out of memory, skipped")
            return None
        except KernelFailure as error:
            if optional:
                self.skipped.append(Skipped(name, str(error)))
                return None
            raise AnswerIsNo(
                f"{name}: the kernel did not run: {error}",
                hint=f"the samples before it are kept in {self.folder.path}",
                code="kernel_failed",
            ) from error
        self.clock.record(estimate, time.monotonic() - begin)
        return timed

    def _sample(self, cell: Cell, timed: Timed) -> Sample:
        family, shape = cell.family, cell.family.shape
        return Sample(
            batch_size=cell.batch_size, context_tokens=cell.context_tokens, num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, window_tokens=shape.window_tokens or 0,
            kv_dtype=family.kv_dtype, scale_granularity=family.scale_granularity, latency_s=timed.latency_s,
            p10_s=timed.p10_s, p90_s=timed.p90_s, num_replays=timed.num_replays, read_bytes=timed.read_bytes,
            layers=cell.layers, layout=timed.layout, block_size_tokens=timed.block_size_tokens,
            seed=self.request.seed, sm_clock_hz=timed.sm_clock_hz, kernel_facts=timed.kernel_facts,
            environment=self.backend.environment.brief(), time=run_folder.timestamp(),
        )  # fmt: skip

    def report(self, predictor: Predictor | None, options: Options) -> MeasureReport:
        """The report of everything in the folder, written there too; ends by calibrating."""
        samples = self.folder.samples()[0]
        roof = self.roofline_bytes_per_s
        rows = cell_rows(samples, roof, predictor.latency_s if predictor else None)
        prediction = compare(rows, predictor.kind, predictor.source) if predictor else None
        calibration = self._calibrate(roof) if options.calibrate else None
        if calibration is not None and calibration.path is not None:
            predictor = find_predictor(self.backend.environment)
        report = MeasureReport(
            run_dir=str(self.folder.path), request=self.request.as_dict(),
            environment=self.backend.environment.as_dict(), notes=self._notes(samples),
            roofline_bytes_per_s=roof, roofline=self.roofline, gates=self.gates, lines=line_rows(samples, roof),
            cells=rows, peers=peer_rows(self.folder.records("peers"), samples), skipped=self.skipped,
            corrupt_lines=[{"line_number": line.line_number, "reason": line.reason} for line in self.corrupt],
            tolerance=options.tolerance, prediction=prediction,
            within_tolerance=None if prediction is None else prediction.median_error <= options.tolerance,
            calibration=calibration, steps=self._step_report(predictor), elapsed_s=self.clock.elapsed_s(),
        )  # fmt: skip
        self.folder.write_report(report.to_json() + "\n")
        return report

    def _step_report(self, predictor: Predictor | None) -> StepReport | None:
        """The whole steps of the folder beside what this run's calibration and ``kvplan itl`` make of them."""
        records = self.folder.records("steps")
        if not records or self.request.model is None:
            return None
        model, environment = step_model(self.request.model), self.backend.environment
        families = self.request.families
        predict = None
        if predictor is not None and environment.profile:
            predict = StepPredictor(self.request.model, model, environment, predictor.latency_s, predictor.source)
        rows = step_rows(records, families, predict)
        source = predict.source if predict is not None else None
        return StepReport(model.name, model.weight_bytes, source, rows, step_lines(rows, families))

    def _calibrate(self, roof: float) -> CalibrationResult:
        from kvplan.measure.fit import calibrate_run

        return calibrate_run(self.folder, self.backend.environment, roof)

    def _notes(self, samples: Sequence[Sample]) -> list[str]:
        notes = []
        kind = self.backend.environment.kind
        if kind == "cpu":
            notes.append("a CPU is not a GPU: this is the torch reference in float32 on this CPU, and FP8 will not be "
                         "faster here")  # fmt: skip
        if kind == "rocm":
            notes.append("the kernels have not been tested on ROCm")
        if not any(sample.kv_dtype == BASE for sample in samples):
            notes.append("no slope ratios: bf16 was not measured")
        return notes
