"""What kvplan would have said of a cell before it was timed, and where that comes from.

Latent attention is predicted as ``kvplan itl`` does it, by its bytes and its products (``kvplan.calibration.latent``),
with the figures of the bundled kernel: it multiplies 16 query rows at least, where engines' kernels take 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot
from typing import Literal

from kvplan import profiles
from kvplan.calibration.attention import AttentionCalibration, find_attention
from kvplan.calibration.latent import FLOPS_PER_ROW, LatentCalibration, find_latent
from kvplan.gpu import GpuSpec, load_gpu
from kvplan.measure.backend import Environment
from kvplan.measure.plan import Cell

ENGINE = "kvplan"
"""The engine name that calibrations of the bundled kernels carry."""
KERNEL_EFFICIENCY = {"int4": 0.88, "nvfp4": 0.70}
USUAL_EFFICIENCY = 0.93
"""Share of datasheet bandwidth that the bundled kernels stream KV at: of these elements, and of all others. Assumed;
measured on H200s from batch 8 on are 0.91 to 0.96 for 16 and 8 bits, 0.89 for int4, and 0.70 for nvfp4, which unpacking
limits."""
KERNEL_INTERCEPT_S = {"int4": 12e-6, "nvfp4": 12e-6}
USUAL_INTERCEPT_S = 9e-6
"""Launch and join of one call, likewise (assumed; 7 to 14 µs measured on an H200, 12 to 15 µs in 4 bits)."""
LATENT_TILE_ROWS = 16
LATENT_EFFICIENCY = 0.96
LATENT_INTERCEPT_S = 20e-6
LATENT_FLOPS = {"bf16": 0.26, "fp8_e4m3": 0.28, "fp8_ds_mla": 0.18}
LATENT_HEAD_S = {"bf16": 0.0, "fp8_e4m3": 0.6e-6, "fp8_ds_mla": 0.6e-6}
"""Of the bundled latent kernel: fewest query rows it multiplies with, share of bandwidth, time of a call; by row
format, share of dense bf16 FLOPs and time of a call for each head. Assumed; set from runs with 16 and 128 heads on an
H200."""


@dataclass(frozen=True)
class Predictor:
    """Predicts seconds of one layer's attention, None of a cell that it knows nothing of.

    ``kind`` is ``calibrated`` or ``assumed``, ``source`` one line for people.
    """

    kind: Literal["calibrated", "assumed"]
    source: str
    latency_s: Callable[[Cell], float | None]


def find_predictor(environment: Environment, latent_heads: int | None = None) -> Predictor | None:
    """The calibration of this GPU and these kernels (the user's, else a shipped one), else its datasheet.

    ``latent_heads`` is the number of query heads on a latent, None for plain attention. The result is None for a
    device of which kvplan knows nothing yet.

    Raises:
        ProfileError: a calibration file breaks its schema.

    """
    if latent_heads is not None:
        mla = find_latent(environment.gpu, ENGINE, latent_heads)
        if mla is not None:
            return latent_predictor(mla)
    else:
        attention = find_attention(environment.gpu, ENGINE)
        if attention is not None:
            return attention_predictor(attention)
    if environment.gpu not in profiles.names("gpus"):
        return None
    return (datasheet_predictor if latent_heads is None else latent_datasheet_predictor)(load_gpu(environment.gpu))


def attention_predictor(calibration: AttentionCalibration) -> Predictor:
    """What a calibration of the bundled kernels of plain attention says."""

    def latency_s(cell: Cell) -> float:
        shape = cell.family.shape
        return float(
            calibration.latency_s(
                cell.batch_size, cell.context_tokens, shape.num_q_heads, shape.num_kv_heads, shape.head_dim,
                window_tokens=shape.window_tokens or 0, kv_dtype=cell.family.kv_dtype,
            )
        )  # fmt: skip

    return Predictor("calibrated", calibration.source, latency_s)


def latent_predictor(calibration: LatentCalibration) -> Predictor:
    """What a calibration of the bundled kernel of latent attention says."""

    def latency_s(cell: Cell) -> float | None:
        family = cell.family
        return calibration.latency_s(family.kv_dtype, cell.batch_size, cell.context_tokens, family.shape.num_q_heads,
                                     family.bytes_per_token)  # fmt: skip

    return Predictor("calibrated", calibration.source, latency_s)


def datasheet_predictor(gpu: GpuSpec) -> Predictor | None:
    """A share of the datasheet's bandwidth and a fixed cost a call; None where the bandwidth is not known."""
    peak = gpu.memory_bandwidth_bytes_per_s
    if peak is None:
        return None

    def latency_s(cell: Cell) -> float:
        element = cell.family.element
        share = KERNEL_EFFICIENCY.get(element, USUAL_EFFICIENCY)
        return KERNEL_INTERCEPT_S.get(element, USUAL_INTERCEPT_S) + cell.read_bytes / (share * peak)

    shares = ", ".join(f"{element} {share:.0%}" for element, share in KERNEL_EFFICIENCY.items())
    calls = ", ".join(f"{element} {time_s * 1e6:.0f}" for element, time_s in KERNEL_INTERCEPT_S.items())
    source = (
        f"roofline: {USUAL_EFFICIENCY:.0%} ({shares}) of the datasheet's {peak / 1e12:.2f} TB/s "
        f"and {USUAL_INTERCEPT_S * 1e6:.0f} ({calls}) µs a call, all assumed"
    )
    return Predictor("assumed", source, latency_s)


def latent_datasheet_predictor(gpu: GpuSpec) -> Predictor | None:
    """Shares of the datasheet's bandwidth and bf16 FLOPs, and a fixed cost a call; None where one is not known."""
    peak, flops = gpu.memory_bandwidth_bytes_per_s, gpu.dense_flops_per_s.get("bf16")
    if peak is None or flops is None:
        return None

    def latency_s(cell: Cell) -> float:
        family, tokens = cell.family, cell.batch_size * cell.context_tokens
        rows = max(family.shape.num_q_heads, LATENT_TILE_ROWS)
        products = tokens * rows * FLOPS_PER_ROW / (LATENT_FLOPS[family.element] * flops)
        call = LATENT_INTERCEPT_S + rows * LATENT_HEAD_S[family.element]
        return call + hypot(cell.read_bytes / (LATENT_EFFICIENCY * peak), products)

    shares = ", ".join(f"{name} {share:.0%}" for name, share in LATENT_FLOPS.items())
    source = (
        f"roofline: {LATENT_EFFICIENCY:.0%} of the datasheet's {peak / 1e12:.2f} TB/s beside products at a share of "
        f"its {flops / 1e12:,.0f} TFLOP/s ({shares}), {LATENT_INTERCEPT_S * 1e6:.0f} µs a call and in 8 bits "
        f"{LATENT_HEAD_S['fp8_e4m3'] * 1e6:.1f} µs a query head, all assumed"
    )
    return Predictor("assumed", source, latency_s)
