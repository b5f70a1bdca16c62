"""Decode attention over int4 caches: an FP16 scale for each 32 dims of a row, applied to logits and weights.

The scheme is `kernel`'s; what differs is the row. Its nibbles are planes (`formats.int4_plane_dims`): nibble j of
16-bit word w is dim 32 j + w of 128, so that one mask of words gives dims that share a scale. A block's scale then
multiplies the block's part of a logit, and a softmax weight once for each block, instead of every element: four
multiplications a token and query head in place of one for every two dims.

A nibble n, masked where it stands, is the float16 number n * 2**-24 or n * 2**-20 (a subnormal, which the matrix
instruction takes as any other), so unpacking is one instruction for two elements. What codes are too large by, 8, is
taken off the sums: from each block's part of a logit 8 * sum(q), from the values 8 * (sum of the tile's weights), by a
product with a constant, so that the accumulator never holds the large sum.
"""

import triton
import triton.language as tl

from ..schedule import await_last_launch, chunk_of_program, cut_batch, share_of_sequence
from ..unpack import unpack_planes, unpack_scales
from .join import LOG2_E, join_pieces, piece_of
from .kernel import MIN_TILES, NOT_SPECIALISED, cap_logits
from .pages import first_page, page_ahead, rows_at, slot_in_page, valid_slots

OFFSET = tl.constexpr(7.0)
"""log2 of the largest softmax weight: times an FP16 scale up to 511 (values up to 3,577) it stays inside float16."""
LOW_UNIT = tl.constexpr(2.0**-24)
HIGH_UNIT = tl.constexpr(2.0**-20)


@triton.jit
def _plane_of_q(q_rows, dims, head_ok, UNIT: tl.constexpr):
    """Float16 `[dims, heads]` of the query for nibbles of `UNIT`, and minus what code 8 in each dim adds to a logit."""
    q = tl.load(q_rows + dims[:, None], mask=head_ok[None, :], other=0.0)
    q = (q.to(tl.float32) * (LOW_UNIT / UNIT)).to(tl.float16)
    return q, tl.sum(q.to(tl.float32), 0) * (-8.0 * UNIT)


@triton.jit
def _query(q_rows, PLANE: tl.constexpr, head_ok):
    """The four planes of a section of the query, each with its start of a logit."""
    dims = tl.arange(0, PLANE)
    q0, start0 = _plane_of_q(q_rows, dims, head_ok, LOW_UNIT)
    q1, start1 = _plane_of_q(q_rows, dims + PLANE, head_ok, HIGH_UNIT)
    q2, start2 = _plane_of_q(q_rows, dims + 2 * PLANE, head_ok, LOW_UNIT)
    q3, start3 = _plane_of_q(q_rows, dims + 3 * PLANE, head_ok, HIGH_UNIT)
    return q0, q1, q2, q3, start0, start1, start2, start3


@triton.jit
def _part(k, q, start, scale):
    """One block's part of the logits, in units of `LOW_UNIT`, for K `[tokens, dims]`."""
    return tl.dot(k, q, tl.broadcast_to(start[None, :], [k.shape[0], q.shape[1]])) * scale[:, None]


@triton.jit
def _logits(k, scales, q0, q1, q2, q3, start0, start1, start2, start3, UNPACK: tl.constexpr):
    """A section's part of the logits."""
    k0, k1, k2, k3 = unpack_planes(k, UNPACK)
    s0, s1, s2, s3 = unpack_scales(scales, True, UNPACK)
    logits = _part(k0, q0, start0, s0)
    logits += _part(k1, q1, start1, s1)
    logits += _part(k2, q2, start2, s2)
    return logits + _part(k3, q3, start3, s3)


@triton.jit
def _accumulate(acc, v, weights, scale, decay, UNIT: tl.constexpr):
    """Accumulator * decay + (V - 8)^T (weights * scale) for V `[dims, tokens]`, all in units of `UNIT`."""
    w = weights * scale[:, None]
    minus8 = tl.full(v.shape, -8.0 * UNIT, tl.float16)
    return tl.dot(v, w, tl.dot(minus8, w, acc * decay[None, :]))


@triton.jit
def _values(acc0, acc1, acc2, acc3, v, scales, weights, decay, UNPACK: tl.constexpr):
    """A section's accumulators with the tile's values added."""
    v0, v1, v2, v3 = unpack_planes(v, UNPACK)
    s0, s1, s2, s3 = unpack_scales(scales, False, UNPACK)
    acc0 = _accumulate(acc0, v0, weights, s0, decay, LOW_UNIT)
    acc1 = _accumulate(acc1, v1, weights, s1, decay, HIGH_UNIT)
    acc2 = _accumulate(acc2, v2, weights, s2, decay, LOW_UNIT)
    acc3 = _accumulate(acc3, v3, weights, s3, decay, HIGH_UNIT)
    return acc0, acc1, acc2, acc3


