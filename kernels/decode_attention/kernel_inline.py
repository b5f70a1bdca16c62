"""Decode attention over token-major 8-bit pages whose rows carry their own FP32 scale (vLLM's inline layout).

The scheme is `kernel`'s; what differs is that a program takes two or four neighbouring KV heads, a warp each, and
batches the products over them. A row of codes and its 16-byte slot ends in the middle of a 32-byte sector, but rows of
an even number of heads of one token lie side by side and fill whole sectors, which no other program reads. Codes are
copied 8 bytes at a time, through L1, where the sector that holds a scale is then found.
"""

import triton
import triton.language as tl

from ..formats import INLINE_SLOT_BYTES
from ..schedule import await_last_launch, chunk_of_program, cut_batch, share_of_sequence
from ..unpack import INT8_BIAS
from .join import LOG2_E, join_pieces, piece_of
from .kernel import (
    MIN_TILES,
    NOT_SPECIALISED,
    OFFSET,
    SMALLEST_SCALE,
    add_logits,
    add_values,
    cap_logits,
    log2,
    reciprocal,
    store_columns,
)
from .pages import first_page, page_ahead, valid_slots

SLOT_BYTES = tl.constexpr(INLINE_SLOT_BYTES)


@triton.jit(do_not_specialize=[name for name in NOT_SPECIALISED if not name.startswith("stride_q")])
def attend_inline(
    q_ptr,
    k_ptr,
    v_ptr,  # uint16 pairs
    k_scale_ptr,  # the same memory as FP32
    v_scale_ptr,
    sink_ptr,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    arrived_ptr,
    scale_log2e,
    soft_cap,
    window,
    batch_size,
    num_chunks,
    stride_q_batch,
    stride_q_head,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    stride_scale_page,
    stride_scale_token,
    stride_scale_head,
    stride_table_row,
    stride_out_batch,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,  # KV heads a program
    G: tl.constexpr,
    GP: tl.constexpr,
    ROWS: tl.constexpr,  # power of two >= HEADS * G
    D: tl.constexpr,
    PAGE: tl.constexpr,  # >= BLOCK_N
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BATCH: tl.constexpr,
    JOIN_STAGES: tl.constexpr,
    UNPACK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attend to one chunk of tiles for HEADS KV heads; arguments as `kernel.attend`'s, but rows lie close in a page."""
    PARTS: tl.constexpr = KV_HEADS // HEADS
    if DEPENDENT:
        await_last_launch()
    chunk, part = chunk_of_program(num_chunks, PARTS, True)
    total, chunks, tile, end_tile, first_seq, last_seq, seq_start = cut_batch(
        tl.arange(0, BATCH), chunk, num_chunks, seq_lens_ptr, batch_size, window, BLOCK_N, WINDOW, MIN_TILES
    )
    if chunk >= chunks:
        return

    kv_heads = part * HEADS + tl.arange(0, HEADS)
    heads = tl.arange(0, GP)
    head_ok = (heads < G)[None, :]
    q_heads = kv_heads[:, None] * G + heads[None, :]
    dims = tl.max_contiguous(tl.arange(0, D), 8)
    pairs = tl.max_contiguous(tl.arange(0, D // 2), 4)
    slots = tl.arange(0, BLOCK_N)
    ROW: tl.constexpr = D + SLOT_BYTES
    rows = (tl.arange(0, HEADS)[:, None] + slots[None, :] * KV_HEADS) * ROW  # bytes from the first head's first token
    for seq in tl.range(first_seq, last_seq + 1, num_stages=1):
        seq_len = tl.load(seq_lens_ptr + seq)
        seq_first, seq_tiles, from_tile, to_tile, first_token = share_of_sequence(
            seq_len, seq_start, tile, end_tile, window, BLOCK_N, WINDOW
        )
        table = block_table_ptr + seq * stride_table_row.to(tl.int64)
        last_page = (tl.maximum(seq_len, 1) - 1) // PAGE

        begin = seq_first + from_tile
        end = seq_first + to_tile
        next_page = first_page(table, begin * BLOCK_N, slots, last_page, PAGE, BLOCK_N)
        q_at = q_ptr + seq * stride_q_batch.to(tl.int64) + q_heads[:, None, :] * stride_q_head
        q = tl.load(q_at + dims[None, :, None], mask=head_ok[:, None, :], other=0.0).to(tl.float16)
        peak = tl.full([HEADS, GP], float("-inf"), tl.float32)
        weight_sum = tl.zeros([HEADS, BLOCK_N, GP], tl.float32)
        even = tl.zeros([HEADS, D // 2, GP], tl.float32)
        odd = tl.zeros([HEADS, D // 2, GP], tl.float32)
        bias = tl.zeros([HEADS, GP], tl.float32)
        if FORMAT == 3:  # K comes with a constant added to every element
            bias += INT8_BIAS * tl.sum(q.to(tl.float32), 1)
        for t in tl.range(begin, end, num_stages=STAGES):
            token = t * BLOCK_N
            page = next_page
            next_page = page_ahead(table, token, slots, last_page, PAGE, BLOCK_N)
            valid = valid_slots(slots, token, seq_len, first_token, WINDOW)
            first_row = (token % PAGE * KV_HEADS + part * HEADS) * ROW
            k_byte = (page * stride_k_page).to(tl.int64) * 16 + first_row
            v_byte = (page * stride_v_page).to(tl.int64) * 16 + first_row
            k = tl.load(k_ptr + k_byte + (rows[:, :, None] + dims[None, None, :]))
            logits = tl.zeros([HEADS, BLOCK_N, GP], tl.float32) - bias[:, None, :]
            logits = add_logits(logits, k, q, FORMAT, UNPACK, False)
            k_scales = tl.load(k_scale_ptr + k_byte // 4 + (rows // 4 + D // 4))
            logits *= (k_scales * scale_log2e)[:, :, None]
            v_scales = tl.load(v_scale_ptr + v_byte // 4 + (rows // 4 + D // 4), mask=valid[None, :], other=0.0)
            v_scales = tl.maximum(v_scales, SMALLEST_SCALE)
            if SOFT_CAP:
                logits = cap_logits(logits, soft_cap)
            logits += log2(v_scales, UNPACK)[:, :, None]
            logits = tl.where(valid[None, :, None], logits, float("-inf"))

            new_peak = tl.maximum(peak, tl.max(logits, 1))
            decay = tl.exp2(peak - new_peak)[:, None, :]
            peak = new_peak
            weights = tl.exp2(logits - (new_peak - OFFSET)[:, None, :])
            weight_sum = weight_sum * decay + weights * reciprocal(v_scales, UNPACK)[:, :, None]
            v_at = v_ptr + v_byte // 2 + ((rows // 2)[:, None, :] + pairs[None, :, None])
            v = tl.load(v_at, mask=valid[None, None, :], other=0)
            even, odd = add_values(even, odd, v, weights, decay, FORMAT, UNPACK, False)

        total_weight = tl.sum(weight_sum, 1)
        lse = peak - OFFSET + tl.log2(total_weight)
        complete = (from_tile == 0) & (to_tile == seq_tiles)
        if SINKS:
            sink = tl.load(sink_ptr + q_heads, mask=head_ok, other=0.0) * LOG2_E
            if complete:
                total_weight += tl.exp2(sink - peak + OFFSET)
        inverse = (1.0 / total_weight)[:, None, :]
        even *= inverse
        odd *= inverse
        out_row = out_ptr + seq * stride_out_batch.to(tl.int64)
        if complete:
            store_columns((out_row + q_heads * D)[:, None, :], even, odd, head_ok[:, None, :], D, True)
        else:
            first_chunk, pieces, place = piece_of(chunk, seq_start, seq_tiles, total, chunks, BATCH)
            at = place * (KV_HEADS * G) + q_heads
            store_columns((partial_ptr + at * D)[:, None, :], even, odd, head_ok[:, None, :], D, True)
            tl.store(partial_lse_ptr + at, lse, mask=head_ok)
            join_pieces(
                sink_ptr,
                out_row,
                partial_ptr,
                partial_lse_ptr,
                arrived_ptr,
                chunk - first_chunk,
                first_chunk,
                pieces,
                num_chunks,
                part,
                PARTS,
                HEADS * G,
                ROWS,
                D,
                D,
                SINKS,
                JOIN_STAGES,
                0,
                UNPACK,
            )
        tile = seq_start + seq_tiles
        seq_start = tile
