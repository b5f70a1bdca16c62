"""From samples to a report: rates, slopes, ratios, prediction errors."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvplan.measure.backend import Gate, RooflinePoint
from kvplan.measure.family import Family, Shape
from kvplan.measure.plan import Cell, Skipped
from kvplan.samples import Sample

if TYPE_CHECKING:
    from kvplan.measure.step_plan import StepReport

SCHEMA_VERSION = 1
BASE = "bfloat16"
MIN_POINTS = 2


@dataclass(frozen=True, slots=True)
class CellRow:
    """One cell: measured, and what was predicted (None: nothing was). ``prediction_error`` is relative and signed."""

    shape: str
    kv_dtype: str
    batch_size: int
    context_tokens: int
    latency_s: float
    p10_s: float
    p90_s: float
    read_bytes: int
    bytes_per_s: float
    roofline_fraction: float
    registers: int | None
    spills: int | None
    predicted_s: float | None
    prediction_error: float | None


@dataclass(frozen=True, slots=True)
class LineRow:
    """Latency over context of one format at one batch: a robust line through its contexts.

    Attributes:
        slope_s_per_token: of one layer, for the whole batch; ``intercept_s`` at no context.
        bytes_per_s: bytes a token over the slope: the rate at which KV streams, launches left out; None where noise
            hides the slope.
        slope_ratio: to bf16 at the same shape and batch; ``floor`` is the ratio of their bytes, scales included.
        best_bytes_per_s: the highest rate of its cells, launches counted.

    """

    shape: str
    kv_dtype: str
    batch_size: int
    num_contexts: int
    slope_s_per_token: float
    intercept_s: float
    bytes_per_s: float | None
    roofline_fraction: float | None
    best_bytes_per_s: float
    slope_ratio: float | None
    floor: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Predicted against measured over the cells: where predictions come from, median and worst relative error."""

    kind: str
    source: str
    num_cells: int
    median_error: float
    worst_error: float
    worst_cell: str


@dataclass(frozen=True, slots=True)
class PeerRow:
    """Another implementation on a cell of the same sizes; ``speed_ratio`` is its time over ours on the same format."""

    name: str
    kv_dtype: str
    shape: str
    batch_size: int
    context_tokens: int
    latency_s: float
    bytes_per_s: float
    speed_ratio: float | None


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """The calibration a run ended with: where it was written, or why it was not, and how well it fits the samples."""

    path: str | None
    gpu: str
    problem: str | None
    after: Comparison | None


@dataclass(frozen=True)
class MeasureReport:
    """Everything a run says."""

    run_dir: str
    request: dict[str, Any]
    environment: dict[str, Any]
    notes: list[str]
    roofline_bytes_per_s: float
    roofline: list[RooflinePoint]
    gates: list[Gate]
    lines: list[LineRow]
    cells: list[CellRow]
    peers: list[PeerRow]
    skipped: list[Skipped]
    corrupt_lines: list[dict[str, Any]]
    tolerance: float
    prediction: Comparison | None
    within_tolerance: bool | None
    calibration: CalibrationResult | None
    steps: StepReport | None
    elapsed_s: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)


