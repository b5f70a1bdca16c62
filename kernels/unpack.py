"""Device functions: KV codes to float16, exactly.

`UNPACK` says how: 0 plain casts (the interpreter; ROCm, never run there), 1 integer bit arithmetic (sm_80 and sm_86,
which have no e4m3 conversion), 2 PTX (sm_89 and later).

e4m3 by bits: sign and the 7 other bits moved into a float16 give the value with exponent bias 15 instead of 7, so a
multiplication by 2**8 is exact, subnormals included. The NaN code (0x7f) reads as 480 there.
"""

import triton
import triton.language as tl

PLAIN, BITS, PTX = 0, 1, 2
INT8_BIAS = tl.constexpr(1152.0)
E2M1_UNIT = tl.constexpr(2.0**-6)


@triton.jit
def _e4m3_high_byte_to_f16(x16):
    """Code in the high byte of a uint16 (low byte zero) to float16."""
    moved = (x16 & 0x8000) | ((x16 & 0x7F00) >> 1)
    return moved.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def unpack_elements(x, FORMAT: tl.constexpr, UNPACK: tl.constexpr):
    """uint8 codes to float16, same shape. FORMAT: 1 e4m3, 2 e5m2, 3 int8 (plus INT8_BIAS)."""
    if FORMAT == 1:
        if UNPACK == 1:
            y = _e4m3_high_byte_to_f16(x.to(tl.uint16) << 8)
        else:
            y = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif FORMAT == 2:
        if UNPACK == 0:
            y = x.to(tl.float8e5, bitcast=True).to(tl.float16)
        else:
            y = tl.inline_asm_elementwise(
                "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;",
                "=r,=r,r",
                [x],
                dtype=tl.float16,
                is_pure=True,
                pack=4,
            )
    elif FORMAT == 3:
        if UNPACK == 0:
            y = (x.to(tl.int8, bitcast=True).to(tl.float32) + INT8_BIAS).to(tl.float16)
        else:  # bytes of 0x64xx are the float16 numbers 1024 + xx; xx is the code plus 128
            y = tl.inline_asm_elementwise(
                """{
                .reg .b32 biased;
                xor.b32 biased, $2, 0x80808080;
                prmt.b32 $0, biased, 0x64646464, 0x4140;
                prmt.b32 $1, biased, 0x64646464, 0x4342;
                }""",
                "=r,=r,r",
                [x],
                dtype=tl.float16,
                is_pure=True,
                pack=4,
            )
    return y


