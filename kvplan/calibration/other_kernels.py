"""Other measured parts of a decode step than decode attention: what their fits have in common, and all-reduce.

All-reduce of n bytes over g GPUs: ``t = launch_s + bytes / bandwidth`` (the α–β model; Hockney 1994).
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan.calibration.attention_fit import summary
from kvplan.calibration.attention_model import Parameter
from kvplan.calibration.map_fit import Fit, fit
from kvplan.calibration.schema import OTHER_SCHEMA_VERSION
from kvplan.errors import InputError

Array = NDArray[Any]
BYTES_PER_ELEMENT = 2

ALL_REDUCE = (
    Parameter("launch_s", 6e-6, 1.0, "s", "launch and synchronisation of an all-reduce"),
    Parameter("bandwidth_bytes_per_s", 2e11, 1.0, "B/s", "message bytes moved each second"),
)


def all_reduce_s(theta: Array, message_bytes: Array) -> Array:
    """Seconds of an all-reduce; log parameters ``[..., 2]`` and ``n`` messages to ``[..., n]``."""
    p = np.exp(theta)[..., None]
    return np.asarray(p[..., 0, :] + message_bytes / p[..., 1, :])


@dataclass(frozen=True)
class Table:
    """A measured table: latency of each row, the entry it belongs to, quantities whose range is kept, its geometry.

    ``shape`` names the geometry of a row: held-out errors leave out whole geometries. None leaves out rows.
    """

    latency_s: Array
    labels: Array
    ranges: Mapping[str, Array]
    shape: Array | None = None


Model = Callable[[Array, Array, str], Array]
"""(log parameters, rows, entry) → seconds."""


def all_reduce_document(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The calibration of an all-reduce table: one entry a (kernel, number of GPUs)."""
    table = read_columns(path)
    size = table["message_elements"].astype(float) * BYTES_PER_ELEMENT
    pairs = zip(table["kernel_source"], table["num_gpus"], strict=True)
    labels = np.array([f"{kernel}/{count}" for kernel, count in pairs])
    cases = Table(table["latency_s"].astype(float), labels, {"message_bytes": size})
    return fitted_document(
        about, "all_reduce", ALL_REDUCE, cases, lambda theta, rows, _: all_reduce_s(theta, size[rows])
    )


def fitted_document(
    about: Mapping[str, Any], kind: str, parameters: Sequence[Parameter], table: Table, model: Model, *,
    min_rows: int = 1, reported: Mapping[str, Callable[[float], float]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The calibration document of a table: parameters, their spreads and residuals of each entry.

    ``reported`` maps a fitted value to the one that is written, for parameters that bend.
    """
    entries = {}
    for label in sorted(set(table.labels.tolist())):
        rows = np.flatnonzero((table.labels == label) & (table.latency_s > 0))
        if len(rows) >= min_rows:
            entries[str(label)] = _entry(parameters, model, table, rows, str(label), reported or {})
    return {
        "schema_version": OTHER_SCHEMA_VERSION, "kind": kind, **about,
        "num_samples": sum(entry["num_samples"] for entry in entries.values()),
        "valid_range": {name: [float(values.min()), float(values.max())] for name, values in table.ranges.items()},
        "entries": entries,
    }  # fmt: skip


def _entry(
    parameters: Sequence[Parameter], model: Model, table: Table, rows: Array, label: str,
    reported: Mapping[str, Callable[[float], float]],
) -> dict[str, Any]:  # fmt: skip
    found = _fit(parameters, model, table, rows, label)
    spread = np.sqrt(np.diag(found.covariance))
    errors, held_out = np.abs(np.expm1(-found.residuals)), held_out_errors(parameters, model, table, rows, label)
    written = {}
    for p, log_value, width in zip(parameters, found.theta[0], spread, strict=True):
        value = reported.get(p.name, float)(float(np.exp(log_value)))
        written[p.name] = {
            "value": _rounded(value),
            "log_spread": _rounded(width),
            "unit": p.unit,
            "meaning": p.meaning,
        }
    residuals = summary(found.residuals)
    for name, values in (("", errors), ("held_out_", held_out)):
        residuals = {
            **residuals, f"{name}median_error": float(np.median(values)),
            f"{name}p90_error": float(np.quantile(values, 0.9)),
        }  # fmt: skip
    return {
        "num_samples": len(rows), "parameters": written, "residuals": {k: _rounded(v) for k, v in residuals.items()},
    }  # fmt: skip


def held_out_errors(parameters: Sequence[Parameter], model: Model, table: Table, rows: Array, label: str) -> Array:
    """Errors of every row, predicted by a fit on the other half: of the geometries, or of the rows in turn."""
    names = np.arange(len(rows)) if table.shape is None else np.unique(table.shape[rows], return_inverse=True)[1]
    errors = np.empty(len(rows))
    for half in (0, 1):
        mine = names % 2 == half
        if mine.all() or not mine.any():
            return np.abs(np.expm1(_fit(parameters, model, table, rows, label).residuals))
        theta = _fit(parameters, model, table, rows[~mine], label).theta[0]
        errors[mine] = np.abs(model(theta[None], rows[mine], label)[0] / table.latency_s[rows[mine]] - 1)
    return errors


def _fit(parameters: Sequence[Parameter], model: Model, table: Table, rows: Array, label: str) -> Fit:
    mean = np.log([[p.prior for p in parameters]])
    precision = np.diag([1 / p.spread**2 for p in parameters])
    block = np.zeros(len(rows), dtype=int)
    return fit(
        lambda theta: np.log(model(theta[:, 0], rows, label)), np.log(table.latency_s[rows]), block, mean, precision
    )


def _rounded(value: float) -> float:
    return float(f"{float(value):.6g}")


def read_columns(path: Path) -> dict[str, Array]:
    """The columns of a table, text as it stands.

    Raises:
        InputError: the file cannot be read or holds no rows.

    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error
    if not rows:
        raise InputError(f"{path}: no rows")
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
