"""Decode attention over nvfp4 caches: e2m1 codes, an e4m3 scale for 16 of them, one FP32 for all.

The scheme is `kernel`'s; what differs is the row. A byte holds dims 2i (low nibble) and 2i + 1; K and V are loaded as
16-bit words of four dims, each of which gives four tiles of every fourth dim. Codes become float16 and take their
block's scale there: e2m1 times e4m3 has at most 6 significant bits and stays exact.
"""

import triton
import triton.language as tl

from ..schedule import await_last_launch, chunk_of_program, cut_batch, share_of_sequence
from ..unpack import E2M1_UNIT, unpack_e2m1, unpack_elements
from .join import LOG2_E, join_pieces, piece_of
from .kernel import MIN_TILES, NOT_SPECIALISED, OFFSET, cap_logits
from .pages import first_page, page_ahead, rows_at, slot_in_page, valid_slots


@triton.jit
def _word_scales(scales, WORDS: tl.constexpr, UNPACK: tl.constexpr):
    """Scales of the words as float16, `[WORDS, tokens]`, from the codes of the blocks, `[blocks, tokens]`."""
    scales = unpack_elements(scales, 1, UNPACK)
    blocks: tl.constexpr = scales.shape[0]
    each = tl.broadcast_to(scales[:, None, :], [blocks, WORDS // blocks, scales.shape[1]])
    return tl.reshape(each, [WORDS, scales.shape[1]])


@triton.jit
def _store_words(ptr, acc0, acc1, acc2, acc3, columns_ok, ROWS: tl.constexpr):
    """Store four `[ROWS, heads]` accumulators of dims 4i to 4i + 3 at ptr[heads]."""
    at = ptr[None, :] + 4 * tl.arange(0, ROWS)[:, None]
    tl.store(at, acc0.to(ptr.dtype.element_ty), mask=columns_ok[None, :])
    tl.store(at + 1, acc1.to(ptr.dtype.element_ty), mask=columns_ok[None, :])
    tl.store(at + 2, acc2.to(ptr.dtype.element_ty), mask=columns_ok[None, :])
    tl.store(at + 3, acc3.to(ptr.dtype.element_ty), mask=columns_ok[None, :])


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attend_nvfp4(
    q_ptr,
    k_ptr,  # uint16
    v_ptr,
    k_scale_ptr,  # e4m3 codes as uint8
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
    stride_scale_page,  # of scales in rows, so that the compiler sees how they are aligned
    stride_scale_token,
    stride_scale_head,
    stride_table_row,
    stride_out_batch,
    global_ptr,  # FP32 [2]: of K, of V
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BATCH: tl.constexpr,
    JOIN_STAGES: tl.constexpr,
    UNPACK: tl.constexpr,
    HEADS_TOGETHER: tl.constexpr,
    DEPENDENT: tl.constexpr,
    JOIN_TOGETHER: tl.constexpr,
):
    """Attend to one chunk of tiles for one KV head; arguments as `kernel.attend`'s."""
    if DEPENDENT:
        await_last_launch()
    chunk, kv_head = chunk_of_program(num_chunks, KV_HEADS, HEADS_TOGETHER)
    total, chunks, tile, end_tile, first_seq, last_seq, seq_start = cut_batch(
        tl.arange(0, BATCH), chunk, num_chunks, seq_lens_ptr, batch_size, window, BLOCK_N, WINDOW, MIN_TILES
    )
    if chunk >= chunks:
        return

    WORDS: tl.constexpr = D // 4
    BLOCKS: tl.constexpr = D // 16
    heads = tl.arange(0, GP)
    words = tl.arange(0, WORDS)
    blocks = tl.arange(0, BLOCKS)
    slots = tl.arange(0, BLOCK_N)
    head_ok = heads < G
    logit_scale = scale_log2e / E2M1_UNIT * tl.load(global_ptr)
    v_scale = tl.load(global_ptr + 1) / E2M1_UNIT
    k_offsets = (slots * stride_k_token * 8)[:, None]
    v_offsets = (slots * stride_v_token * 8)[None, :]
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
        q_at = q_ptr + seq * stride_q_batch.to(tl.int64) + (kv_head * G + heads)[None, :] * stride_q_head
        q_at += 4 * words[:, None]
        q0 = tl.load(q_at, mask=head_ok[None, :], other=0.0).to(tl.float16)
        q1 = tl.load(q_at + 1, mask=head_ok[None, :], other=0.0).to(tl.float16)
        q2 = tl.load(q_at + 2, mask=head_ok[None, :], other=0.0).to(tl.float16)
        q3 = tl.load(q_at + 3, mask=head_ok[None, :], other=0.0).to(tl.float16)
        peak = tl.full([GP], float("-inf"), tl.float32)
        weight_sum = tl.zeros([BLOCK_N, GP], tl.float32)
        acc0 = tl.zeros([WORDS, GP], tl.float32)
        acc1 = tl.zeros([WORDS, GP], tl.float32)
        acc2 = tl.zeros([WORDS, GP], tl.float32)
        acc3 = tl.zeros([WORDS, GP], tl.float32)
        for t in tl.range(begin, end, num_stages=STAGES):
            token = t * BLOCK_N
            page = next_page
            next_page = page_ahead(table, token, slots, last_page, PAGE, BLOCK_N)
            in_page = slot_in_page(token, slots, PAGE, BLOCK_N)
            valid = valid_slots(slots, token, seq_len, first_token, WINDOW)
            k_row = page * stride_k_page + in_page * stride_k_token + kv_head * stride_k_head
            v_row = page * stride_v_page + in_page * stride_v_token + kv_head * stride_v_head
            scale_row = page * stride_scale_page + in_page * stride_scale_token + kv_head * stride_scale_head
            if PAGE >= BLOCK_N:
                scale_row += slots * stride_scale_token
            k_at = rows_at(k_ptr, k_row, k_offsets, 8, 1, PAGE, BLOCK_N)
            v_at = rows_at(v_ptr, v_row, v_offsets, 8, 0, PAGE, BLOCK_N)
            scale_at = (scale_row * BLOCKS)[None, :] + blocks[:, None]
            k0, k1, k2, k3 = unpack_e2m1(tl.load(k_at + words[None, :]), UNPACK)
            k_scales = tl.trans(_word_scales(tl.load(k_scale_ptr + scale_at), WORDS, UNPACK))
            logits = tl.zeros([BLOCK_N, GP], tl.float32)
            logits = tl.dot(k0 * k_scales, q0, logits)
            logits = tl.dot(k1 * k_scales, q1, logits)
            logits = tl.dot(k2 * k_scales, q2, logits)
            logits = tl.dot(k3 * k_scales, q3, logits)
            logits *= logit_scale
            if SOFT_CAP:
                logits = cap_logits(logits, soft_cap)
            logits = tl.where(valid[:, None], logits, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 0))
            decay = tl.exp2(peak - new_peak)
            peak = new_peak
            weights = tl.exp2(logits - (new_peak - OFFSET)[None, :])
            weight_sum = weight_sum * decay[None, :] + weights
            w = weights.to(tl.float16)
            v0, v1, v2, v3 = unpack_e2m1(tl.load(v_at + words[:, None]), UNPACK)
            v_scales = tl.load(v_scale_ptr + scale_at, mask=valid[None, :], other=0)
            v_scales = _word_scales(v_scales, WORDS, UNPACK)
            acc0 = tl.dot(v0 * v_scales, w, acc0 * decay[None, :])
            acc1 = tl.dot(v1 * v_scales, w, acc1 * decay[None, :])
            acc2 = tl.dot(v2 * v_scales, w, acc2 * decay[None, :])
            acc3 = tl.dot(v3 * v_scales, w, acc3 * decay[None, :])

        total_weight = tl.sum(weight_sum, 0)
        lse = peak - OFFSET + tl.log2(total_weight)
        complete = (from_tile == 0) & (to_tile == seq_tiles)
        if SINKS:
            sink = tl.load(sink_ptr + kv_head * G + heads, mask=head_ok, other=0.0) * LOG2_E
            if complete:
                total_weight += tl.exp2(sink - peak + OFFSET)
        inverse = (v_scale / total_weight)[None, :]
        acc0 *= inverse
        acc1 *= inverse
        acc2 *= inverse
        acc3 *= inverse
        if complete:
            out_row = out_ptr + seq * stride_out_batch.to(tl.int64) + (kv_head * G + heads) * D
            _store_words(out_row, acc0, acc1, acc2, acc3, head_ok, WORDS)
        else:
            first_chunk, pieces, place = piece_of(chunk, seq_start, seq_tiles, total, chunks, BATCH)
            slot = place * (KV_HEADS * G) + kv_head * G + heads
            _store_words(partial_ptr + slot * D, acc0, acc1, acc2, acc3, head_ok, WORDS)
            tl.store(partial_lse_ptr + slot, lse, mask=head_ok)
            join_pieces(
                sink_ptr,
                out_ptr + seq * stride_out_batch.to(tl.int64),
                partial_ptr,
                partial_lse_ptr,
                arrived_ptr,
                chunk - first_chunk,
                first_chunk,
                pieces,
                num_chunks,
                kv_head,
                KV_HEADS,
                G,
                GP,
                D,
                DP,
                SINKS,
                JOIN_STAGES,
                JOIN_TOGETHER,
                UNPACK,
            )
        tile = seq_start + seq_tiles
        seq_start = tile
