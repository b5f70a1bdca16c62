"""KV-cache formats and weight formats: how many bytes an element takes, and what its scales cost.

A KV format answers one question: how many bytes does one token of one KV head take, K and V together, and how many of
those are scales. Engines name the same format differently and store its scales in different places; what an engine does
with a format is that engine's rule set (``kvplan.memory.engines``), not this module.

Sources: vLLM 0.33 ``vllm/v1/kv_cache_interface.py`` and ``vllm/model_executor/layers/quantization/turboquant``;
NVFP4: one FP8 E4M3 scale per 16 E2M1 values (NVIDIA cuDNN and TensorRT-LLM documentation).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kvplan.errors import InputError, UnknownNameError, shorten
from kvplan.units import ceil_div

ScaleGranularity = Literal["none", "tensor", "head", "token", "token_head", "block"]

SCALAR_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "fp32": 4, "fp16": 2, "bf16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1, "fp8": 1, "int8": 1, "uint8": 1,
    "int64": 8, "int32": 4, "int16": 2,
}  # fmt: skip
"""Bytes of one element of a plain torch dtype, by its torch name or the field's short form."""


@dataclass(frozen=True, slots=True)
class KvFormat:
    """How one KV head stores one token.

    Attributes:
        name: the engine-facing name (vLLM's ``--kv-cache-dtype`` where it has one).
        key_bits, value_bits: bits of one K and one V element.
        scale_granularity: what one scale covers. ``tensor`` and ``head`` scales live on the layer, not in the pool.
        key_scale_bytes, value_scale_bytes: bytes of scales (and zero points) per token and head, for ``token_head``
            and per token for ``token``; per block of ``scale_block`` elements for ``block``.
        scale_block: elements that share a scale when ``scale_granularity`` is ``block``.
        even: round the bytes of one (head, token) up to an even number (TurboQuant slots).
        advertised_gain: capacity against 16 bits as people quote it, before scales and padding.
        note: where the format comes from.

    """

    name: str
    key_bits: int
    value_bits: int
    scale_granularity: ScaleGranularity = "none"
    key_scale_bytes: int = 0
    value_scale_bytes: int = 0
    scale_block: int | None = None
    even: bool = False
    note: str = ""

    @property
    def advertised_gain(self) -> float:
        """16-bit bytes over payload bytes: 2.0 for 8-bit, 4.0 for 4-bit."""
        return 32 / (self.key_bits + self.value_bits)

    def payload_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Bytes of K and V elements of one (token, head), scales left out."""
        return ceil_div(head_dim * self.key_bits, 8) + ceil_div(head_dim_v * self.value_bits, 8)

    def scale_bytes(self, head_dim: int, head_dim_v: int, num_kv_heads: int = 1) -> float:
        """Bytes of scales one (token, head) adds to the pool; ``token`` scales are shared by ``num_kv_heads``."""
        if self.scale_granularity == "token_head":
            return self.key_scale_bytes + (self.value_scale_bytes if head_dim_v else 0)
        if self.scale_granularity == "token":
            return (self.key_scale_bytes + (self.value_scale_bytes if head_dim_v else 0)) / num_kv_heads
        if self.scale_granularity == "block" and self.scale_block:
            blocks_v = ceil_div(head_dim_v, self.scale_block) if head_dim_v else 0
            return ceil_div(head_dim, self.scale_block) * self.key_scale_bytes + blocks_v * self.value_scale_bytes
        return 0

    def content_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Bytes of one (token, head) slot, scales stored inline."""
        total = self.payload_bytes(head_dim, head_dim_v) + int(self.scale_bytes(head_dim, head_dim_v))
        return total + total % 2 if self.even else total