@triton.jit
def _store_plane(ptr, acc, factor, columns_ok):
    """Store `[dims, heads]` times `factor` `[heads]` at ptr[heads] + dim."""
    at = ptr[None, :] + tl.arange(0, acc.shape[0])[:, None]
    tl.store(at, (acc * factor[None, :]).to(ptr.dtype.element_ty), mask=columns_ok[None, :])


@triton.jit
def _store_section(ptr, acc0, acc1, acc2, acc3, factor, columns_ok):
    """Store a section's accumulators times `factor` `[heads]` at ptr[heads] + dim."""
    plane: tl.constexpr = acc0.shape[0]
    _store_plane(ptr, acc0, factor / LOW_UNIT, columns_ok)
    _store_plane(ptr + plane, acc1, factor / HIGH_UNIT, columns_ok)
    _store_plane(ptr + 2 * plane, acc2, factor / LOW_UNIT, columns_ok)
    _store_plane(ptr + 3 * plane, acc3, factor / HIGH_UNIT, columns_ok)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attend_int4(
    q_ptr,
    k_ptr,  # uint16
    v_ptr,
    k_scale_ptr,  # the FP16 scales of up to four blocks as one integer
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
    stride_scale_page,  # of scales in rows
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
    PLANE: tl.constexpr,  # dims of a plane of a row
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

    SECTIONS: tl.constexpr = D // (4 * PLANE)
    heads = tl.arange(0, GP)
    words = tl.arange(0, PLANE)
    slots = tl.arange(0, BLOCK_N)
    head_ok = heads < G
    logit_scale = scale_log2e / LOW_UNIT * tl.load(global_ptr)
    v_scale = tl.load(global_ptr + 1)
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
        q_rows = q_ptr + seq * stride_q_batch.to(tl.int64) + (kv_head * G + heads)[None, :] * stride_q_head
        q0, q1, q2, q3, start0, start1, start2, start3 = _query(q_rows, PLANE, head_ok)
        if SECTIONS == 2:
            q4, q5, q6, q7, start4, start5, start6, start7 = _query(q_rows + D // 2, PLANE, head_ok)
        peak = tl.full([GP], float("-inf"), tl.float32)
        weight_sum = tl.zeros([BLOCK_N, GP], tl.float32)
        acc0 = tl.zeros([PLANE, GP], tl.float32)
        acc1 = acc0
        acc2 = acc0
        acc3 = acc0
        acc4 = acc0
        acc5 = acc0
        acc6 = acc0
        acc7 = acc0
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
            scale_row *= SECTIONS
            k = tl.load(k_at + words[None, :])
            scales = tl.load(k_scale_ptr + scale_row)
            logits = _logits(k, scales, q0, q1, q2, q3, start0, start1, start2, start3, UNPACK)
            if SECTIONS == 2:
                k = tl.load(k_at + PLANE + words[None, :])
                scales = tl.load(k_scale_ptr + scale_row + 1)
                logits += _logits(k, scales, q4, q5, q6, q7, start4, start5, start6, start7, UNPACK)
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
            v = tl.load(v_at + words[:, None])
            scales = tl.load(v_scale_ptr + scale_row, mask=valid, other=0)
            acc0, acc1, acc2, acc3 = _values(acc0, acc1, acc2, acc3, v, scales, w, decay, UNPACK)
            if SECTIONS == 2:
                v = tl.load(v_at + PLANE + words[:, None])
                scales = tl.load(v_scale_ptr + scale_row + 1, mask=valid, other=0)
                acc4, acc5, acc6, acc7 = _values(acc4, acc5, acc6, acc7, v, scales, w, decay, UNPACK)

        total_weight = tl.sum(weight_sum, 0)
        lse = peak - OFFSET + tl.log2(total_weight)
        complete = (from_tile == 0) & (to_tile == seq_tiles)
        if SINKS:
            sink = tl.load(sink_ptr + kv_head * G + heads, mask=head_ok, other=0.0) * LOG2_E
            if complete:
                total_weight += tl.exp2(sink - peak + OFFSET)
        inverse = v_scale / total_weight
        if complete:
            out_row = out_ptr + seq * stride_out_batch.to(tl.int64) + (kv_head * G + heads) * D
            _store_section(out_row, acc0, acc1, acc2, acc3, inverse, head_ok)
            if SECTIONS == 2:
                _store_section(out_row + D // 2, acc4, acc5, acc6, acc7, inverse, head_ok)
        else:
            first_chunk, pieces, place = piece_of(chunk, seq_start, seq_tiles, total, chunks, BATCH)
            slot = place * (KV_HEADS * G) + kv_head * G + heads
            part_row = partial_ptr + slot * D
            _store_section(part_row, acc0, acc1, acc2, acc3, inverse, head_ok)
            if SECTIONS == 2:
                _store_section(part_row + D // 2, acc4, acc5, acc6, acc7, inverse, head_ok)
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
