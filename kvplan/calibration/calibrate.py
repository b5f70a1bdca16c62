"""``kvplan calibrate`` as functions: samples to a calibration, cases to predictions, predictions to errors."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan import profiles
from kvplan.calibration.attention import AttentionCalibration
from kvplan.calibration.attention_fit import MIN_SAMPLES, blended_fit, learn_dispatch, usable_dtypes
from kvplan.calibration.document import attention_document
from kvplan.calibration.geometry import hardware_of
from kvplan.calibration.priors import candidate_priors
from kvplan.calibration.samples import Points, Refused, Row, read_points, read_rows, refuse_impossible
from kvplan.calibration.schema import attention_from_json
from kvplan.errors import InputError, shorten
from kvplan.gpu import GpuSpec

Array = NDArray[Any]
UNITS = "latency_s is in seconds, of one layer: divide milliseconds by 1,000, microseconds by 1,000,000"
PREDICTED = ("predicted_s", "low_s", "high_s")
LARGE_KV_BYTES = 64e6
LARGE_CONTEXT_TOKENS = 1024
CONTEXT_TOKENS = 128
SLOWEST_SHARE, SLOWEST_LAUNCH_S = 1 / 50, 1e-3
"""Kernels read a layer's KV at more of the datasheet's bandwidth than this share, beside a shorter launch: 2 in 1,000
rows of the public tables take longer, and all of them would with milliseconds read as seconds."""
USELESS_ERROR = 0.5
"""Median error on its own samples above which a fit says nothing about others."""


@dataclass(frozen=True)
class Predictions:
    """Cases with predictions, in input order; NaN where a case could not be read.

    Attributes:
        columns: the cases' own columns.
        rows: the cases as read.
        middle_s, low_s, high_s: one element a row.
        assumed: whether the row's KV dtype was not calibrated and another's parameters stand for it.

    """

    columns: list[str]
    rows: list[Row]
    points: Points
    middle_s: Array
    low_s: Array
    high_s: Array
    assumed: Array
    in_range: Array


def calibrate_file(
    samples: Path, gpu: GpuSpec, *, name: str, engine: str | None = None, engine_version: str | None = None,
    calibrations: Sequence[AttentionCalibration] | None = None,
) -> tuple[dict[str, Any], Points]:  # fmt: skip
    """The calibration document of a file of samples, and the points it was fitted from.

    Raises:
        InputError: the file cannot be read, its samples name another GPU, a KV dtype has fewer than 8 usable ones, or
            they are slower than any kernel of ``gpu``, or the fit is far from its own samples.

    """
    _, rows = read_rows(samples, need_latency=True)
    _refuse_other_gpus(rows, gpu)
    points = refuse_impossible(read_points(rows), rows, gpu)
    _refuse_other_units(points, gpu)
    sources = [{"name": "kvplan calibrate", "file": samples.name}]
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    document = calibrate_points(
        points, gpu, name=name, engine=engine, engine_version=engine_version, sources=sources, date=today,
        calibrations=calibrations,
    )  # fmt: skip
    _refuse_useless(document)
    return document, points


def _refuse_other_units(points: Points, gpu: GpuSpec) -> None:
    """Refuse latencies most of which no kernel of a GPU could need; a CPU has no datasheet to tell by."""
    peak = gpu.memory_bandwidth_bytes_per_s
    if peak is None or gpu.vendor == "cpu":
        return
    slow = points.latency_s > SLOWEST_LAUNCH_S + kv_bytes(points) / (SLOWEST_SHARE * peak)
    for dtype in sorted(set(points.kv_dtype)):
        if np.mean(slow[points.kv_dtype == dtype]) > 0.5:
            raise InputError(
                f"most samples of {dtype} take {SLOWEST_LAUNCH_S * 1e3:g} ms more than {gpu.name} needs for their KV "
                f"at {SLOWEST_SHARE:.0%} of its bandwidth: no kernel is so slow",
                hint=UNITS,
            )


def _refuse_useless(document: Mapping[str, Any]) -> None:
    """Refuse a fit that is far from its own samples."""
    for dtype, entry in document["kv_dtypes"].items():
        for kernel in (entry, entry["other_kernel"]):
            if kernel is None or kernel["num_samples"] < MIN_SAMPLES:
                continue
            if (error := kernel["residuals"]["median_error"]) > USELESS_ERROR:
                raise InputError(
                    f"no calibration comes of the samples of {dtype}: half of them are more than {error:.0%} away from "
                    "the best fit",
                    hint=UNITS,
                )


def _refuse_other_gpus(rows: Sequence[Row], gpu: GpuSpec) -> None:
    environments = (row.values.get("environment") for row in rows)
    named = {str(found["gpu"]) for found in environments if isinstance(found, Mapping) and found.get("gpu")}
    others = sorted(named - {gpu.name})
    if not others:
        return
    known = profiles.find("gpus", others[0])
    hint = f"--gpu {known}" if known else f"no profile is of it; samples of {gpu.name} come from `kvplan measure` there"
    if len(named) > 1:
        hint = "give the samples of one GPU"
    raise InputError(f"samples were taken on {shorten(', '.join(others), 60)}, not on {gpu.name}", hint=hint)


def calibrate_points(
    points: Points, gpu: GpuSpec, *, name: str, engine: str | None, engine_version: str | None,
    sources: Sequence[dict[str, str]], date: str, calibrations: Sequence[AttentionCalibration] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The calibration document of points, under the priors of ``calibrations`` (those that ship when None)."""
    dtypes = usable_dtypes(points)
    hw = hardware_of(gpu)
    priors = candidate_priors(dtypes, gpu.name, calibrations, learn_dispatch(points))
    found = blended_fit(points, dtypes, hw, priors)
    return attention_document(
        found, points, gpu, hw, name=name, engine=engine, engine_version=engine_version, sources=sources, date=date
    )


