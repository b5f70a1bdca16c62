"""A decode-attention case: its shapes, the figures of the GPU that matter to it, and the kernel it is sent to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvplan.dtypes import kv_format
from kvplan.errors import InputError
from kvplan.gpu import GpuSpec

Array = NDArray[Any]
WIDE_GROUP = 32
"""Query heads a KV head that fast decode kernels serve at most."""
XQA_MAX_HEAD_DIM = 256
XQA_PIECE_TOKENS = 128
XQA_MIN_PIECES = 33
HBM_PARTITIONED_L2 = (80, 90, 100, 103)
"""Compute capabilities whose L2 is two halves that copy each other's lines, so that less than all of it holds KV."""


@dataclass(frozen=True)
class Hardware:
    """What the form needs to know of a GPU.

    Attributes:
        peak: memory bandwidth, bytes/s.
        l2: bytes of L2 that can hold KV, before the fitted correction.
        l2_sharpness: exponent of the hit curve: 16 where L2 is partitioned, 60 (a cliff) where it is one piece.

    """

    peak: float
    l2: float
    l2_sharpness: float
    sms: int
    flops: float
    l2_nominal: float


def hardware_of(gpu: GpuSpec) -> Hardware:
    """The hardware figures of ``gpu``.

    Raises:
        InputError: bandwidth, L2 or SM count is unknown.

    """
    peak, l2, sms = gpu.memory_bandwidth_bytes_per_s, gpu.l2_cache_bytes, gpu.num_sms
    if not (peak and l2 and sms):
        raise InputError(
            f"GPU {gpu.name}: bandwidth, L2 size and SM count are needed for kernel latencies, and not all are known",
            hint="name a GPU of `kvplan gpus`",
        )
    partitioned = gpu.sm in HBM_PARTITIONED_L2
    flops = gpu.dense_flops_per_s.get("bf16") or 250 * peak
    return Hardware(peak, l2 * (0.8 if partitioned else 1.17), 16.0 if partitioned else 60.0, sms, flops, float(l2))


@dataclass(frozen=True)
class Geometry:
    """Decode-attention shapes, one element a case; arrays of one length (floats)."""

    batch: Array
    context: Array
    q_heads: Array
    kv_heads: Array
    head_dim: Array
    head_dim_v: Array
    window: Array
    token_bytes: Array

    def __len__(self) -> int:
        return len(self.batch)

    def take(self, rows: Array) -> Geometry:
        """The cases at ``rows`` (indices or a mask)."""
        return Geometry(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @property
    def read_tokens(self) -> Array:
        """Tokens of each sequence that attention looks at."""
        return np.where(self.window > 0, np.minimum(self.context, self.window), self.context)

    @property
    def kv_bytes(self) -> Array:
        """KV read by one layer, without page effects."""
        return self.batch * self.read_tokens * self.kv_heads * self.token_bytes

    @property
    def group(self) -> Array:
        """Query heads a KV head."""
        return self.q_heads / self.kv_heads


@dataclass(frozen=True)
class Dispatch:
    """Which cases an engine sends to its other decode kernel: listed shapes, and cases that a named rule picks.

    Attributes:
        shapes: (head_dim, whether windowed, query heads a KV head; None for any).
        rule: a key of ``RULES``, or None.

    """

    shapes: tuple[tuple[int, bool, int | None], ...] = ()
    rule: str | None = None

    @property
    def num_kernels(self) -> int:
        """1 or 2."""
        return 2 if self.shapes or self.rule else 1

    def other(self, g: Geometry) -> Array:
        """Which of the cases go to the other kernel."""
        picked = np.zeros(len(g), dtype=bool) if self.rule is None else RULES[self.rule](g)
        for width, windowed, group in self.shapes:
            shape = (g.head_dim == width) & ((g.window > 0) == windowed)
            picked = picked | (shape if group is None else shape & (g.group == group))
        return picked


ONE_KERNEL = Dispatch()


def not_xqa(g: Geometry) -> Array:
    """Cases that TensorRT-LLM sends to its masked multi-head kernel instead of XQA (``mayHavePerfGain`` of its
    ``DecoderXQARunner``).

    XQA serves 2 to 32 query heads a KV head of up to 256 elements; with 16-bit KV only where pieces of 128 tokens
    are a quarter of the SMs (33 of the 132 of Hopper).
    """
    is_wide = g.token_bytes >= 2 * g.head_dim + 2 * g.head_dim_v
    few = g.batch * g.kv_heads * np.maximum(g.context // XQA_PIECE_TOKENS, 1) < XQA_MIN_PIECES
    other = (g.group < 2) | (g.group > WIDE_GROUP) | (g.head_dim > XQA_MAX_HEAD_DIM)
    return np.asarray(other | (is_wide & few))


RULES = {"tensorrt-llm-xqa": not_xqa}


def default_head_dim_v(head_dim: ArrayLike) -> Array:
    """Values are as wide as keys, except that 192-wide keys (MLA not absorbed, MiMo) come with 128-wide values."""
    width = np.asarray(head_dim, dtype=float)
    return np.where(width == 192, 128.0, width)


def token_bytes_of(kv_dtype: str, head_dim: ArrayLike, head_dim_v: ArrayLike) -> Array:
    """Bytes of one token of one KV head, K and V, scales included."""
    fmt = kv_format(kv_dtype)
    keys, values = np.asarray(head_dim, dtype=float), np.asarray(head_dim_v, dtype=float)
    payload = (keys * fmt.key_bits + values * fmt.value_bits) / 8
    if fmt.scale_granularity == "token_head":
        return np.asarray(payload + fmt.key_scale_bytes + fmt.value_scale_bytes)
    if fmt.scale_granularity == "block" and fmt.scale_block:
        scales = np.ceil(keys / fmt.scale_block) * fmt.key_scale_bytes
        return np.asarray(payload + scales + np.ceil(values / fmt.scale_block) * fmt.value_scale_bytes)
    return np.asarray(payload)