def robust_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of (x, y) points: the median of pairwise slopes, each weighted by its distance in x.

    The weighted form of Sen's estimator (Sen 1968): one outlier in four points does not move it far, and close pairs,
    whose slope is mostly noise, count little.

    Raises:
        ValueError: fewer than two different x.

    """
    pairs = sorted(
        ((y1 - y0) / (x1 - x0), abs(x1 - x0))
        for i, (x0, y0) in enumerate(points)
        for x1, y1 in points[i + 1 :]
        if x1 != x0
    )
    if not pairs:
        raise ValueError("a line needs two different x")
    half, below, slope = sum(weight for _, weight in pairs) / 2, 0.0, pairs[-1][0]
    for value, weight in pairs:
        below += weight
        if below >= half:
            slope = value
            break
    return slope, statistics.median(y - slope * x for x, y in points)


def cell_rows(
    samples: Sequence[Sample], roofline_bytes_per_s: float, predict: Callable[[Cell], float | None] | None
) -> list[CellRow]:
    """One row a sample, in the order of shape, format, batch and context."""
    rows = []
    for sample in sorted(samples, key=_order):
        predicted = predict(cell_of(sample)) if predict else None
        rows.append(
            CellRow(
                shape_of(sample).describe(), sample.kv_dtype, sample.batch_size, sample.context_tokens,
                sample.latency_s, sample.p10_s, sample.p90_s, sample.read_bytes, sample.bytes_per_s,
                sample.bytes_per_s / roofline_bytes_per_s, sample.kernel_facts.get("registers"),
                sample.kernel_facts.get("spills"), predicted,
                None if predicted is None else predicted / sample.latency_s - 1,
            )
        )  # fmt: skip
    return rows


def line_rows(samples: Sequence[Sample], roofline_bytes_per_s: float) -> list[LineRow]:
    """One line for each shape, format and batch with two contexts or more; windows shorter than a context have none."""
    groups: dict[tuple[Shape, int, str], list[Sample]] = {}
    for sample in sorted(samples, key=_order):
        shape = shape_of(sample)
        if shape.window_tokens is None or sample.context_tokens <= shape.window_tokens:
            groups.setdefault((shape, sample.batch_size, sample.kv_dtype), []).append(sample)
    fits = {
        key: robust_line([(s.context_tokens, s.latency_s) for s in group])
        for key, group in groups.items()
        if len({s.context_tokens for s in group}) >= MIN_POINTS
    }
    rows = []
    for (shape, batch, dtype), (slope, intercept) in sorted(
        fits.items(), key=lambda item: (item[0][1], item[0][2] != BASE)
    ):
        base = fits.get((shape, batch, BASE))
        per_token = batch * Family(shape, dtype).bytes_per_token
        rate = per_token / slope if slope > 0 else None
        best = max(sample.bytes_per_s for sample in groups[shape, batch, dtype])
        rows.append(
            LineRow(
                shape.describe(), dtype, batch, len(groups[shape, batch, dtype]), slope, intercept, rate,
                None if rate is None else rate / roofline_bytes_per_s, best,
                slope / base[0] if base and base[0] > 0 and slope > 0 else None,
                Family(shape, dtype).bytes_per_token / Family(shape, BASE).bytes_per_token,
            )
        )  # fmt: skip
    return rows


def compare(rows: Iterable[CellRow], kind: str, source: str) -> Comparison | None:
    """Median and worst relative error over the rows that carry a prediction; None where none does."""
    judged = [(abs(row.prediction_error), row) for row in rows if row.prediction_error is not None]
    if not judged:
        return None
    worst, row = max(judged, key=lambda item: item[0])
    where = f"{row.kv_dtype} batch {row.batch_size:,} × {row.context_tokens:,}"
    return Comparison(kind, source, len(judged), statistics.median(error for error, _ in judged), worst, where)


def peer_rows(records: Iterable[dict[str, Any]], samples: Sequence[Sample]) -> list[PeerRow]:
    """Peers beside our cell of the same format and sizes."""
    ours = {(s.kv_dtype, shape_of(s), s.batch_size, s.context_tokens): s.latency_s for s in samples}
    rows = []
    for r in records:
        shape = Shape(r["num_q_heads"], r["num_kv_heads"], r["head_dim"])
        kv_dtype = r["kv_dtype"]
        base = ours.get((kv_dtype, shape, r["batch_size"], r["context_tokens"]))
        rows.append(
            PeerRow(r["name"], kv_dtype, shape.describe(), r["batch_size"], r["context_tokens"], r["latency_s"],
                    r["read_bytes"] / r["latency_s"], None if base is None else r["latency_s"] / base)
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row.shape, row.kv_dtype, row.batch_size, row.context_tokens))


def shape_of(sample: Sample) -> Shape:
    """The attention shape a sample was taken of."""
    return Shape(sample.num_q_heads, sample.num_kv_heads, sample.head_dim, sample.window_tokens or None,
                 sample.latent_dim or None)  # fmt: skip


def cell_of(sample: Sample) -> Cell:
    """The cell a sample was taken of."""
    return Cell(Family(shape_of(sample), sample.kv_dtype), sample.batch_size, sample.context_tokens, sample.layers)


def _order(sample: Sample) -> tuple[Any, ...]:
    return (sample.num_q_heads, sample.num_kv_heads, sample.head_dim, sample.window_tokens, sample.batch_size,
            sample.kv_dtype != BASE, sample.kv_dtype, sample.context_tokens)  # fmt: skip