def predict_file(cases: Path, document: dict[str, Any]) -> Predictions:
    """Predictions of every case in a file of the samples' form (``latency_s`` may be missing)."""
    columns, rows = read_rows(cases)
    calibration = attention_from_json(document, "the calibration just made")
    points = read_points(rows, need_latency=False)
    middle, low, high = (np.full(len(rows), np.nan) for _ in range(3))
    assumed, inside = np.zeros(len(rows), dtype=bool), np.ones(len(rows), dtype=bool)
    for dtype in sorted(set(points.kv_dtype)):
        mine = points.take(points.kv_dtype == dtype)
        geometry = mine.geometry(dtype)
        seconds, half = calibration.predict(geometry, dtype)
        middle[mine.rows], low[mine.rows], high[mine.rows] = seconds, seconds * np.exp(-half), seconds * np.exp(half)
        assumed[mine.rows] = calibration.fitted_dtype(dtype)[1]
        inside[mine.rows] = calibration.in_range(geometry)
    return Predictions(columns, rows, points, middle, low, high, assumed, inside)


def predictions_csv(found: Predictions) -> str:
    """The cases' columns and ``predicted_s, low_s, high_s``, in input order; empty where a case could not be read."""
    columns = [name for name in found.columns if name not in PREDICTED]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *PREDICTED])
    for row, *values in zip(found.rows, found.middle_s, found.low_s, found.high_s, strict=True):
        cells = [row.values.get(name, "") for name in columns]
        writer.writerow([*cells, *("" if np.isnan(value) else f"{value:.7g}" for value in values)])
    return text.getvalue()


@dataclass(frozen=True)
class ErrorLine:
    """Median and p90 of |predicted / measured − 1| over a part of the cases, and how many the interval covered."""

    what: str
    count: int
    median: float
    p90: float
    covered: float


def errors(found: Predictions) -> list[ErrorLine]:
    """Errors by part: all cases, contexts of 128 and more, and large KV at contexts of 1,024 and more, by KV dtype."""
    points = found.points
    measured = np.isfinite(points.latency_s)
    lines = []
    for dtype in (None, *sorted(set(points.kv_dtype))):
        mask = measured & ((points.kv_dtype == dtype) if dtype else True)
        label = dtype or "all dtypes"
        kv, context = kv_bytes(points), points.columns["context_tokens"]
        parts = {
            f"{label}, every case": mask,
            f"{label}, context ≥ {CONTEXT_TOKENS}": mask & (context >= CONTEXT_TOKENS),
            f"{label}, context ≥ 1k and KV ≥ 64 MB": mask
            & (context >= LARGE_CONTEXT_TOKENS) & (kv >= LARGE_KV_BYTES),
        }  # fmt: skip
        for what, part in parts.items():
            if part.any():
                rows, truth = points.rows[part], points.latency_s[part]
                off = np.abs(found.middle_s[rows] / truth - 1)
                covered = (truth >= found.low_s[rows]) & (truth <= found.high_s[rows])
                lines.append(ErrorLine(what, int(part.sum()), float(np.median(off)), float(np.quantile(off, 0.9)),
                                       float(covered.mean())))  # fmt: skip
    return lines


def kv_bytes(points: Points) -> Array:
    """KV read by each point, bytes."""
    result = np.zeros(len(points))
    for dtype in set(points.kv_dtype):
        mask = points.kv_dtype == dtype
        result[mask] = points.take(mask).geometry(dtype).kv_bytes
    return result


def refused_lines(points: Points, limit: int = 10) -> list[str]:
    """What was set aside, one line each, the first ``limit`` by name."""
    shown = [f"refused {item}" for item in points.refused[:limit]]
    rest = len(points.refused) - len(shown)
    return [*shown, f"refused {rest:,} more; the calibration file names them"] if rest else shown


__all__ = ["ErrorLine", "Predictions", "Refused", "calibrate_file", "calibrate_points", "errors", "predict_file",
           "predictions_csv", "refused_lines"]  # fmt: skip
