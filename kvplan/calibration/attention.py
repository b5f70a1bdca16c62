"""A decode-attention calibration: predictions, intervals and slope ratios of one (GPU, engine)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvplan.calibration import store
from kvplan.calibration.attention_model import NAMES, latency_s
from kvplan.calibration.geometry import Dispatch, Geometry, Hardware, default_head_dim_v, token_bytes_of
from kvplan.dtypes import canonical_kv_dtype, kv_format
from kvplan.errors import InputError, ProfileError, shorten

Array = NDArray[Any]
REGIMES = ("l2", "edge", "memory")
EDGE = (0.5, 2.0)
"""KV bytes over L2 bytes between which neither "resident" nor "streamed" is sure."""
ASSUMED_WIDENING = 2.0
OUT_OF_RANGE_WIDENING = 1.5
SLOPE_SHAPE = {"batch": 64.0, "num_q_heads": 64.0, "num_kv_heads": 8.0, "head_dim": 128.0}
SLOPE_CONTEXTS = (32_768.0, 65_536.0)


@dataclass(frozen=True)
class DtypeCalibration:
    """What was fitted for one KV dtype.

    Attributes:
        theta: log parameters, in the order of ``attention_model.NAMES``.
        log_spread: standard deviation of each element of ``theta``.
        covariance: of ``theta``; None where so many samples were fitted that only the form's own error is left.
        half_width: half of the 80% interval of the logarithm of the latency, per regime, before ``covariance``.
        interval_scale: what the standard deviation from ``covariance`` counts in that half.
        num_samples: usable samples of this dtype and kernel.
        other: the same for the engine's other kernel, where it has one.

    """

    theta: Array
    log_spread: Array
    covariance: Array | None
    half_width: Mapping[str, float]
    num_samples: int
    residuals: Mapping[str, float] = field(default_factory=dict)
    interval_scale: float = 1.2816
    other: DtypeCalibration | None = None


@dataclass(frozen=True)
class SlopeRatio:
    """Slope of a KV dtype over bf16's, seconds per token of context where both stream from memory."""

    value: float
    low: float
    high: float
    source: str
    kind: str


