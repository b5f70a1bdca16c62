"""Quantise new keys and values and append them to a paged cache: what an engine does each step before it attends.

For every new token and KV head: scale = max |x| / largest code (per token and head, dynamic), or the cache's own scale
(none, per tensor, per head); code = round to nearest even of x / scale; code and scale go to the token's slot.

e4m3 and e5m2 codes are made with integer arithmetic on the FP32 bits (round half to even at the format's last mantissa
bit, subnormals by adding 1.5 * 2**23), the same on every architecture. 4-bit rows take a scale a block (FP16, or e4m3
over the cache's FP32 scale).
"""

import torch
import triton
import triton.language as tl

from .formats import int4_plane_dims
from .paged_cache import PagedKvCache

SMALLEST_SCALE = tl.constexpr(1e-12)
"""Scale of a row of zeros (see `reference.quantise`)."""


@triton.jit
def _round_to_int(x):
    """Nearest even integer of |x| < 2**22, as int32."""
    return ((x + 12582912.0).to(tl.int32, bitcast=True)) - 0x4B400000


@triton.jit
def encode_float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """FP32 values within the format's range to 8-bit codes with MANTISSA bits and exponent bias BIAS, as uint8."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    drop: tl.constexpr = 23 - MANTISSA
    rounded = magnitude + ((1 << (drop - 1)) - 1) + ((magnitude >> drop) & 1)
    normal = (rounded >> drop) - ((127 - BIAS) << MANTISSA)
    step: tl.constexpr = 2.0 ** (BIAS - 1 + MANTISSA)
    subnormal = _round_to_int(tl.abs(x) * step)
    smallest_normal: tl.constexpr = 2.0 ** (1 - BIAS)
    return (sign | tl.where(tl.abs(x) < smallest_normal, subnormal, normal)).to(tl.uint8)


@triton.jit
def _append_row(
    new_at, row_ptr, scale_ptr, dims, dims_ok, FORMAT: tl.constexpr, DYNAMIC: tl.constexpr, MAX_VALUE: tl.constexpr
):
    """One row: read, scale, encode, store; `scale_ptr` is where its scale goes (DYNAMIC) or comes from."""
    x = tl.load(new_at, mask=dims_ok, other=0.0)
    if FORMAT == 0:
        tl.store(row_ptr + dims, x.to(row_ptr.dtype.element_ty), mask=dims_ok)
    else:
        x = x.to(tl.float32)
        if DYNAMIC:
            scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), MAX_VALUE), SMALLEST_SCALE)
            tl.store(scale_ptr, scale)
        else:
            scale = tl.load(scale_ptr)
        y = tl.div_rn(x, scale)
        y = tl.minimum(tl.maximum(y, -MAX_VALUE), MAX_VALUE)
        if FORMAT == 1:
            code = encode_float8(y, 3, 7)
        elif FORMAT == 2:
            code = encode_float8(y, 2, 15)
        else:
            code = _round_to_int(y).to(tl.uint8)
        tl.store(row_ptr + dims, code, mask=dims_ok)


@triton.jit
def _append(
    k_new_ptr,
    v_new_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slot_ptr,
    stride_new_token,
    stride_new_head,
    stride_page,  # of the cache, in elements
    stride_token,
    stride_head,
    stride_scale_page,
    stride_scale_token,
    stride_scale_head,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    DYNAMIC: tl.constexpr,
    MAX_VALUE: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot >= 0:
        page = slot // PAGE
        in_page = slot % PAGE
        dims = tl.arange(0, DP)
        dims_ok = dims < D
        new_at = token.to(tl.int64) * stride_new_token + head * stride_new_head
        row = page * stride_page + in_page * stride_token + head * stride_head
        if DYNAMIC:
            scale = page * stride_scale_page + in_page * stride_scale_token + head * stride_scale_head
        else:
            scale = head
        _append_row(
            k_new_ptr + new_at + dims, k_ptr + row, k_scale_ptr + scale, dims, dims_ok, FORMAT, DYNAMIC, MAX_VALUE
        )
        _append_row(
            v_new_ptr + new_at + dims, v_ptr + row, v_scale_ptr + scale, dims, dims_ok, FORMAT, DYNAMIC, MAX_VALUE
        )


@triton.jit
def _append_int4_row(new_at, row_ptr, scale_ptr, global_scale, D: tl.constexpr, PLANE: tl.constexpr):
    """One row of an int4 cache: a scale a block, then codes, four planes to a word."""
    SECTIONS: tl.constexpr = D // (4 * PLANE)
    blocks = tl.arange(0, D // 32)
    x = tl.load(new_at + tl.arange(0, D)).to(tl.float32).reshape([D // 32, 32])
    scale = tl.div_rn(tl.div_rn(tl.max(tl.abs(x), 1), 7.0), global_scale)
    scale = tl.maximum(scale, 2.0**-14).to(tl.float16)
    tl.store(scale_ptr + blocks, scale)
    y = tl.div_rn(x, (scale.to(tl.float32) * global_scale)[:, None])
    codes = _round_to_int(tl.minimum(tl.maximum(y, -7.0), 7.0)) + 8
    planes = tl.reshape(codes, [SECTIONS, 4, PLANE]) << (4 * tl.arange(0, 4))[None, :, None]
    at = tl.arange(0, SECTIONS)[:, None] * PLANE + tl.arange(0, PLANE)[None, :]
    tl.store(row_ptr.to(tl.pointer_type(tl.uint16), bitcast=True) + at, tl.sum(planes, 1).to(tl.uint16))


@triton.jit
def _code_e2m1(y):
    """e2m1 codes (int32) of scaled values: to the nearest, ties to even."""
    x = tl.abs(y)
    up = (x > 0.25).to(tl.int32) + (x >= 0.75).to(tl.int32) + (x > 1.25).to(tl.int32) + (x >= 1.75).to(tl.int32)
    up += (x > 2.5).to(tl.int32) + (x >= 3.5).to(tl.int32) + (x > 5.0).to(tl.int32)
    return up | ((y.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _append_nvfp4_row(new_at, row_ptr, scale_ptr, global_scale, D: tl.constexpr):
    """One row of an nvfp4 cache: a scale a block, then codes, two in a byte."""
    blocks = tl.arange(0, D // 16)
    byte = blocks[:, None] * 8 + tl.arange(0, 8)[None, :]
    even = tl.load(new_at + 2 * byte).to(tl.float32)
    odd = tl.load(new_at + 2 * byte + 1).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
    scale = tl.div_rn(tl.div_rn(largest, 6.0), global_scale)
    code = encode_float8(tl.minimum(tl.maximum(scale, 2.0**-6), 448.0), 3, 7)
    tl.store(scale_ptr + blocks, code)
    step = (((code.to(tl.int32) >> 3) + 120) << 23 | ((code.to(tl.int32) & 7) << 20)).to(tl.float32, bitcast=True)
    step *= global_scale
    low = _code_e2m1(tl.div_rn(even, step[:, None]))
    high = _code_e2m1(tl.div_rn(odd, step[:, None]))
    tl.store(row_ptr + byte, (low | (high << 4)).to(tl.uint8))


@triton.jit
def _append4(
    k_new_ptr,
    v_new_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    global_ptr,
    slot_ptr,
    stride_new_token,
    stride_new_head,
    stride_page,
    stride_token,
    stride_head,
    stride_scale_page,
    stride_scale_token,
    stride_scale_head,
    D: tl.constexpr,
    PLANE: tl.constexpr,  # of an int4 row
    PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot >= 0:
        page = slot // PAGE
        in_page = slot % PAGE
        new_at = token.to(tl.int64) * stride_new_token + head * stride_new_head
        row = page * stride_page + in_page * stride_token + head * stride_head
        scale = page * stride_scale_page + in_page * stride_scale_token + head * stride_scale_head
        if FORMAT == 4:
            _append_int4_row(k_new_ptr + new_at, k_ptr + row, k_scale_ptr + scale, tl.load(global_ptr), D, PLANE)
            _append_int4_row(v_new_ptr + new_at, v_ptr + row, v_scale_ptr + scale, tl.load(global_ptr + 1), D, PLANE)
        else:
            _append_nvfp4_row(k_new_ptr + new_at, k_ptr + row, k_scale_ptr + scale, tl.load(global_ptr), D)
            _append_nvfp4_row(v_new_ptr + new_at, v_ptr + row, v_scale_ptr + scale, tl.load(global_ptr + 1), D)


def append_kv(k: torch.Tensor, v: torch.Tensor, cache: PagedKvCache, slots: torch.Tensor) -> None:
    """Write the rows of `k` and `v` (`[tokens, kv_heads, head_dim]`, float) into `cache` at `slots`.

    `slots` (int, `[tokens]`) counts through the cache: page * block_size_tokens + slot; negative ones are skipped.
    Per-tensor and per-head scales are read from the cache. One launch.
    """
    if k.shape != v.shape or k.stride() != v.stride() or k.stride(-1) != 1:
        raise ValueError("k and v must have the same shape and strides, contiguous in head_dim")
    if cache.k.stride() != cache.v.stride() or cache.k_scale.stride() != cache.v_scale.stride():
        raise ValueError("K and V of the cache must lie alike: they are written with the same strides")
    rows = cache.by_page_slot_head(cache.k)
    if cache.scale_granularity == "block":
        _append4[(k.shape[0], k.shape[1])](
            *(k, v, cache.k, cache.v, cache.k_scale, cache.v_scale, cache.global_scales, slots),
            *(k.stride(0), k.stride(1), *rows.stride()[:3], *cache.k_scale.transpose(1, 2).stride()[:3]),
            D=cache.head_dim,
            PLANE=int4_plane_dims(cache.head_dim),
            PAGE=cache.block_size_tokens,
            FORMAT=cache.fmt.code,
            num_warps=1,
        )
        return
    k_scale, v_scale = cache.k_scale, cache.v_scale
    scale_strides: tuple[int, ...] = (0, 0, 0)
    dynamic = cache.scale_granularity.startswith("token_head")
    if dynamic:
        k_scale, v_scale = cache.row_scales("k"), cache.row_scales("v")
        scale_strides = k_scale.stride()
    _append[(k.shape[0], k.shape[1])](
        *(k, v, cache.k, cache.v, k_scale, v_scale, slots, k.stride(0), k.stride(1)),
        *rows.stride()[:3],
        *scale_strides,
        D=cache.head_dim,
        DP=1 << (cache.head_dim - 1).bit_length(),
        PAGE=cache.block_size_tokens,
        FORMAT=cache.fmt.code,
        DYNAMIC=dynamic,
        MAX_VALUE=cache.fmt.max_value or 0.0,
        num_warps=1,
    )