_VLLM_FORMATS = (
    KvFormat("bfloat16", 16, 16, note="16-bit, no scales"),
    KvFormat("float16", 16, 16, note="16-bit, no scales"),
    KvFormat("fp32", 32, 32, note="32-bit, no scales; generic engine only"),
    KvFormat("fp8", 8, 8, "tensor", note="E4M3, static FP32 scale per tensor (or per head) on the layer"),
    KvFormat("fp8_e4m3", 8, 8, "tensor", note="E4M3, static FP32 scale per tensor (or per head) on the layer"),
    KvFormat("fp8_e5m2", 8, 8, "tensor", note="E5M2, static FP32 scale per tensor on the layer"),
    KvFormat("fp8_per_token_head", 8, 8, "token_head", 4, 4, note="E4M3, FP32 scale per token and head for K and V"),
    KvFormat("int8_per_token_head", 8, 8, "token_head", 4, 4, note="INT8, FP32 scale per token and head for K and V"),
    KvFormat("int4_per_token_head", 4, 4, "token_head", 4, 4, note="INT4 packed, FP32 per token and head for K and V"),
    KvFormat("nvfp4", 4, 4, "block", 1, 1, 16, note="E2M1, FP8 scale per 16 values"),
    KvFormat("nvfp4_4over6", 4, 4, "block", 1, 1, 16, note="E2M1 with 4-over-6 scaling, FP8 scale per 16 values"),
    KvFormat("turboquant_k8v4", 8, 4, "token_head", 0, 4, even=True, note="K FP8, V 4-bit with FP16 scale and zero"),
    KvFormat("turboquant_4bit_nc", 4, 4, "token_head", 2, 4, even=True, note="K norm and V scale and zero in FP16"),
    KvFormat("turboquant_k3v4_nc", 3, 4, "token_head", 2, 4, even=True, note="K norm and V scale and zero in FP16"),
    KvFormat("turboquant_3bit_nc", 3, 3, "token_head", 2, 4, even=True, note="K norm and V scale and zero in FP16"),
    KvFormat("fp8_ds_mla", 8, 8, "block", 4, 0, 128, note="DeepSeek sparse MLA: 656-byte or 584-byte latent rows"),
    KvFormat("nvfp4_ds_mla", 4, 4, "block", 1, 0, 16, note="DeepSeek sparse MLA: 352-byte latent rows"),
)

KV_FORMATS: dict[str, KvFormat] = {f.name: f for f in _VLLM_FORMATS}
"""Every named KV format, by vLLM's name."""

KV_ALIASES = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float32": "fp32", "float8": "fp8", "e4m3": "fp8_e4m3",
    "e5m2": "fp8_e5m2", "fp8_pth": "fp8_per_token_head", "int8_pth": "int8_per_token_head",
    "int4_pth": "int4_per_token_head", "fp4": "nvfp4", "fp8_inc": "fp8",
}  # fmt: skip

AUTO = "auto"

GENERIC_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "fp4": 4}
_GENERIC = re.compile(r"^(fp32|bf16|fp16|fp8|int8|int4|fp4):(none|tensor|head|token|token_head|block([0-9]{1,4}))"
                      r"(?::(fp32|fp16|bf16|fp8))?$")  # fmt: skip


def kv_format(name: str) -> KvFormat:
    """The KV format called ``name``: vLLM's names, their short forms, or a generic ``int8:token_head:fp32``.

    A generic format is ``ELEMENT:GRANULARITY[:SCALE_DTYPE]`` with ELEMENT fp32, bf16, fp16, fp8, int8, int4 or fp4,
    GRANULARITY none, tensor, head, token, token_head or blockN, SCALE_DTYPE fp32 (default), fp16, bf16 or fp8.

    Raises:
        UnknownNameError: no such format; carries the closest names.

    """
    key = name.strip().lower() if isinstance(name, str) else ""
    key = KV_ALIASES.get(key, key)
    if key in KV_FORMATS:
        return KV_FORMATS[key]
    match = _GENERIC.match(key)
    if match is None:
        raise UnknownNameError(
            "KV-cache dtype", name, [*KV_FORMATS, *KV_ALIASES, AUTO],
            hint="or a generic ELEMENT:GRANULARITY[:SCALE_DTYPE] such as int8:token_head or fp8:block32:fp16",
        )  # fmt: skip
    bits = GENERIC_BITS[match[1]]
    scale = SCALAR_BYTES[match[4] or "fp32"]
    if match[3] is not None:
        block = int(match[3])
        if block == 0:
            raise InputError(f"KV-cache dtype {shorten(name)!r}: a scale block holds at least one element")
        return KvFormat(key, bits, bits, "block", scale, scale, block, note="generic: separate scale buffers")
    granularity: ScaleGranularity = match[2]  # type: ignore[assignment]
    per_token = scale if granularity in ("token", "token_head") else 0
    return KvFormat(key, bits, bits, granularity, per_token, per_token, note="generic: separate scale buffers")


