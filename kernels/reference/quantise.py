"""Quantisers of the KV formats: symmetric, scale = max |x| / largest code.

e4m3 and e5m2 are the OCP 8-bit formats (OFP8 specification, 2023); scales are FP32.
"""

import torch

from ..formats import SCALE_BLOCK_DIMS, KvFormat, int4_plane_dims

SMALLEST_SCALE = 1e-12
"""A row of zeros gets this scale, so that no division by zero follows."""


def scale_of(x: torch.Tensor, fmt: KvFormat, scale_granularity: str) -> torch.Tensor:
    """FP32 scales of `x` `[tokens, kv_heads, head_dim]`: `[1]` (none, tensor), `[kv_heads]` or `[tokens, kv_heads]`."""
    if not fmt.quantised or scale_granularity == "none":
        return torch.ones(1, device=x.device)
    over = {"tensor": (0, 1, 2), "head": (0, 2)}.get(scale_granularity, (2,))
    largest = x.float().abs().amax(over)
    # a tensor divides exactly on every device; a Python number may become a multiplication by its reciprocal
    scale = (largest / torch.full_like(largest, fmt.max_value)).clamp_min(SMALLEST_SCALE)
    return scale.reshape(1) if scale_granularity == "tensor" else scale


def quantise_with(x: torch.Tensor, fmt: KvFormat, scale: torch.Tensor) -> torch.Tensor:
    """Codes of `x` `[tokens, kv_heads, head_dim]` for given FP32 scales `[1]` or `[tokens or 1, kv_heads]`."""
    dtype = getattr(torch, fmt.torch_dtype)
    if not fmt.quantised:
        return x.to(dtype)
    y = x.float() / scale[..., None]
    if fmt.name == "int8":
        y = y.round()
    return y.clamp(-fmt.max_value, fmt.max_value).to(dtype)


def quantise(x: torch.Tensor, fmt: KvFormat, scale_granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (in the format's storage dtype, the shape of `x`) and FP32 scales of `x` `[tokens, kv_heads, head_dim]`."""
    scale = scale_of(x, fmt, scale_granularity)
    return quantise_with(x, fmt, scale), scale


def dequantise(codes: torch.Tensor, fmt: KvFormat, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values of `codes`: storage dtype, or uint8 bytes of an 8-bit format; `scale` broadcasts against `codes`."""
    if fmt.element_bits == 8:
        codes = codes.view(getattr(torch, fmt.torch_dtype))
    return codes.to(dtype) * scale.to(dtype)


E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Between neighbours, and whether a number exactly there goes up (to the even code)."""
SMALLEST_BLOCK_SCALE = {"int4": 2.0**-14, "nvfp4": 2.0**-6}
"""Smallest normal FP16 and e4m3 numbers: a block of zeros, or nearly, gets this scale."""


def _codes4(y: torch.Tensor, fmt: KvFormat) -> torch.Tensor:
    """4-bit codes (uint8, 0 to 15) of scaled values."""
    if fmt.name == "int4":
        return (y.round().clamp(-7, 7) + 8).to(torch.uint8)
    magnitude = y.abs()
    steps = [(magnitude >= m) if up else (magnitude > m) for m, up in _E2M1_MIDPOINTS]
    return torch.stack(steps).sum(0).to(torch.uint8) | (torch.signbit(y).to(torch.uint8) << 3)


def pack_nibbles(codes: torch.Tensor, fmt: KvFormat) -> torch.Tensor:
    """Bytes `[..., head_dim / 2]` of codes `[..., head_dim]`, laid out as `formats` says."""
    if fmt.name == "int4":  # [..., section, plane, word] to [..., section, word, plane]
        plane = int4_plane_dims(codes.shape[-1])
        codes = codes.unflatten(-1, (-1, 4, plane)).transpose(-1, -2).flatten(-3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, fmt: KvFormat) -> torch.Tensor:
    """Codes `[..., head_dim]`, uint8, of packed rows: the inverse of `pack_nibbles`."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    if fmt.name == "int4":
        plane = int4_plane_dims(codes.shape[-1])
        codes = codes.unflatten(-1, (-1, plane, 4)).transpose(-1, -2).flatten(-3)
    return codes


def quantise_blocks(
    x: torch.Tensor, fmt: KvFormat, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit rows of `x` `[..., head_dim]`: packed bytes `[..., head_dim / 2]`, stored block scales, FP32 global `[1]`.

    Scales are FP16 (int4: largest / 7) or e4m3 codes as uint8 (nvfp4: largest / 6 / global). The global scale of nvfp4
    is largest / (6 * 448) unless given; int4 has 1.
    """
    blocks = x.float().unflatten(-1, (-1, SCALE_BLOCK_DIMS[fmt.name]))
    largest = blocks.abs().amax(-1)
    if global_scale is None:
        top = largest.max().clamp_min(SMALLEST_SCALE) / (6 * 448) if fmt.name == "nvfp4" else torch.ones(())
        global_scale = top.reshape(1).to(x.device)
    scale = largest / torch.full_like(largest, fmt.max_value) / global_scale
    stored = scale.clamp_min(SMALLEST_BLOCK_SCALE[fmt.name])
    stored = stored.half() if fmt.name == "int4" else stored.clamp_max(448).to(torch.float8_e4m3fn)
    codes = _codes4(blocks / (stored.float() * global_scale)[..., None], fmt).flatten(-2)
    return pack_nibbles(codes, fmt), stored if fmt.name == "int4" else stored.view(torch.uint8), global_scale


def dequantise_blocks(
    packed: torch.Tensor, fmt: KvFormat, scales: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Values `[..., head_dim]` of packed rows in `dtype`."""
    codes = unpack_nibbles(packed, fmt)
    if fmt.name == "int4":
        values = codes.to(dtype) - 8
    else:
        table = torch.tensor(E2M1_VALUES, dtype=dtype, device=packed.device)
        values = table[(codes & 7).long()] * torch.where(codes >= 8, -1.0, 1.0).to(dtype)
        scales = scales.view(torch.float8_e4m3fn)
    blocks = values.unflatten(-1, (-1, SCALE_BLOCK_DIMS[fmt.name])) * scales.to(dtype)[..., None]
    return blocks.flatten(-2) * global_scale.to(dtype)
