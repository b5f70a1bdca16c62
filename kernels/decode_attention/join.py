"""Device functions: where a piece of a sequence's work is kept, and how the last program to arrive joins the pieces."""

import triton
import triton.language as tl

from ..schedule import chunk_of_tile

NARROW = tl.constexpr(8)
WIDE = tl.constexpr(16)
"""Pieces of a sequence that one program joins."""
LOG2_E = tl.constexpr(1.4426950408889634)
"""Sinks come in natural units, logits and sums are of base 2."""


@triton.jit
def radix_of(pieces, JOIN_STAGES: tl.constexpr):
    """Pieces that one program joins: what takes the fewest levels, unless few fit in flight and more take longer."""
    radix = pieces * 0 + NARROW
    if JOIN_STAGES >= 4:
        radix = tl.where((pieces > WIDE) & (pieces <= NARROW * NARROW), NARROW, WIDE)
    return radix


@triton.jit
def piece_slot(first_chunk, piece):
    """Place of a sequence's piece: a chunk has two, the second for the sequence that starts in it."""
    return (first_chunk + piece) * 2 + (piece == 0).to(tl.int32)


@triton.jit
def piece_of(chunk, seq_start, seq_tiles, total_tiles, chunks):
    """(first chunk that holds part of a sequence, how many do, place of the piece that `chunk` holds)."""
    first = chunk_of_tile(seq_start, total_tiles, chunks)
    pieces = chunk_of_tile(seq_start + seq_tiles - 1, total_tiles, chunks) - first + 1
    return first, pieces, piece_slot(first, chunk - first)


@triton.jit(noinline=True)
def join_pieces(
    sink_ptr,
    out_ptr,  # the sequence's output row
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
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SINKS: tl.constexpr,
    JOIN_STAGES: tl.constexpr,
):
    """Join the pieces of a sequence: of each `radix_of` neighbours the last to arrive adds them up, level by level.

    A group's result replaces its first piece; the top group writes the output. `arrived_ptr` counts, and is zero again
    when the kernel ends. Not inlined: its addresses would hold registers all through the main loop.
    """
    heads = tl.arange(0, GP)
    dims = tl.arange(0, DP)
    row_ok = heads < G
    cell_ok = row_ok[:, None] & (dims < D)[None, :]
    cell = (kv_head * G + heads)[:, None] * D + dims[None, :]
    active = pieces > 1
    radix = radix_of(pieces, JOIN_STAGES)
    width = pieces * 0 + 1
    counters = arrived_ptr + kv_head
    while active:
        first = piece // (width * radix) * (width * radix)
        count = tl.minimum(tl.cdiv(pieces - first, width), radix)
        counter = counters + piece_slot(first_chunk, first) * KV_HEADS
        tl.debug_barrier()
        active = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
        if active:
            tl.store(counter, 0)
            top = pieces <= width * radix
            peak = tl.full([GP], float("-inf"), tl.float32)
            weight = tl.zeros([GP], tl.float32)
            acc = tl.zeros([GP, DP], tl.float32)
            for member in tl.range(0, count, num_stages=JOIN_STAGES):
                one = piece_slot(first_chunk, first + member * width) * (KV_HEADS * G)
                one_lse = tl.load(
                    partial_lse_ptr + (one + kv_head * G + heads), mask=row_ok, other=0.0, cache_modifier=".cg"
                )
                values = tl.load(partial_ptr + (one * D + cell), mask=cell_ok, other=0.0, cache_modifier=".cg")
                new_peak = tl.maximum(peak, one_lse)
                keep = tl.exp2(peak - new_peak)
                share = tl.exp2(one_lse - new_peak)
                acc = acc * keep[:, None] + values * share[:, None]
                weight = weight * keep + share
                peak = new_peak
            if SINKS:
                sink = tl.load(sink_ptr + kv_head * G + heads, mask=row_ok, other=0.0) * LOG2_E
                if top:
                    weight += tl.exp2(sink - peak)
            acc = acc / weight[:, None]
            if top:
                tl.store(out_ptr + cell, acc.to(out_ptr.dtype.element_ty), mask=cell_ok)
                active = False
            else:
                tl.debug_barrier()
                slot = piece_slot(first_chunk, first) * (KV_HEADS * G)
                tl.store(partial_ptr + (slot * D + cell), acc, mask=cell_ok)
                tl.store(partial_lse_ptr + (slot + kv_head * G + heads), peak + tl.log2(weight), mask=row_ok)
        width *= radix
        counters += 2 * num_chunks * KV_HEADS
