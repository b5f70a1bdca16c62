"""Latent (MLA) decode attention: what a token of context costs, by its bytes and by its FLOPs.

A kernel streams one latent of 512 + 64 elements for all heads and multiplies tiles of 64 query rows with it
(DeepSeek-V2, arXiv 2405.04434). On Hopper the products take about as long as the stream even then: halving the bytes
saves a quarter of the time, not half.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import hypot
from typing import Any, NamedTuple

from kvplan.gpu import GpuSpec
from kvplan.model_config.types import LatentCache, ModelConfig

LATENT_ELEMENTS = 512 + 64
FLOPS_PER_ROW = 2 * (2 * 512 + 64)
TILE_ROWS = 64
ASSUMED_BANDWIDTH, ASSUMED_FLOPS = 0.9, 0.7
"""Shares of peak where no kernel was measured; measured ones reach 0.75 to 1 and 0.7 to 0.8 (assumed)."""
ENTRIES = {16: "bfloat16", 8: "fp8"}


class LatentSpeed(NamedTuple):
    """Seconds a sequence's token of context takes in one layer, and the calibration it is from (None: assumed)."""

    slope_s: float
    source: str | None


def latent_heads(model: ModelConfig, attention_tp_size: int) -> int | None:
    """Query heads of a rank where every layer that reads the context is plain latent attention; else None."""
    if not model.cache_kinds <= {"mla"}:
        return None
    heads = max(
        (c.num_q_heads for layer in model.layers for c in layer.caches if isinstance(c, LatentCache)), default=0
    )
    return max(heads // attention_tp_size, 1) if heads else None


def latent_speed(gpu: GpuSpec, engine: str, bits: int, num_heads: int) -> LatentSpeed:
    """The slope of ``num_heads`` query heads on latents of 16 or 8 bits."""
    entry, source = _calibrated(gpu.name, engine, ENTRIES[bits])
    bandwidth, flops = entry.get("bandwidth_fraction", ASSUMED_BANDWIDTH), entry.get("flops_fraction", ASSUMED_FLOPS)
    half = gpu.dense_flops_per_s.get("bf16") or gpu.dense_flops_per_s.get("fp16") or 0.0
    is_blackwell = gpu.sm is not None and gpu.sm >= 100
    if source is None and bits == 8 and is_blackwell:
        half = gpu.dense_flops_per_s.get("fp8") or half
    stream = LATENT_ELEMENTS * bits / 8 / ((gpu.memory_bandwidth_bytes_per_s or 0.0) * bandwidth)
    products = FLOPS_PER_ROW * max(num_heads, TILE_ROWS) / (half * flops)
    return LatentSpeed(hypot(stream, products), source)


@lru_cache(maxsize=64)
def _calibrated(gpu_name: str, engine: str, label: str) -> tuple[Mapping[str, float], str | None]:
    from kvplan.calibration.schema import check_other
    from kvplan.calibration.store import find

    found = find("mla_decode", gpu_name, engine)
    if found is None or label not in found.data.get("entries", {}):
        return {}, None
    check_other(found.data, found.where)
    entry: Mapping[str, Any] = found.data["entries"][label]
    values = {name: float(item["value"]) for name, item in entry["parameters"].items()}
    return values, f"calibration {found.name} ({entry['num_samples']:,} samples, {found.data['date']})"
