"""An attention fit as the JSON document of a calibration file, and writing it in one piece."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan.calibration.attention import range_quantities, regime_of, streamed_bytes_per_s
from kvplan.calibration.attention_fit import (
    AttentionFit,
    noise_scale,
    residual_half_widths,
    summary,
)
from kvplan.calibration.attention_model import INDEX, NAMES, PARAMETERS
from kvplan.calibration.geometry import Geometry, Hardware
from kvplan.calibration.samples import Points
from kvplan.calibration.schema import KIND, SCHEMA_VERSION, hardware_to_json
from kvplan.files import write_text
from kvplan.gpu import GpuSpec

Array = NDArray[Any]
FEW_SAMPLES = 1000
"""Below this many samples a dtype the uncertainty of the parameters is kept in the file."""
FEW_SAMPLES_SCALE = {"l2": 3.2, "edge": 2.3, "memory": 0.9}
PARAMETER_SCALE = 2.0
"""Half the 80% interval of few samples is the root of (scale · spread of their residuals)² + 4 · variance from the
parameters: the constants that cover 80% of held-out rows of the public tables."""
FEW_SAMPLES_SPREAD = (0.03, 0.06)
Z80 = 1.2816
MAX_REFUSED_LISTED = 1000


def attention_document(
    found: AttentionFit, points: Points, gpu: GpuSpec, hw: Hardware, *, name: str, engine: str | None,
    engine_version: str | None, sources: Sequence[Mapping[str, str]], date: str,
) -> dict[str, Any]:  # fmt: skip
    """The calibration file's JSON: one entry a KV dtype and kernel, with what it was fitted from and how well."""
    dispatch = found.prior.dispatch
    entries: dict[str, Any] = {}
    ranges: dict[str, tuple[float, float]] = {}
    for number, dtype in enumerate(found.dtypes):
        mine = points.kv_dtype == dtype
        cases = points.take(mine).geometry(dtype)
        kernels = [_entry(found, number, kernel, mine, cases, hw) for kernel in range(dispatch.num_kernels)]
        entries[dtype] = {**kernels[0], "other_kernel": kernels[1] if len(kernels) > 1 else None}
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
        "hardware": hardware_to_json(hw),
        "other_kernel": {
            "shapes": [
                {"head_dim": width, "windowed": windowed, "q_heads_per_kv_head": group}
                for width, windowed, group in dispatch.shapes
            ],
            "rule": dispatch.rule,
        },
        "valid_range": {quantity: [low, high] for quantity, (low, high) in ranges.items()},
        "kv_dtypes": entries,
    }


def _entry(found: AttentionFit, number: int, kernel: int, mine: Array, cases: Geometry, hw: Hardware) -> dict[str, Any]:
    """One kernel of one dtype; where few samples are its own, the spread of its dtype's stands for it."""
    b = number * found.prior.dispatch.num_kernels + kernel
    theta, dtype = found.fit.theta[b], found.dtypes[number]
    values = np.exp(theta)
    count = len(NAMES)
    covariance = found.fit.covariance[b * count : (b + 1) * count, b * count : (b + 1) * count]
    residuals, own = found.fit.residuals[mine], found.block[mine] == b
    few = len(residuals) < FEW_SAMPLES
    if few:
        scaled = np.abs(residuals) / noise_scale(cases, hw)
        spread = float(np.clip(1.4826 * np.median(scaled), *FEW_SAMPLES_SPREAD))
        widths = {regime: scale * spread for regime, scale in FEW_SAMPLES_SCALE.items()}
    else:
        widths = residual_half_widths(residuals[own], regime_of(cases.take(own), hw))
    return {
        "num_samples": int(own.sum()),
        "intercept_s": _rounded(values[INDEX["launch_s"]]),
        "effective_bandwidth_bytes_per_s": _rounded(streamed_bytes_per_s(theta, dtype, hw)),
        "l2_bandwidth_bytes_per_s": _rounded(values[INDEX["l2_bandwidth_bytes_per_s"]]),
        "parameters": {
            p.name: {
                "value": _rounded(values[j]), "log_spread": _rounded(np.sqrt(covariance[j, j])), "unit": p.unit,
                "meaning": p.meaning,
            }
            for j, p in enumerate(PARAMETERS)
        },
        "residuals": {key: _rounded(value) for key, value in summary(residuals[own]).items()} if own.any() else None,
        "half_width_log": {key: _rounded(value) for key, value in widths.items()},
        "interval_scale": PARAMETER_SCALE if few else Z80,
        "covariance_log": [[_rounded(x, 5) for x in row] for row in covariance] if few else None,
    }  # fmt: skip


def _rounded(value: float, digits: int = 6) -> float:
    return float(f"{float(value):.{digits}g}")


def write_json(path: Path, document: Mapping[str, Any], force: bool) -> None:
    """Write ``document`` to ``path`` in one piece, or not at all."""
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", force)
