"""80% intervals: quantiles of held-out residuals, wider where nothing was measured, and words that say so."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kvplan.latency.parameters import serving_calibration
from kvplan.latency.served import Served
from kvplan.traffic import Floats

ASSUMED_WIDENING = 1.5
OUT_OF_RANGE_WIDENING = 1.25
"""Factors on the logarithmic half widths; stated, nothing was measured there."""


class Interval(NamedTuple):
    """Factors on a prediction, per point; of TTFT a row for exact lengths and one for spread ones."""

    low: Floats
    high: Floats
    ttft_low: Floats
    ttft_high: Floats
    notes: tuple[str, ...]


def point_intervals(served: Served, sequences: Floats, context_tokens: Floats) -> Interval:
    """The interval of each point of a deployment."""
    calibration, traits = serving_calibration(), served.traits
    seen = calibration.groups.get(traits.group, 0) > 0 and not (traits.is_beyond_node or traits.is_wide)
    measured = calibration.covers(traits)
    known = "seen" if seen else "unseen"
    low, high = calibration.residuals[f"{known}_{'moe' if served.model.is_moe else 'dense'}"]
    widening = 1.0 if measured else ASSUMED_WIDENING
    note = {
        (True, True): "from errors on rows left out of the fit, of groups that were in it",
        (False, True): "from errors on whole (model, GPU, engine) groups left out of the fit",
    }.get((seen, measured), f"assumed: {ASSUMED_WIDENING:g}× the interval of models left out; nothing measured here")
    outside = _outside(calibration.valid_range, {"sequences": sequences, "context_tokens": context_tokens})
    factor = np.where(outside, OUT_OF_RANGE_WIDENING, 1.0) * widening
    far = f"{note}; {OUT_OF_RANGE_WIDENING:g}× wider: outside the calibrated range"
    ttft = np.array([calibration.residuals[f"ttft_{known}_{kind}"] for kind in ("exact", "spread")])
    return Interval(
        np.exp(-high * factor), np.exp(-low * factor),
        np.exp(-np.outer(ttft[:, 1], factor)), np.exp(-np.outer(ttft[:, 0], factor)),
        tuple(far if flag else note for flag in outside.tolist()),
    )  # fmt: skip


def _outside(valid_range: Any, values: dict[str, Floats]) -> Any:
    """Which points lie outside what was measured."""
    flags = np.zeros(len(values["sequences"]), dtype=bool)
    for name, value in values.items():
        if name in valid_range:
            low, high = valid_range[name]
            flags |= (value < low * 0.999) | (value > high * 1.001)
    return flags