@dataclass(frozen=True)
class AttentionCalibration:
    """Decode attention of one engine on one GPU.

    Attributes:
        dtypes: canonical KV dtype → what was fitted for it.
        dispatch: what the engine sends to its other kernel.
        valid_range: quantity → (smallest, largest) seen.
        source: one line for people: engine, version, samples, where from.

    """

    name: str
    gpu: str
    engine: str
    engine_version: str | None
    hardware: Hardware
    dtypes: Mapping[str, DtypeCalibration]
    dispatch: Dispatch
    valid_range: Mapping[str, tuple[float, float]]
    source: str
    origin: str
    date: str

    def fitted_dtype(self, kv_dtype: str) -> tuple[str, bool]:
        """The fitted dtype whose parameters stand for ``kv_dtype``, and whether that is an assumption.

        A format of the same element width comes first, then the nearest width.
        """
        wanted = canonical_kv_dtype(kv_dtype)
        if wanted in self.dtypes:
            return wanted, False
        bits = _element_bits(wanted)
        best = min(self.dtypes, key=lambda name: (abs(_element_bits(name) - bits), name))
        same = {wanted, best} <= {"fp8", "fp8_e4m3", "fp8_e5m2"} or {wanted, best} <= {"bfloat16", "float16"}
        return best, not same

    def latency_s(
        self, batch: ArrayLike, context_tokens: ArrayLike, num_q_heads: ArrayLike, num_kv_heads: ArrayLike,
        head_dim: ArrayLike, head_dim_v: ArrayLike | None = None, window_tokens: ArrayLike = 0, kv_dtype: str = "bf16",
    ) -> Array:  # fmt: skip
        """Seconds of one layer's decode attention; arguments broadcast, ``window_tokens`` 0 means none."""
        cases, shape = self.geometry(
            batch, context_tokens, num_q_heads, num_kv_heads, head_dim, head_dim_v, window_tokens, kv_dtype
        )
        return self.predict(cases, kv_dtype)[0].reshape(shape)

    def interval(
        self, batch: ArrayLike, context_tokens: ArrayLike, num_q_heads: ArrayLike, num_kv_heads: ArrayLike,
        head_dim: ArrayLike, head_dim_v: ArrayLike | None = None, window_tokens: ArrayLike = 0, kv_dtype: str = "bf16",
    ) -> tuple[Array, Array]:  # fmt: skip
        """The 80% interval of ``latency_s``: low and high seconds; wider out of range and for an assumed dtype."""
        cases, shape = self.geometry(
            batch, context_tokens, num_q_heads, num_kv_heads, head_dim, head_dim_v, window_tokens, kv_dtype
        )
        middle, half = self.predict(cases, kv_dtype)
        return (middle * np.exp(-half)).reshape(shape), (middle * np.exp(half)).reshape(shape)

    def predict(self, cases: Geometry, kv_dtype: str) -> tuple[Array, Array]:
        """Seconds, and half the 80% interval of their logarithm, for each case."""
        name, assumed = self.fitted_dtype(kv_dtype)
        fitted = self.dtypes[name]
        middle, half = self._predict(fitted, cases)
        if fitted.other is not None:
            rows = np.flatnonzero(self.dispatch.other(cases))
            middle[rows], half[rows] = self._predict(fitted.other, cases.take(rows))
        half = half * np.where(self.in_range(cases), 1.0, OUT_OF_RANGE_WIDENING)
        return middle, np.asarray(half * (ASSUMED_WIDENING if assumed else 1.0))

    def _predict(self, fitted: DtypeCalibration, cases: Geometry) -> tuple[Array, Array]:
        middle = latency_s(fitted.theta, cases, self.hardware)
        half = np.array([fitted.half_width[name] for name in REGIMES])[regime_of(cases, self.hardware)]
        if fitted.covariance is not None:
            from kvplan.calibration.map_fit import STEP

            moved = fitted.theta + STEP * np.eye(len(NAMES))
            slopes = (np.log(latency_s(moved, cases, self.hardware)) - np.log(middle)) / STEP
            variance = np.einsum("in,ij,jn->n", slopes, fitted.covariance, slopes)
            half = np.sqrt(half**2 + fitted.interval_scale**2 * np.maximum(variance, 0))
        return middle, half

    def in_range(self, cases: Geometry) -> Array:
        """Which cases lie inside what was measured."""
        seen = np.ones(len(cases), dtype=bool)
        for quantity, values in range_quantities(cases).items():
            if quantity in self.valid_range:
                low, high = self.valid_range[quantity]
                seen &= (values >= low) & (values <= high)
        return seen

    def slope_ratio(self, kv_dtype: str) -> SlopeRatio | None:
        """Slope (d latency / d context) of ``kv_dtype`` over bf16's, both streaming; None without bf16.

        Taken between 32k and 64k tokens at batch 64, 64 query and 8 KV heads of width 128.
        """
        if "bfloat16" not in self.dtypes:
            return None
        name, assumed = self.fitted_dtype(kv_dtype)
        value = self._slope(kv_dtype) / self._slope("bf16")
        spread = float(np.hypot(self.dtypes[name].half_width["memory"], self.dtypes["bfloat16"].half_width["memory"]))
        spread *= ASSUMED_WIDENING if assumed else 1.0
        shown = canonical_kv_dtype(kv_dtype)
        source = f"{self.source}; {name} kernel with the bytes of {shown}" if assumed else self.source
        kind = "assumed" if assumed else "calibrated"
        return SlopeRatio(value, value * float(np.exp(-spread)), value * float(np.exp(spread)), source, kind)

    def _slope(self, kv_dtype: str) -> float:
        shape = SLOPE_SHAPE
        times = self.latency_s(
            shape["batch"], np.array(SLOPE_CONTEXTS), shape["num_q_heads"], shape["num_kv_heads"], shape["head_dim"],
            kv_dtype=kv_dtype,
        )  # fmt: skip
        return float((times[1] - times[0]) / (SLOPE_CONTEXTS[1] - SLOPE_CONTEXTS[0]))

    def geometry(
        self, batch: ArrayLike, context_tokens: ArrayLike, num_q_heads: ArrayLike, num_kv_heads: ArrayLike,
        head_dim: ArrayLike, head_dim_v: ArrayLike | None, window_tokens: ArrayLike, kv_dtype: str,
    ) -> tuple[Geometry, tuple[int, ...]]:  # fmt: skip
        """The cases as flat float arrays, and the shape they broadcast to.

        Raises:
            InputError: a count is not positive, or query heads are fewer than KV heads.

        """
        widths = default_head_dim_v(head_dim) if head_dim_v is None else head_dim_v
        arrays = np.broadcast_arrays(batch, context_tokens, num_q_heads, num_kv_heads, head_dim, widths, window_tokens)
        flat = [np.asarray(a, dtype=float).ravel() for a in arrays]
        if not all(np.isfinite(a).all() for a in flat) or any((a <= 0).any() for a in flat[:5]) or (flat[6] < 0).any():
            raise InputError("batch, context, heads and head_dim must be positive numbers, and the window 0 or more")
        if (flat[2] < flat[3]).any():
            raise InputError("query heads must be at least as many as KV heads")
        cases = make_geometry(flat, kv_dtype)
        return cases, arrays[0].shape


