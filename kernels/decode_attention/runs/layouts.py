"""Where the bytes of a tile lie: in runs of the cache, in shared memory, in registers (Gluon layouts).

A tile is `tokens` rows, a row `width` elements, a power of two, and a tail of `tail` more. Rows with a tail lie in
shared memory as they do in the cache, one behind another: an odd number of 16-byte chunks, so that no two of eight rows
meet in a bank (of 96 bytes two do). Rows without a tail would all meet; their chunks are swizzled.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def swizzle(row, width_bytes):
    """What the place of a 16-byte chunk within its row is changed by (exclusive or), in chunks."""
    chunks = width_bytes // 16
    return row // max(1, 8 // chunks) % min(8, chunks)


@gluon.constexpr_function
def rows_layout(tokens, width, tail, element_bytes):
    """Shared memory of a tile's rows as [tokens, width] elements, `tail` others behind each."""
    bases = [[0, 1 << i] for i in range(width.bit_length() - 1)]
    rows = [1 << i for i in range(tokens.bit_length() - 1)]
    if tail:
        return gl.PaddedSharedLayout([[width, tail]], bases + [[row, 0] for row in rows], [], [tokens, width])
    per_chunk = 16 // element_bytes
    return gl.SharedLinearLayout(bases + [[row, swizzle(row, width * element_bytes) * per_chunk] for row in rows])


@gluon.constexpr_function
def run_layout(runs, size):
    """Shared memory that a copy of [runs, size] elements fills from end to end."""
    return gl.SharedLinearLayout([[(1 << i) // size, (1 << i) % size] for i in range((runs * size).bit_length() - 1)])


@gluon.constexpr_function
def copy_layout(size, per_thread, warps):
    """Threads of a copy of [runs, size] elements, `per_thread` each: along a run first."""
    along = min(32, size // per_thread)
    warps_along = max(1, min(warps, size // per_thread // 32))
    return gl.BlockedLayout([1, per_thread], [32 // along, along], [warps // warps_along, warps_along], [1, 0])


@gluon.constexpr_function
def product_layout(warps):
    """Accumulators of m16n8k16 products, whose rows the warps share."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])


@gluon.constexpr_function
def words_layout(tokens, warps):
    """[tokens, 4] with each token where `product_layout` has it and its four words in one thread."""
    bits = [1 << i for i in range(4, tokens.bit_length() - 1)]
    registers = [[0, 1], [0, 2], [8, 0]] + [[bit, 0] for bit in bits if bit >= 16 * warps]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    of_warps = [[bit, 0] for bit in bits if bit < 16 * warps]
    of_warps += [[0, 0]] * (warps.bit_length() - 1 - len(of_warps))
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [tokens, 4])


@gluon.jit
def source_unit(unit, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Which 16 bytes of a run are kept at `unit` of it in shared memory."""
    CHUNKS: tl.constexpr = WIDTH // 16
    if TAIL == 0:
        found = unit ^ (unit // CHUNKS // max(1, 8 // CHUNKS) % min(8, CHUNKS))
    else:
        found = unit
    return gl.max_constancy(found, [1, 16])