@triton.jit
def unpack_pairs(x16, FORMAT: tl.constexpr, UNPACK: tl.constexpr):
    """uint16 pairs of codes to two float16 tensors: the low bytes (even elements), the high bytes (odd elements)."""
    if UNPACK == 2 and FORMAT == 1:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [x16],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif UNPACK != 0 and FORMAT == 3:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 biased, low, high, zero;
            xor.b32 biased, $2, 0x80808080;
            prmt.b32 low, biased, 0x64646464, 0x4240;
            prmt.b32 high, biased, 0x64646464, 0x4341;
            mov.b32 zero, 0x64806480;
            sub.f16x2 $0, low, zero;
            sub.f16x2 $1, high, zero;
            }""",
            "=r,=r,r",
            [x16],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif UNPACK != 0 and FORMAT == 2:  # an e5m2 code is the high byte of the same float16
        even, odd = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x2404; prmt.b32 $1, $2, 0, 0x3414;",
            "=r,=r,r",
            [x16],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif UNPACK == 1:
        even = _e4m3_high_byte_to_f16(x16 << 8)
        odd = _e4m3_high_byte_to_f16(x16 & 0xFF00)
    elif FORMAT == 3:
        even = (x16 & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True).to(tl.float16)
        odd = (x16 >> 8).to(tl.uint8).to(tl.int8, bitcast=True).to(tl.float16)
    else:
        even = unpack_elements((x16 & 0xFF).to(tl.uint8), FORMAT, 0)
        odd = unpack_elements((x16 >> 8).to(tl.uint8), FORMAT, 0)
    return even, odd


@triton.jit
def _e2m1_to_f16(nibble):
    """e2m1 codes 0 to 15 (uint16) to float16 by moving their bits: `E2M1_UNIT` of the value."""
    moved = ((nibble & 7) << 9) | ((nibble & 8) << 12)
    return moved.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def unpack_e2m1(x, UNPACK: tl.constexpr):
    """uint16 words of four e2m1 codes to four float16 tensors, lowest first, as `E2M1_UNIT` of their values.

    The bits of e2m1 sit in an e4m3 code as they are, subnormals alike, and that becomes float16 exactly.
    """
    if UNPACK == 0:
        a = _e2m1_to_f16(x & 0xF)
        b = _e2m1_to_f16((x >> 4) & 0xF)
        c = _e2m1_to_f16((x >> 8) & 0xF)
        d = _e2m1_to_f16(x >> 12)
    elif UNPACK == 2:  # s0eem00 of an e4m3 code; bytes in the order in which the conversion takes pairs
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, low, high, sign;
            .reg .b16 first, second;
            prmt.b32 bytes, $4, 0, 0x3120;
            shl.b32 sign, bytes, 4;
            shl.b32 low, bytes, 2;
            shr.u32 high, bytes, 2;
            and.b32 low, low, 0x1C1C1C1C;
            and.b32 high, high, 0x1C1C1C1C;
            lop3.b32 low, sign, 0x80808080, low, 0xEA;
            lop3.b32 high, bytes, 0x80808080, high, 0xEA;
            mov.b32 {first, second}, low;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $2, second;
            mov.b32 {first, second}, high;
            cvt.rn.f16x2.e4m3x2 $1, first;
            cvt.rn.f16x2.e4m3x2 $3, second;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:  # without e4m3 in hardware: bits moved into float16, then times 2**8
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, scale;
            mov.b32 scale, 0x5C005C00;
            shl.b32 t, $4, 9; and.b32 $0, t, 0x0E000E00; shl.b32 t, $4, 12; and.b32 t, t, 0x80008000; or.b32 $0, $0, t;
            shl.b32 t, $4, 5; and.b32 $1, t, 0x0E000E00; shl.b32 t, $4, 8; and.b32 t, t, 0x80008000; or.b32 $1, $1, t;
            shl.b32 t, $4, 1; and.b32 $2, t, 0x0E000E00; shl.b32 t, $4, 4; and.b32 t, t, 0x80008000; or.b32 $2, $2, t;
            shr.b32 t, $4, 3; and.b32 $3, t, 0x0E000E00; and.b32 t, $4, 0x80008000; or.b32 $3, $3, t;
            mul.f16x2 $0, $0, scale; mul.f16x2 $1, $1, scale; mul.f16x2 $2, $2, scale; mul.f16x2 $3, $3, scale;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@triton.jit
def unpack_planes(x, UNPACK: tl.constexpr):
    """uint16 words of four nibbles to four float16 tensors: the nibbles times 2**-24, 2**-20, 2**-24, 2**-20."""
    if UNPACK == 0:
        a = (x & 0xF).to(tl.uint16).to(tl.float16, bitcast=True)
        b = (x & 0xF0).to(tl.uint16).to(tl.float16, bitcast=True)
        c = ((x >> 8) & 0xF).to(tl.uint16).to(tl.float16, bitcast=True)
        d = ((x >> 8) & 0xF0).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 upper;
            shr.u32 upper, $4, 8;
            and.b32 $0, $4, 0x000F000F;
            and.b32 $1, $4, 0x00F000F0;
            and.b32 $2, upper, 0x000F000F;
            and.b32 $3, upper, 0x00F000F0;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@triton.jit
def unpack_scales(x, WIDE: tl.constexpr, UNPACK: tl.constexpr):
    """Four float16 numbers in a uint64 to four tensors, lowest first, as they are or `WIDE`, in FP32.

    A uint32 holds two, each of which is then given twice.
    """
    DTYPE: tl.constexpr = tl.float32 if WIDE else tl.float16
    if x.dtype.primitive_bitwidth == 32:
        a = x.to(tl.uint16).to(tl.float16, bitcast=True).to(DTYPE)
        c = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(DTYPE)
        b = a
        d = c
    elif UNPACK == 0:
        a = x.to(tl.uint16).to(tl.float16, bitcast=True).to(DTYPE)
        b = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(DTYPE)
        c = (x >> 32).to(tl.uint16).to(tl.float16, bitcast=True).to(DTYPE)
        d = (x >> 48).to(tl.uint16).to(tl.float16, bitcast=True).to(DTYPE)
    elif WIDE:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b16 a, b, c, d;
            mov.b64 {a, b, c, d}, $4;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""",
            "=f,=f,=f,=f,l",
            [x],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            "mov.b64 {$0, $1, $2, $3}, $4;",
            "=h,=h,=h,=h,l",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    return a, b, c, d