def streamed_bytes_per_s(theta: Array, kv_dtype: str, hw: Hardware) -> float:
    """KV bytes a second where both contexts of ``SLOPE_CONTEXTS`` stream: the reciprocal of the slope, in bytes."""
    shape, contexts = SLOPE_SHAPE, np.array(SLOPE_CONTEXTS)
    one = np.ones_like(contexts)
    width = shape["head_dim"] * one
    cases = make_geometry(
        [
            shape["batch"] * one,
            contexts,
            shape["num_q_heads"] * one,
            shape["num_kv_heads"] * one,
            width,
            width,
            0 * one,
        ],
        kv_dtype,
    )
    return float(np.diff(cases.kv_bytes)[0] / np.diff(latency_s(theta, cases, hw))[0])


def make_geometry(arrays: Sequence[Array], kv_dtype: str) -> Geometry:
    """Flat arrays of one KV dtype as a ``Geometry``.

    Args:
        arrays: batch, context, query heads, KV heads, head_dim, head_dim of values, window (0: none).
        kv_dtype: what the KV is stored as.

    """
    batch, context, q_heads, kv_heads, head_dim, head_dim_v, window = arrays
    token_bytes = token_bytes_of(kv_dtype, head_dim, head_dim_v)
    return Geometry(batch, context, q_heads, kv_heads, head_dim, head_dim_v, window, token_bytes)


def regime_of(cases: Geometry, hw: Hardware) -> Array:
    """Index into ``REGIMES`` for each case."""
    pressure = cases.kv_bytes / hw.l2_nominal
    return np.where(pressure < EDGE[0], 0, np.where(pressure <= EDGE[1], 1, 2))


def range_quantities(cases: Geometry) -> dict[str, Array]:
    """The quantities a calibration's range is stated in."""
    return {
        "batch_size": cases.batch,
        "context_tokens": cases.context,
        "head_dim": cases.head_dim,
        "q_heads_per_kv_head": cases.group,
        "kv_bytes": cases.kv_bytes,
    }


def find_attention(gpu_name: str, engine: str) -> AttentionCalibration | None:
    """The decode-attention calibration of ``engine`` on ``gpu_name``, measured here or shipped; None without one.

    Raises:
        ProfileError: a calibration file breaks its schema.

    """
    from kvplan.calibration.schema import attention_from_json

    found = store.find("attention", gpu_name, engine)
    return None if found is None else attention_from_json(found.data, found.where, found.origin)


def read_attention(path: Path, gpu_name: str) -> AttentionCalibration:
    """The decode-attention calibration in ``path``, which must be of ``gpu_name``.

    Raises:
        ProfileError: it cannot be read, breaks its schema, or is of another GPU.

    """
    from kvplan.calibration.schema import attention_from_json

    found = attention_from_json(store.read(path), str(path), store.GIVEN)
    if found.gpu != gpu_name:
        raise ProfileError(f"{path}: a calibration of {shorten(found.gpu, 40)}, not of {gpu_name}",
                           hint="calibrate on this GPU, or leave --calibration out")  # fmt: skip
    return found


def _element_bits(kv_dtype: str) -> float:
    fmt = kv_format(kv_dtype)
    return (fmt.key_bits + fmt.value_bits) / 2
