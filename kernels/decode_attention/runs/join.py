"""Device function: how the last program of `attend_runs` to arrive joins the pieces of a sequence (see `..join`)."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..join import LOG2_E, NARROW, piece_slot, radix_of

WIDE_STAGES = tl.constexpr(4)
"""For `radix_of`: eight pieces are read at once, so sixteen take two steps and not two levels."""


@gluon.jit(noinline=True)
def join_runs(
    sink_ptr,  # of the KV head's first query head
    out_ptr,  # their first output
    partial_ptr,
    partial_lse_ptr,
    arrived_ptr,
    piece,
    first_chunk,
    pieces,
    num_chunks,
    kv_head,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SINKS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """As `join_pieces`; a warp joins whole query heads, eight of their pieces at once."""
    ROWS: tl.constexpr = 4 if WARPS > 1 else 2  # joined at a time
    DP: tl.constexpr = 64 if D <= 64 else (128 if D <= 128 else 256)
    layout: tl.constexpr = gl.BlockedLayout([1, 1, DP // 32], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    per_row: tl.constexpr = gl.SliceLayout(2, layout)  # [pieces, rows]
    per_cell: tl.constexpr = gl.SliceLayout(0, layout)  # [rows, dims]
    members = gl.arange(0, NARROW, gl.SliceLayout(1, per_row))
    rows = gl.arange(0, ROWS, gl.SliceLayout(0, per_row))
    dims = gl.arange(0, DP, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    cell_rows = gl.arange(0, ROWS, gl.SliceLayout(1, per_cell))[:, None]
    cell_dims = gl.arange(0, DP, gl.SliceLayout(0, per_cell))[None, :]
    radix = radix_of(pieces, WIDE_STAGES)
    active = pieces > 1
    width = pieces * 0 + 1
    counters = arrived_ptr + kv_head
    while active:
        first = piece // (width * radix) * (width * radix)
        count = gl.minimum(tl.cdiv(pieces - first, width), radix)
        place = piece_slot(first_chunk, first) * KV_HEADS
        counter = counters + place
        tl.debug_barrier()
        active = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
        if active:
            gl.store(counter, 0)
            top = pieces <= width * radix
            for start in range(0, G, ROWS):
                row = start + rows
                row_ok = row < G
                peak = gl.where(row_ok, float("-inf"), 0.0)
                weight = gl.where(row_ok, 0.0, 1.0)
                acc = gl.zeros([ROWS, DP], gl.float32, per_cell)
                for read in range(0, count, NARROW):
                    slots = piece_slot(first_chunk, first + (read + members) * width) * KV_HEADS + kv_head
                    at = slots[:, None] * G + row[None, :]
                    ok = (read + members < count)[:, None] & row_ok[None, :]
                    lse = gl.load(partial_lse_ptr + at, mask=ok, other=float("-inf"), cache_modifier=".cg")
                    cells = partial_ptr + (at * D)[:, :, None] + dims
                    values = gl.load(cells, mask=ok[:, :, None] & (dims < D), other=0.0, cache_modifier=".cg")
                    new_peak = gl.maximum(peak, gl.max(lse, 0))
                    keep = gl.exp2(peak - new_peak)
                    share = gl.exp2(lse - new_peak[None, :])
                    weight = weight * keep + gl.sum(share, 0)
                    acc = acc * of_cells(keep, per_cell) + gl.sum(values * share[:, :, None], 0)
                    peak = new_peak
                if SINKS:
                    sink = gl.load(sink_ptr + row, mask=row_ok, other=0.0) * LOG2_E
                    if top:
                        weight += gl.exp2(sink - peak)
                acc = acc / of_cells(weight, per_cell)
                cell = (start + cell_rows) * D + cell_dims
                cell_ok = (start + cell_rows < G) & (cell_dims < D)
                if top:
                    gl.store(out_ptr + cell, acc.to(out_ptr.dtype.element_ty), mask=cell_ok)
                else:  # in place of what this warp alone has read
                    first_row = (place + kv_head) * G
                    gl.store(partial_ptr + (first_row * D + cell), acc, mask=cell_ok)
                    gl.store(partial_lse_ptr + (first_row + row), peak + tl.log2(weight), mask=row_ok)
            if top:
                active = False
        width *= radix
        counters += 2 * num_chunks * KV_HEADS


@gluon.jit
def of_cells(x, layout: tl.constexpr):
    """A number of each row, [rows, 1], where its cells are."""
    return gl.convert_layout(x, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]
