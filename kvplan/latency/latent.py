"""Latent (MLA) decode attention: what a token of context costs, by its bytes and by its FLOPs.

A kernel streams one latent of 512 + 64 elements for all heads and multiplies tiles of 64 query rows with it
(DeepSeek-V2, arXiv 2405.04434). On Hopper the products take about as long as the stream even then: halving the bytes
saves a quarter of the time, not half.
"""

from __future__ import annotations

from functools import lru_cache
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvplan.gpu import GpuSpec
from kvplan.model_config.types import LatentCache, ModelConfig

if TYPE_CHECKING:
    from kvplan.calibration.latent import LatentCalibration

LATENT_ELEMENTS = 512 + 64
FLOPS_PER_ROW = 2 * (2 * 512 + 64)
TILE_ROWS = 64
ASSUMED_BANDWIDTH, ASSUMED_FLOPS = 0.9, 0.7
"""Shares of peak where no kernel was measured; measured ones reach 0.75 to 1 and 0.7 to 0.8 (assumed)."""


class LatentSpeed(NamedTuple):
    """Seconds a sequence's token of context takes in one layer, and the calibration it is from (None: assumed)."""

    slope_s: float
    source: str | None


def latent_heads(model: ModelConfig, attention_tp_size: int, dcp_size: int = 1) -> int | None:
    """Query heads of a rank where every layer that reads the context is plain latent attention; else None.

    Ranks that split the context have each other's heads too.
    """
    if not model.cache_kinds <= {"mla"}:
        return None
    heads = max(
        (c.num_q_heads for layer in model.layers for c in layer.caches if isinstance(c, LatentCache)), default=0
    )
    return max(heads * dcp_size // attention_tp_size, 1) if heads else None


def latent_bytes_ratio(model: ModelConfig, row_bytes: int) -> float:
    """Bytes of a token in a latent layer over those of 16 bits; 1 of models without one."""
    width = max((c.latent_dim + c.rope_dim for layer in model.layers for c in layer.caches
                 if isinstance(c, LatentCache)), default=0)  # fmt: skip
    return row_bytes / (2 * width) if width else 1.0


@lru_cache(maxsize=64)
def latent_calibration(gpu_name: str, engine: str, num_heads: int, path: str | None) -> LatentCalibration | None:
    """The calibration of an engine's latent kernel on a GPU, or the one given, remembered; None when there is none.

    Raises:
        ProfileError: ``path`` is given and holds none of this GPU and number of query heads.

    """
    from kvplan.calibration.latent import find_latent, read_latent

    return find_latent(gpu_name, engine, num_heads) if path is None else read_latent(Path(path), gpu_name, num_heads)


def latent_speed(
    gpu: GpuSpec, calibration: LatentCalibration | None, bytes_ratio: float, num_heads: int
) -> LatentSpeed:
    """The slope of ``num_heads`` query heads on rows of 16 bits, or on rows of 8 with ``bytes_ratio`` of their bytes.

    That is 0.5 of plain elements, and 656 / 1,152 with scales of blocks and 16-bit RoPE.
    """
    row_bytes, is_half = 2 * LATENT_ELEMENTS * bytes_ratio, bytes_ratio >= 1
    entry = "bfloat16" if is_half else "fp8"
    measured = None if calibration is None else calibration.slope_s(entry, num_heads, row_bytes)
    if calibration is not None and measured is not None:
        return LatentSpeed(measured, calibration.source)
    half = gpu.dense_flops_per_s.get("bf16") or gpu.dense_flops_per_s.get("fp16") or 0.0
    if not is_half and gpu.sm is not None and gpu.sm >= 100:
        half = gpu.dense_flops_per_s.get("fp8") or half
    stream = row_bytes / ((gpu.memory_bandwidth_bytes_per_s or 0.0) * ASSUMED_BANDWIDTH)
    return LatentSpeed(hypot(stream, FLOPS_PER_ROW * max(num_heads, TILE_ROWS) / (half * ASSUMED_FLOPS)), None)
