"""Decode attention over 8-bit rows of 80 bytes, two tokens at a time.

Memory is read fastest in whole lines of 128 bytes and slowest where neighbouring rows share a 32-byte sector, as rows
of 80 bytes do. In a head-major page the rows of neighbouring tokens touch, so a pair of them is one row of 160 bytes,
five sectors, read as tiles of 128 and 32 bytes. The first tile holds the first token and 48 dims of the second: it
takes part in both tokens' products, with zeros in Q in place of the other's dims.

The scheme is `kernel`'s otherwise. The tokens of a pair have weights of their own but one running maximum. V's products
give the sums of the first and of the second tokens side by side, 160 numbers a head; they are stored as they are, and
whoever joins the pieces of a sequence, be it one, adds the halves.
"""

import triton
import triton.language as tl

from ..schedule import cut_batch, sequence_tiles
from ..unpack import INT8_BIAS
from .join import join_pieces, piece_of
from .kernel import (
    MIN_TILES,
    NOT_SPECIALISED,
    OFFSET,
    SMALLEST_SCALE,
    add_logits,
    add_values,
    log2,
    reciprocal,
    store_columns,
)


@triton.jit
def _scales_of_pairs(pairs):
    """FP32 scales of the first and of the second tokens, from both in an int64."""
    first = pairs.to(tl.uint32).to(tl.float32, bitcast=True)
    second = (pairs >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _scores(
    products, valid, scale, v_scale, soft_cap, SCALES: tl.constexpr, SOFT_CAP: tl.constexpr, UNPACK: tl.constexpr
):
    """Logits in units of log2, with the V scale of a token joined to them; -inf for tokens that are not `valid`."""
    logits = products * scale
    if SOFT_CAP:  # cap * tanh(x / cap)
        logits = soft_cap - 2.0 * soft_cap / (1.0 + tl.exp2(logits * (2.8853900817779268 / soft_cap)))
    if SCALES == 2:
        logits += log2(v_scale, UNPACK)[:, None]
    return tl.where(valid[:, None], logits, float("-inf"))


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attend_pairs(
    q_ptr,
    k_ptr,
    v_ptr,  # uint16 pairs
    k_scale_ptr,  # per token and head: int64, the scales of two tokens
    v_scale_ptr,
    sink_ptr,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,  # FP32 [num_chunks, 2, kv_heads, G, 2 * D]
    partial_lse_ptr,
    arrived_ptr,
    scale_log2e,
    soft_cap,
    window,
    batch_size,
    num_chunks,
    stride_q_batch,  # of Q, K and V in units of 16 bytes
    stride_q_head,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    stride_scale_page,  # of scales in pairs
    stride_scale_token,
    stride_scale_head,
    stride_table_row,
    stride_out_batch,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,  # 80
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,  # 0 none, 1 one number a KV head, 2 per token and head
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BATCH: tl.constexpr,
    JOIN_STAGES: tl.constexpr,
    UNPACK: tl.constexpr,
):
    """Attend to one chunk of tiles for one KV head; arguments as `kernel.attend`'s."""
    kv_head = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    total, chunks, tile, end_tile, first_seq, last_seq, seq_start = cut_batch(
        chunk, num_chunks, seq_lens_ptr, batch_size, window, BLOCK_N, WINDOW, BATCH, MIN_TILES
    )
    if chunk >= chunks:
        return

    FIRST: tl.constexpr = 128
    REST: tl.constexpr = 2 * D - FIRST
    PAIRS: tl.constexpr = BLOCK_N // 2
    heads = tl.arange(0, GP)
    dims = tl.arange(0, FIRST)
    tail = FIRST + tl.arange(0, REST)
    v_dims = tl.arange(0, FIRST // 2)
    v_tail = FIRST // 2 + tl.arange(0, REST // 2)
    first_slots = 2 * tl.arange(0, PAIRS)
    head_ok = heads < G
    logit_scale = scale_log2e
    v_scale = 1.0
    if SCALES == 1:
        logit_scale *= tl.load(k_scale_ptr + kv_head)
        v_scale = tl.load(v_scale_ptr + kv_head)
    k_offsets = (first_slots * stride_k_token * 16)[:, None]
    v_offsets = (first_slots * stride_v_token * 8)[None, :]

    for seq in tl.range(first_seq, last_seq + 1, num_stages=1):
        seq_len = tl.load(seq_lens_ptr + seq)
        seq_first, seq_tiles = sequence_tiles(seq_len, window, BLOCK_N, WINDOW)
        from_tile = tile - seq_start
        to_tile = tl.minimum(end_tile - seq_start, seq_tiles)
        first_token = 0
        if WINDOW:
            first_token = tl.maximum(seq_len - window, 0)
        table = block_table_ptr + seq * stride_table_row.to(tl.int64)
        last_page = (tl.maximum(seq_len, 1) - 1) // PAGE

        begin = seq_first + from_tile
        end = seq_first + to_tile
        if PAGE >= BLOCK_N:
            next_page = tl.load(table + begin * BLOCK_N // PAGE)
        else:
            next_page = tl.load(table + tl.minimum((begin * BLOCK_N + first_slots) // PAGE, last_page))
        q_units = seq * stride_q_batch.to(tl.int64) + (kv_head * G + heads) * stride_q_head
        q_rows = (q_ptr + q_units * 8)[None, :]
        q_ok = head_ok[None, :]
        q1 = tl.load(q_rows + dims[:, None], mask=q_ok & (dims < D)[:, None], other=0.0).to(tl.float16)
        q2 = tl.load(q_rows + (dims - D)[:, None], mask=q_ok & (dims >= D)[:, None], other=0.0).to(tl.float16)
        q2_tail = tl.load(q_rows + (tail - D)[:, None], mask=q_ok, other=0.0).to(tl.float16)
        peak = tl.full([GP], float("-inf"), tl.float32)
        weight_sum = tl.zeros([PAIRS, GP], tl.float32)
        even1 = tl.zeros([FIRST // 2, GP], tl.float32)
        odd1 = tl.zeros([FIRST // 2, GP], tl.float32)
        even2 = tl.zeros([FIRST // 2, GP], tl.float32)
        odd2 = tl.zeros([FIRST // 2, GP], tl.float32)
        even_tail = tl.zeros([REST // 2, GP], tl.float32)
        odd_tail = tl.zeros([REST // 2, GP], tl.float32)

        bias = tl.zeros([GP], tl.float32)
        if FORMAT == 3:  # K comes with a constant added to every element
            bias += INT8_BIAS * tl.sum(q1.to(tl.float32), 0)
        for t in tl.range(begin, end, num_stages=STAGES):
            token = t * BLOCK_N
            page = next_page
            if PAGE >= BLOCK_N:  # the page of the next tile is fetched one tile ahead
                next_page = tl.load(table + tl.minimum((token + BLOCK_N) // PAGE, last_page))
                in_page = token % PAGE
            else:
                next_page = tl.load(table + tl.minimum((token + BLOCK_N + first_slots) // PAGE, last_page))
                in_page = first_slots % PAGE
            end_slot = seq_len - token
            valid1 = first_slots < end_slot
            valid2 = first_slots + 1 < end_slot
            if WINDOW:
                first_slot = first_token - token
                valid1 = valid1 & (first_slots >= first_slot)
                valid2 = valid2 & (first_slots + 1 >= first_slot)
            # a token that is masked may hold NaN, which the zeros of Q would not silence
            k_ok = tl.where((dims < D)[None, :], valid1[:, None], valid2[:, None])
            v_ok = tl.where((v_dims < D // 2)[:, None], valid1[None, :], valid2[None, :])

            k_row = page * stride_k_page + in_page * stride_k_token + kv_head * stride_k_head
            v_row = page * stride_v_page + in_page * stride_v_token + kv_head * stride_v_head
            k_unit = k_row.to(tl.int64) * 16
            v_unit = v_row.to(tl.int64) * 8
            if PAGE >= BLOCK_N:
                k_at = k_ptr + k_unit + k_offsets
                v_at = v_ptr + v_unit + v_offsets
            else:
                k_at = (k_ptr + k_unit)[:, None]
                v_at = (v_ptr + v_unit)[None, :]
            logits1 = tl.zeros([PAIRS, GP], tl.float32) - bias[None, :]
            logits2 = logits1
            k = tl.load(k_at + dims[None, :], mask=k_ok, other=0)
            logits1 = add_logits(logits1, k, q1, FORMAT, UNPACK, False)
            logits2 = add_logits(logits2, k, q2, FORMAT, UNPACK, False)
            k = tl.load(k_at + tail[None, :], mask=valid2[:, None], other=0)
            logits2 = add_logits(logits2, k, q2_tail, FORMAT, UNPACK, False)
            scale1, scale2 = logit_scale, logit_scale
            v_scale1, v_scale2 = 1.0, 1.0
            if SCALES == 2:
                scale_at = page * stride_scale_page + in_page // 2 * stride_scale_token + kv_head * stride_scale_head
                if PAGE >= BLOCK_N:
                    scale_at += first_slots // 2 * stride_scale_token
                k_scale1, k_scale2 = _scales_of_pairs(tl.load(k_scale_ptr + scale_at))
                v_scale1, v_scale2 = _scales_of_pairs(tl.load(v_scale_ptr + scale_at))
                scale1, scale2 = (k_scale1 * logit_scale)[:, None], (k_scale2 * logit_scale)[:, None]
                v_scale1 = tl.maximum(tl.where(valid1, v_scale1, 0.0), SMALLEST_SCALE)
                v_scale2 = tl.maximum(tl.where(valid2, v_scale2, 0.0), SMALLEST_SCALE)
            logits1 = _scores(logits1, valid1, scale1, v_scale1, soft_cap, SCALES, SOFT_CAP, UNPACK)
            logits2 = _scores(logits2, valid2, scale2, v_scale2, soft_cap, SCALES, SOFT_CAP, UNPACK)

            new_peak = tl.maximum(peak, tl.max(tl.maximum(logits1, logits2), 0))
            decay = tl.exp2(peak - new_peak)[None, :]
            peak = new_peak
            weights1 = tl.exp2(logits1 - (new_peak - OFFSET)[None, :])
            weights2 = tl.exp2(logits2 - (new_peak - OFFSET)[None, :])
            weight_sum *= decay
            if SCALES == 2:
                weight_sum += weights1 * reciprocal(v_scale1, UNPACK)[:, None]
                weight_sum += weights2 * reciprocal(v_scale2, UNPACK)[:, None]
            else:
                weight_sum += weights1 + weights2

            v = tl.load(v_at + v_dims[:, None], mask=v_ok, other=0)
            even1, odd1 = add_values(even1, odd1, v, weights1, decay, FORMAT, UNPACK, False)
            even2, odd2 = add_values(even2, odd2, v, weights2, decay, FORMAT, UNPACK, False)
            v = tl.load(v_at + v_tail[:, None], mask=valid2[None, :], other=0)
            even_tail, odd_tail = add_values(even_tail, odd_tail, v, weights2, decay, FORMAT, UNPACK, False)

        total_weight = tl.sum(weight_sum, 0)
        lse = peak - OFFSET + tl.log2(total_weight)
        inverse = tl.where(total_weight > 0.0, v_scale / total_weight, 0.0)[None, :]
        of_first = (v_dims < D // 2)[:, None]
        even = tl.where(of_first, even1, even2) * inverse
        odd = tl.where(of_first, odd1, odd2) * inverse
        first_chunk, pieces, place = piece_of(chunk, seq_start, seq_tiles, total, chunks)
        slot = place * (KV_HEADS * G) + kv_head * G + heads
        row = (partial_ptr + slot * (2 * D))[None, :]
        store_columns(row, even, odd, head_ok[None, :], FIRST, True)
        store_columns(row + FIRST, even_tail * inverse, odd_tail * inverse, head_ok[None, :], REST, True)
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
            2,
        )
        tl.debug_barrier()  # the next sequence of this chunk may use the same place
        tile = seq_start + seq_tiles
        seq_start = tile
