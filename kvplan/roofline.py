"""Bounds of a decode step from the datasheet, and the default efficiencies used where nothing was measured.

A bound divides bytes by peak bandwidth, FLOPs by dense peak, messages by link rate; nothing runs faster. Efficiencies
are what engines typically reach of them; every one is ``assumed`` until a calibration replaces it.
"""

from __future__ import annotations

from typing import NamedTuple

from kvplan.errors import InputError
from kvplan.gpu import GpuSpec
from kvplan.traffic import Number, Traffic

DEFAULT_RELATIVE_EFFICIENCY = {16: 1.0, 8: 0.9, 4: 0.7, 3: 0.6}
"""Bandwidth reached by kernels that unpack n-bit KV, over the 16-bit kernel's (assumed)."""

LINK_EFFICIENCY = {"nvlink": 0.45, "xgmi": 0.35, "pcie": 0.6}
"""Share of one direction's link rate that collectives of decode-sized messages move data at (assumed)."""

ALL_REDUCE_FACTOR = {"pcie": 3.0}
"""Latency of one small collective over that through NVLink, by link (assumed)."""

FALLBACK_LINK_BYTES_PER_S = 16e9


class Peaks(NamedTuple):
    """What the hardware can do at most, of one GPU.

    Attributes:
        bandwidth_bytes_per_s: of device memory.
        flops_per_s: precision class (bf16, fp8, fp4, int4) → dense peak; formats without units fall back to 16 bits.
        link_bytes_per_s: what collectives reach, the link's efficiency included.
        collective_factor: latency of a small collective, over a Hopper NVLink one.

    """

    bandwidth_bytes_per_s: float
    flops_per_s: dict[str, float]
    link_bytes_per_s: float
    collective_factor: float


def peaks_of(gpu: GpuSpec) -> Peaks:
    """The peaks of a GPU profile.

    Raises:
        InputError: the profile has no bandwidth or no 16-bit peak (a GPU known by its memory only).

    """
    half = gpu.dense_flops_per_s.get("bf16") or gpu.dense_flops_per_s.get("fp16")
    if gpu.memory_bandwidth_bytes_per_s is None or half is None:
        raise InputError(
            f"the bandwidth and compute of {gpu.display_name} are unknown, so its latency is",
            hint="name a GPU with --gpu (`kvplan gpus` lists them)",
        )
    flops = {"bf16": half, "int4": half, "int8": gpu.dense_flops_per_s.get("int8") or half,
             "fp8": gpu.dense_flops_per_s.get("fp8") or half,
             "fp4": gpu.dense_flops_per_s.get("fp4") or half}  # fmt: skip
    kind = gpu.link_kind or "pcie"
    link = (gpu.link_bytes_per_s or FALLBACK_LINK_BYTES_PER_S) * LINK_EFFICIENCY.get(kind, 0.4)
    is_blackwell = gpu.sm is not None and 100 <= gpu.sm < 120
    factor = ALL_REDUCE_FACTOR.get(kind, 1.6 if is_blackwell else 1.0)
    return Peaks(gpu.memory_bandwidth_bytes_per_s, flops, link, factor)


def step_bound_s(
    traffic: Traffic, peaks: Peaks, batch_per_rank: Number, context_tokens: Number, evenness: float | None = None
) -> Number:
    """Weights and KV at peak bandwidth, nothing else counted; experts as routing of that ``evenness`` touches them.

    With pipeline stages the batch takes turns: each part of it passes all stages in one ITL.
    """
    in_step = batch_per_rank / traffic.deployment.pp_size
    tokens = in_step * traffic.deployment.attention_dp_size
    moved = traffic.weight_read_bytes(tokens, evenness) + in_step * traffic.kv_read_bytes(context_tokens)
    return moved / peaks.bandwidth_bytes_per_s


def relative_kv_efficiency(bits: int) -> float:
    """Bandwidth of the kernel that reads ``bits``-bit KV over the 16-bit kernel's (assumed)."""
    return next((value for least, value in DEFAULT_RELATIVE_EFFICIENCY.items() if bits >= least), 0.5)
