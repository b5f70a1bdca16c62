"""Device functions: copy a tile of the cache to shared memory, in whole runs, and read it from there (Gluon)."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .layouts import copy_layout, product_layout, rows_layout, run_layout, source_unit, words_layout


@gluon.jit
def pages_of(table, token, last_page, layout: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page of the tile that begins at `token`; where pages are smaller, those of its runs, [BLOCK_N / PAGE]."""
    if PAGE >= BLOCK_N:
        page = gl.load(table + gl.minimum(token // PAGE, last_page))
    else:
        runs = gl.arange(0, BLOCK_N // PAGE, gl.SliceLayout(1, layout))
        page = gl.load(table + gl.minimum(token // PAGE + runs, last_page))
    return page


@gluon.jit
def copy_part(
    memory,
    tile,
    ptr,
    row,
    first,
    end,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    RUNS: tl.constexpr,
    RUN_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Begin to copy bytes START to START + SIZE of a tile's runs; zeros for tokens before `first` and from `end` on.

    `tile` and `row` are the tile's place in shared memory and a run's in the cache, in units of 16 bytes: `row` is a
    scalar, or [RUNS] where a tile lies in several pages.
    """
    UNITS: tl.constexpr = (WIDTH + TAIL) // 16  # of a token
    layout: tl.constexpr = copy_layout(SIZE, 16, WARPS)
    at = gl.arange(0, SIZE, gl.SliceLayout(0, layout))[None, :]
    unit = source_unit((START + at) // 16, WIDTH, TAIL)
    source = gl.max_contiguous(gl.multiple_of(unit * 16 + at % 16, [1, 16]), [1, 16])
    first_byte = row.to(gl.int64) * 16
    if RUNS > 1:
        run_token = gl.arange(0, RUNS, gl.SliceLayout(1, layout)) * RUN_TOKENS
        first = (first - run_token)[:, None]
        end = (end - run_token)[:, None]
        first_byte = first_byte[:, None]
    wanted = unit < end * UNITS
    if WINDOW:
        wanted = wanted & (unit >= first * UNITS)
    to = memory.index(tile + START // 16)._reinterpret(gl.uint8, [RUNS, SIZE], run_layout(RUNS, SIZE))
    async_copy.async_copy_global_to_shared(to, ptr + (first_byte + source), mask=wanted)


@gluon.jit
def copy_scales(memory, ptr, row, first, end, RUNS: tl.constexpr, RUN_TOKENS: tl.constexpr, WARPS: tl.constexpr):
    """Begin to copy the FP32 scales of a tile's tokens, which lie together in each page."""
    layout: tl.constexpr = copy_layout(RUN_TOKENS, 1, WARPS)
    at = gl.arange(0, RUN_TOKENS, gl.SliceLayout(0, layout))[None, :]
    token = at
    if RUNS > 1:
        token = at + (gl.arange(0, RUNS, gl.SliceLayout(1, layout)) * RUN_TOKENS)[:, None]
        row = row[:, None]
    to = memory._reinterpret(gl.float32, [RUNS, RUN_TOKENS], run_layout(RUNS, RUN_TOKENS))
    async_copy.async_copy_global_to_shared(to, ptr + (row + at), mask=(token >= first) & (token < end))


@gluon.jit
def begin_tile(
    memories,  # shared memory for K and V, and with SCALES == 2 for their scales
    slot,  # which of its tiles
    pointers,  # to K and V, and their scales
    pages,  # of K and V, and of the scales
    token,
    end,
    first_token,
    kv_head,
    strides,  # page, token and head of K, of V, then of the scales
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    SCALES: tl.constexpr,
    WINDOW: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Begin to copy the tile that starts at `token`, in one group; only tokens before `end` are read."""
    RUN_TOKENS: tl.constexpr = min(PAGE, BLOCK_N)
    RUNS: tl.constexpr = BLOCK_N // RUN_TOKENS
    tile = slot * (BLOCK_N * (WIDTH + TAIL) // 16)
    in_page = token % PAGE  # zero where a tile lies in several pages
    first = first_token - token
    last = end - token
    k_row = pages[0] * strides[0] + (in_page * strides[1] + kv_head * strides[2])
    v_row = pages[0] * strides[3] + (in_page * strides[4] + kv_head * strides[5])
    for n in gl.static_range(2):
        copy_part(
            *(memories[n], tile, pointers[n], k_row if n == 0 else v_row, first, last, 0, RUN_TOKENS * WIDTH),
            *(RUNS, RUN_TOKENS, WIDTH, TAIL, WINDOW, WARPS),
        )
    if TAIL > 0:
        for n in gl.static_range(2):
            copy_part(
                *(memories[n], tile, pointers[n], k_row if n == 0 else v_row, first, last),
                *(RUN_TOKENS * WIDTH, RUN_TOKENS * TAIL, RUNS, RUN_TOKENS, WIDTH, TAIL, WINDOW, WARPS),
            )
    if SCALES == 2:
        row = pages[1] * strides[6] + (in_page + kv_head * strides[8])
        for n in gl.static_range(2):
            copy_scales(memories[2 + n].index(slot), pointers[2 + n], row, first, last, RUNS, RUN_TOKENS, WARPS)
    async_copy.commit_group()


@gluon.jit
def load_rows(
    memory, layout: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr
):
    """[TOKENS, WIDTH] elements of a tile's rows."""
    rows: tl.constexpr = rows_layout(TOKENS, WIDTH, TAIL, DTYPE.primitive_bitwidth // 8)
    return memory._reinterpret(DTYPE, [TOKENS, WIDTH], rows).load(layout)


@gluon.jit
def load_columns(
    memory, layout: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr
):
    """The same transposed, [WIDTH, TOKENS]."""
    rows: tl.constexpr = rows_layout(TOKENS, WIDTH, TAIL, DTYPE.primitive_bitwidth // 8)
    return memory._reinterpret(DTYPE, [TOKENS, WIDTH], rows).permute([1, 0]).load(layout)


@gluon.jit
def load_slots(memory, TOKENS: tl.constexpr, ROW: tl.constexpr, WARPS: tl.constexpr):
    """[TOKENS] scales, the first words of slots of 16 bytes that lie ROW bytes apart."""
    layout: tl.constexpr = words_layout(TOKENS, WARPS)
    x = load_rows(memory, layout, gl.int32, TOKENS, 4, ROW // 4 - 4)
    word = gl.arange(0, 4, gl.SliceLayout(0, layout))[None, :]
    scales = gl.sum(gl.where(word == 0, x, 0), 1).to(gl.float32, bitcast=True)
    return gl.convert_layout(scales, gl.SliceLayout(1, product_layout(WARPS)), assert_trivial=True)
