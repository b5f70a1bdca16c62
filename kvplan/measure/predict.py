"""What kvplan would have said of a cell before it was timed, and where that comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvplan import profiles
from kvplan.calibration.attention import AttentionCalibration, find_attention
from kvplan.gpu import GpuSpec, load_gpu
from kvplan.measure.backend import Environment
from kvplan.measure.plan import Cell, element_bits

ENGINE = "kvplan"
"""The engine name that calibrations of the bundled kernels carry."""
KERNEL_EFFICIENCY = {16: 0.92, 8: 0.92, 4: 0.70}
"""Bits of an element → share of datasheet bandwidth that the bundled kernels stream KV at. Assumed; measured on an H200
are 0.91 to 0.96 for 16 and 8 bits, 0.69 for nvfp4 and 0.78 for int4 from batch 8 on, where unpacking is the limit."""
KERNEL_INTERCEPT_S = 11e-6
"""Launch and join of one call (assumed; 10 to 15 µs measured on an H200)."""


@dataclass(frozen=True)
class Predictor:
    """Predicts cells; ``kind`` is ``calibrated`` or ``assumed``, ``source`` one line for people."""

    kind: Literal["calibrated", "assumed"]
    source: str
    calibration: AttentionCalibration | None = None
    peak_bytes_per_s: float = 0.0

    def latency_s(self, cell: Cell) -> float:
        """Seconds of one layer's decode attention."""
        shape = cell.family.shape
        if self.calibration is not None:
            return float(
                self.calibration.latency_s(
                    cell.batch_size, cell.context_tokens, shape.num_q_heads, shape.num_kv_heads, shape.head_dim,
                    window_tokens=shape.window_tokens or 0, kv_dtype=cell.family.kv_dtype,
                )
            )  # fmt: skip
        tokens = min(cell.context_tokens, shape.window_tokens or cell.context_tokens)
        rate = KERNEL_EFFICIENCY[element_bits(cell.family.element)] * self.peak_bytes_per_s
        return KERNEL_INTERCEPT_S + cell.batch_size * tokens * cell.family.bytes_per_token / rate


def find_predictor(environment: Environment) -> Predictor | None:
    """The calibration of this GPU and these kernels (the user's, else a shipped one), else its datasheet.

    None for a device of which kvplan knows nothing yet.

    Raises:
        ProfileError: a calibration file breaks its schema.

    """
    calibration = find_attention(environment.gpu, ENGINE)
    if calibration is not None:
        return Predictor("calibrated", calibration.source, calibration)
    if environment.gpu not in profiles.names("gpus"):
        return None
    return datasheet_predictor(load_gpu(environment.gpu))


def datasheet_predictor(gpu: GpuSpec) -> Predictor | None:
    """A share of the datasheet's bandwidth and a fixed cost a call; None where the bandwidth is not known."""
    peak = gpu.memory_bandwidth_bytes_per_s
    if peak is None:
        return None
    source = (
        f"roofline: {KERNEL_EFFICIENCY[16]:.0%} (4-bit {KERNEL_EFFICIENCY[4]:.0%}) of the datasheet's "
        f"{peak / 1e12:.2f} TB/s and {KERNEL_INTERCEPT_S * 1e6:.0f} µs a call, all assumed"
    )
    return Predictor("assumed", source, peak_bytes_per_s=peak)