def is_generic(fmt: KvFormat) -> bool:
    """Whether ``fmt`` was spelled out element by element rather than named by an engine."""
    return fmt.name not in KV_FORMATS


def canonical_kv_dtype(name: str) -> str:
    """The name a request is echoed with: aliases resolved, ``auto`` kept."""
    return AUTO if name.strip().lower() == AUTO else kv_format(name).name


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a quantised linear layer stores its weight.

    Attributes:
        bits: bits of one weight element.
        group: elements along the input dimension that share a scale (None: one scale a row or a tensor).
        block: (rows, columns) of a 2-D scale block, for block FP8.
        scale_bytes: bytes of one scale; ``zero_bits`` bits of one zero point (AWQ and GPTQ store them packed).

    """

    name: str
    bits: int
    group: int | None = None
    block: tuple[int, int] | None = None
    scale_bytes: int = 0
    zero_bits: int = 0
    note: str = ""

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a ``[rows, columns]`` weight, its scales and zero points included."""
        payload = ceil_div(rows * columns * self.bits, 8)
        if self.block is not None:
            scales = ceil_div(rows, self.block[0]) * ceil_div(columns, self.block[1])
        elif self.group is not None:
            scales = rows * ceil_div(columns, self.group)
        elif self.scale_bytes:
            scales = rows if self.note == "channel" else 1
        else:
            scales = 0
        return payload + scales * self.scale_bytes + ceil_div(scales * self.zero_bits, 8)


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat("fp32", 32),
        WeightFormat("bf16", 16),
        WeightFormat("fp16", 16),
        WeightFormat("fp8", 8, scale_bytes=4, note="tensor"),
        WeightFormat("fp8_channel", 8, scale_bytes=4, note="channel"),
        WeightFormat("fp8_block", 8, block=(128, 128), scale_bytes=4),
        WeightFormat("int8", 8, scale_bytes=4, note="channel"),
        WeightFormat("int4", 4, group=128, scale_bytes=2, zero_bits=4),
        WeightFormat("int4_symmetric", 4, group=128, scale_bytes=2),
        WeightFormat("nvfp4", 4, group=16, scale_bytes=1),
        WeightFormat("mxfp4", 4, group=32, scale_bytes=1),
        WeightFormat("mxfp8", 8, group=32, scale_bytes=1),
    )
}
"""Weight formats by the names ``--weight-dtype`` takes."""


def weight_format(name: str) -> WeightFormat:
    """The weight format called ``name``.

    Raises:
        UnknownNameError: no such format.

    """
    aliases = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "awq": "int4", "gptq": "int4",
               "fp8_e4m3": "fp8", "w4a16": "int4", "w8a8": "int8", "fp4": "nvfp4"}  # fmt: skip
    key = name.strip().lower()
    key = aliases.get(key, key)
    if key not in WEIGHT_FORMATS:
        raise UnknownNameError("weight dtype", name, WEIGHT_FORMATS, hint=f"it may be {', '.join(WEIGHT_FORMATS)}")
    return WEIGHT_FORMATS[key]
