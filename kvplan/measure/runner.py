"""The work of a run: gates, roofline, cells, peers and whole steps under a time budget, each kept as it is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from kvplan.errors import AnswerIsNo, InputError
from kvplan.measure import run_folder
from kvplan.measure.backend import (
    Backend,
    CellOutOfMemory,
    Gate,
    KernelFailure,
    RooflinePoint,
    StepTimer,
    Timed,
)
from kvplan.measure.family import Family
from kvplan.measure.plan import (
    BUILD_FACTOR,
    MEMORY_SHARE,
    PEERS,
    REPLAYS,
    Cell,
    MeasureRequest,
    Skipped,
    plan_cells,
)
from kvplan.measure.run_folder import RunFolder
from kvplan.measure.step_plan import distinct_layers, step_model
from kvplan.samples import CorruptLine, Sample
from kvplan.units import format_bytes, format_bytes_per_s, format_seconds

Say = Callable[[str], None]

BASE = "bfloat16"
PEER_SIZES = ("num_q_heads", "num_kv_heads", "head_dim", "batch_size", "context_tokens")


class Clock:
    """The time budget, and how far estimates are off on this device."""

    def __init__(self, started_s: float, budget_s: float) -> None:
        self.started_s, self.budget_s = started_s, budget_s
        self.estimated_s = self.spent_s = 0.0

    def elapsed_s(self) -> float:
        """Since the budget began."""
        return time.monotonic() - self.started_s

    def left_s(self) -> float:
        """Of the budget."""
        return self.budget_s - self.elapsed_s()

    def has_room(self, estimate_s: float) -> bool:
        """Whether work of this estimate fits, corrected by how earlier estimates came out."""
        pace = self.spent_s / self.estimated_s if self.estimated_s else 1.0
        return estimate_s * min(max(pace, 0.05), 20.0) <= self.left_s()

    def record(self, estimate_s: float, spent_s: float) -> None:
        """Note how long work of an estimate took."""
        self.estimated_s += estimate_s
        self.spent_s += spent_s


def _step(timer: StepTimer, cell: Cell, *, replays: int, seed: int) -> Timed:
    return timer.time(cell.family, cell.batch_size, cell.context_tokens, layers=cell.layers, replays=replays)


class Run:
    """One run on one device: what it found so far."""

    def __init__(self, request: MeasureRequest, backend: Backend, folder: RunFolder, clock: Clock, say: Say) -> None:
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
        done = {(r["name"], r["kv_dtype"], *(r[size] for size in PEER_SIZES))
                for r in self.folder.records("peers")}  # fmt: skip
        dtypes = tuple(d for d in (BASE, "fp8") if d in self.request.kv_dtypes and name != "torch") or (BASE,)
        for shape in self.request.shapes:
            if shape.window_tokens is not None:
                continue
            if shape.latent_dim:
                self.skipped.append(Skipped(PEERS[name], "nothing is compared on latent attention"))
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
        model = step_model(self.request.model or "", self.request.step_weight_dtype)
        batch = max(self.request.batch_sizes)
        done = {(r["kv_dtype"], r["batch_size"], r["context_tokens"]) for r in self.folder.records("steps")}
        weights = model.stored_bytes(self.backend.defaults.step_bytes_per_weight)
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
            latent_dim=shape.latent_dim or 0, kv_dtype=family.kv_dtype, scale_granularity=family.scale_granularity,
            latency_s=timed.latency_s, p10_s=timed.p10_s, p90_s=timed.p90_s, num_replays=timed.num_replays,
            read_bytes=timed.read_bytes, layers=cell.layers, layout=timed.layout,
            block_size_tokens=timed.block_size_tokens, seed=self.request.seed, sm_clock_hz=timed.sm_clock_hz,
            kernel_facts=timed.kernel_facts, environment=self.backend.environment.brief(),
            time=run_folder.timestamp(),
        )  # fmt: skip
