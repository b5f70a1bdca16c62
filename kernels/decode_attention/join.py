"""Device functions: where a piece of a sequence's work is kept, and how the pieces are joined.

Of a batch, by the last program to arrive of a few neighbours, level by level: nobody waits, so that a program can go on
to its next sequence. Of a batch of one, where none has a next, by all programs together: each waits for all and adds up
a slice of the output, which takes one step instead of two or three.
"""

import triton
import triton.language as tl

from ..schedule import chunk_of_tile

NARROW = tl.constexpr(8)
WIDE = tl.constexpr(16)
"""Pieces of a sequence that one program joins."""
AT_ONCE = tl.constexpr(64)
"""Pieces that a program reads at once of its slice."""
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
def piece_of(chunk, seq_start, seq_tiles, total_tiles, chunks, BATCH: tl.constexpr):
    """(first chunk that holds part of a sequence, how many do, place of the piece that `chunk` holds)."""
    if BATCH == 1:
        first = seq_start
        pieces = chunks
    else:
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
    TOGETHER: tl.constexpr,  # 0, or for programs that all run at once: their warps
    UNPACK: tl.constexpr,
):
    """Join the pieces of a sequence: all together, or of each `radix_of` neighbours the last to arrive, level by level.

    A group's result replaces its first piece; the top group writes the output. `arrived_ptr` counts, and is zero again
    when the kernel ends. Not inlined: its addresses would hold registers all through the main loop.
    """
    if TOGETHER > 0:
        _join_together(
            sink_ptr,
            out_ptr,
            partial_ptr,
            partial_lse_ptr,
            arrived_ptr + 8 * kv_head,  # each in a sector of its own
            piece,
            first_chunk,
            pieces,
            kv_head,
            KV_HEADS,
            G,
            D,
            SINKS,
            TOGETHER,
            UNPACK,
        )
    else:
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


@triton.jit
def _arrivals(counter, UNPACK: tl.constexpr):
    """What `counter` counts; everything that those it counts had written can be read then."""
    if UNPACK == 0:
        count = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    else:
        count = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter], tl.int32, is_pure=False, pack=1
        )
    return count


@triton.jit
def _join_together(
    sink_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    counter,
    piece,
    first_chunk,
    pieces,
    kv_head,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SINKS: tl.constexpr,
    WARPS: tl.constexpr,
    UNPACK: tl.constexpr,
):
    """Every program waits until all pieces are there, then adds up its slices of the output."""
    WHOLE: tl.constexpr = D & -D
    CELLS: tl.constexpr = 8 * WARPS if 8 * WARPS < WHOLE else WHOLE  # of a slice, which lies in one query head
    members = tl.arange(0, AT_ONCE)
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while _arrivals(counter, UNPACK) < pieces:
        pass
    for start in range(piece * CELLS, G * D, pieces * CELLS):
        head = kv_head * G + start // D
        dims = start % D + tl.arange(0, CELLS)
        peak = float("-inf")
        weight = 0.0
        acc = tl.zeros([CELLS], tl.float32)
        for read in range(0, pieces, AT_ONCE):
            ok = read + members < pieces
            row = piece_slot(first_chunk, read + members) * (KV_HEADS * G) + head
            lse = tl.load(partial_lse_ptr + row, mask=ok, other=float("-inf"), cache_modifier=".cg")
            cells = partial_ptr + (row[:, None] * D + dims[None, :])
            values = tl.load(cells, mask=ok[:, None], other=0.0, cache_modifier=".cg")
            new_peak = tl.maximum(peak, tl.max(lse, 0))
            keep = tl.exp2(peak - new_peak)
            share = tl.exp2(lse - new_peak)
            weight = weight * keep + tl.sum(share, 0)
            acc = acc * keep + tl.sum(values * share[:, None], 0)
            peak = new_peak
        if SINKS:
            weight += tl.exp2(tl.load(sink_ptr + head) * LOG2_E - peak)
        tl.store(out_ptr + (head * D + dims), (acc / weight).to(out_ptr.dtype.element_ty))
    if tl.atomic_add(counter, 1, sem="relaxed", scope="gpu") == 2 * pieces - 1:
        tl.store(counter, 0)
