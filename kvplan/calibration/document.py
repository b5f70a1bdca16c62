"""An attention fit as the JSON document of a calibration file, and writing it in one piece."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan.calibration.attention import range_quantities
from kvplan.calibration.attention_fit import (
    Z80,
    AttentionFit,
    regime_of,
    residual_half_widths,
    summary,
)
from kvplan.calibration.attention_model import INDEX, NAMES, PARAMETERS, Hardware
from kvplan.calibration.samples import Points
from kvplan.calibration.schema import HARDWARE_FIELDS, KIND, SCHEMA_VERSION
from kvplan.files import write_text
from kvplan.gpu import GpuSpec

Array = NDArray[Any]
FEW_SAMPLES = 1000
"""Below this many samples a dtype the uncertainty of the parameters is kept in the file."""
FEW_SAMPLES_SCALE = 2.14
PARAMETER_SCALE = 3.43
"""Half the 80% interval of few samples is the root of (2.14 · spread of their residuals)² + 3.43² · variance from the
parameters: the pair that covers 80% of held-out rows, set on seven tables at a time and judged on the eighth."""
FEW_SAMPLES_WIDTHS = (0.015, 0.12)
MAX_REFUSED_LISTED = 1000


def attention_document(
    found: AttentionFit, points: Points, gpu: GpuSpec, hw: Hardware, *, name: str, engine: str | None,
    engine_version: str | None, sources: Sequence[Mapping[str, str]], date: str,
) -> dict[str, Any]:  # fmt: skip
    """The calibration file's JSON: one entry a KV dtype, with what it was fitted from and how well."""
    shapes = found.prior.alternate_shapes
    entries: dict[str, Any] = {}
    ranges: dict[str, tuple[float, float]] = {}
    for b, dtype in enumerate(found.dtypes):
        mine = found.block == b
        cases = points.take(mine).geometry(dtype, shapes)
        entries[dtype] = _entry(found, b, found.fit.residuals[mine], regime_of(cases, hw), hw)
        for quantity, values in range_quantities(cases).items():
            low, high = ranges.get(quantity, (np.inf, -np.inf))
            ranges[quantity] = (min(low, float(values.min())), max(high, float(values.max())))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "name": name,
        "aliases": [],
        "gpu": gpu.name,
        "engine": engine,
        "engine_version": engine_version,
        "date": date,
        "sources": [dict(source) for source in sources],
        "num_samples": len(points),
        "num_refused": len(points.refused),
        "refused": [{"line": item.line, "reason": item.reason} for item in points.refused[:MAX_REFUSED_LISTED]],
        "prior": found.prior.name,
        "hardware": {key: _rounded(getattr(hw, field)) for field, (key, _, _) in HARDWARE_FIELDS.items()},
        "alternate_shapes": [{"head_dim": width, "windowed": windowed} for width, windowed in shapes],
        "valid_range": {quantity: [low, high] for quantity, (low, high) in ranges.items()},
        "kv_dtypes": entries,
    }


def _entry(found: AttentionFit, b: int, residuals: Array, regime: Array, hw: Hardware) -> dict[str, Any]:
    theta = found.fit.theta[b]
    values = np.exp(theta)
    count = len(NAMES)
    covariance = found.fit.covariance[b * count : (b + 1) * count, b * count : (b + 1) * count]
    few = len(residuals) < FEW_SAMPLES
    if few:
        spread = float(np.clip(1.4826 * np.median(np.abs(residuals)), *FEW_SAMPLES_WIDTHS))
        widths = dict.fromkeys(("l2", "edge", "memory"), FEW_SAMPLES_SCALE * spread)
    else:
        widths = residual_half_widths(residuals, regime)
    return {
        "num_samples": len(residuals),
        "intercept_s": _rounded(values[INDEX["launch_s"]]),
        "effective_bandwidth_bytes_per_s": _rounded(values[INDEX["bandwidth_fraction"]] * hw.peak),
        "l2_bandwidth_bytes_per_s": _rounded(values[INDEX["l2_bandwidth_bytes_per_s"]]),
        "parameters": {
            p.name: {
                "value": _rounded(values[j]), "log_spread": _rounded(np.sqrt(covariance[j, j])), "unit": p.unit,
                "meaning": p.meaning,
            }
            for j, p in enumerate(PARAMETERS)
        },
        "residuals": {key: _rounded(value) for key, value in summary(residuals).items()},
        "half_width_log": {key: _rounded(value) for key, value in widths.items()},
        "interval_scale": PARAMETER_SCALE if few else Z80,
        "covariance_log": [[_rounded(x, 5) for x in row] for row in covariance] if few else None,
    }  # fmt: skip


def _rounded(value: float, digits: int = 6) -> float:
    return float(f"{float(value):.{digits}g}")


def write_json(path: Path, document: Mapping[str, Any], force: bool) -> None:
    """Write ``document`` to ``path`` in one piece, or not at all."""
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", force)
