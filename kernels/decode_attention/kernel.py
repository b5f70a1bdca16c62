"""Paged split-KV decode attention: one query token a sequence over a quantised or 16-bit KV cache (GQA, MQA, MHA).

    out[b, h] = softmax(scale * q[b, h] . K[b, h / G]^T) V[b, h / G]

with optional logit soft-cap `cap * tanh(s / cap)`, sliding window (the last `window` tokens) and attention sinks (one
logit a query head that takes weight but adds no value). The online softmax is that of FlashAttention (Dao et al.,
2022), the cut along the context that of Flash-Decoding (Dao et al., 2023); equal chunks of work whatever the lengths
follow Stream-K (Osama et al., 2023): see `schedule`.

One launch: a program walks one chunk of tiles for one KV head and writes the finished output of a sequence, or a
partial result when others hold the rest of it; whichever of them arrives last joins the parts, or those of a batch of
one all together (`join`). The operands are swapped (S^T = K Q^T, O^T = V^T P^T) so that the few query heads pad to 8
columns, not to 16 or 64 rows. 8-bit codes become float16 exactly, products accumulate in FP32.

Scales: K's per-tensor or per-head scale multiplies the logits with `scale`, V's divides out at the end. A
per-token-head K scale multiplies its logit. A per-token-head V scale joins the exponent: the weights are w = p *
v_scale = exp2(s + log2 v_scale - max), whose largest is always 2**OFFSET, so that no product underflows float16
whatever the scales; the denominator sums w / v_scale.
"""

import triton
import triton.language as tl

from ..schedule import await_last_launch, chunk_of_program, cut_batch, share_of_sequence
from ..unpack import INT8_BIAS, unpack_elements, unpack_pairs
from .join import LOG2_E, join_pieces, piece_of
from .pages import first_page, page_ahead, rows_at, slot_in_page, valid_slots

OFFSET = tl.constexpr(14.0)
"""log2 of the largest softmax weight: keeps small weights clear of float16's subnormals."""
SMALLEST_SCALE = tl.constexpr(2.0**-60)
MIN_TILES = tl.constexpr(4)
_STRIDES = (
    *("q_batch", "q_head", "k_page", "k_token", "k_head", "v_page", "v_token", "v_head"),
    *("scale_page", "scale_token", "scale_head", "table_row", "out_batch"),
)
NOT_SPECIALISED = ["batch_size", "num_chunks", "window", *(f"stride_{s}" for s in _STRIDES)]


@triton.jit
def log2(x, UNPACK: tl.constexpr):
    """log2 of normal positive numbers; on NVIDIA GPUs one instruction."""
    if UNPACK == 0:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def reciprocal(x, UNPACK: tl.constexpr):
    """1 / x of normal positive numbers; on NVIDIA GPUs one instruction."""
    if UNPACK == 0:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def store_columns(ptr, even, odd, columns_ok, WIDTH: tl.constexpr, PAIRED: tl.constexpr):
    """Store a [..., WIDTH, heads] accumulator at ptr[..., 1, heads] + dim: pairs of even and odd dims, or `even` as it
    is. `columns_ok` is of `ptr`'s shape.
    """
    rows = tl.arange(0, even.shape[-2])[:, None]
    if PAIRED:
        keep = columns_ok & (rows < WIDTH // 2)
        tl.store(ptr + 2 * rows, even.to(ptr.dtype.element_ty), mask=keep)
        tl.store(ptr + 2 * rows + 1, odd.to(ptr.dtype.element_ty), mask=keep)
    else:
        keep = columns_ok & (rows < WIDTH)
        tl.store(ptr + rows, even.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def cap_logits(logits, soft_cap):
    """Cap * tanh(x / cap), both in units of log2."""
    return soft_cap - 2.0 * soft_cap / (1.0 + tl.exp2(logits * (2.8853900817779268 / soft_cap)))


@triton.jit
def product(a, b, c, EXACT_DOT: tl.constexpr):
    """A b + c; `EXACT_DOT` is for the interpreter, whose bfloat16 products are wrong."""
    if EXACT_DOT:
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), c)
    else:
        c = tl.dot(a, b, c)
    return c


@triton.jit
def add_logits(logits, k, q, FORMAT: tl.constexpr, UNPACK: tl.constexpr, EXACT_DOT: tl.constexpr):
    """Logits + K Q^T for K `[tokens, dims]` as stored."""
    if FORMAT > 0:
        k = unpack_elements(k, FORMAT, UNPACK)
    return product(k, q, logits, EXACT_DOT)


@triton.jit
def add_values(even, odd, v, weights, decay, FORMAT: tl.constexpr, UNPACK: tl.constexpr, EXACT_DOT: tl.constexpr):
    """Accumulator * decay + V^T W for V `[dims, tokens]` as stored (8 bits: pairs); `odd` only serves pairs."""
    if FORMAT > 0:
        v_even, v_odd = unpack_pairs(v, FORMAT, UNPACK)
        w = weights.to(tl.float16)
        even = tl.dot(v_even, w, even * decay)
        odd = tl.dot(v_odd, w, odd * decay)
    else:
        even = product(v, weights.to(v.dtype), even * decay, EXACT_DOT)
    return even, odd


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attend(
    q_ptr,
    k_ptr,
    v_ptr,  # 8-bit formats: uint16 pairs
    k_scale_ptr,
    v_scale_ptr,
    sink_ptr,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,  # FP32 [num_chunks, 2, kv_heads, G, D]
    partial_lse_ptr,  # FP32 [num_chunks, 2, kv_heads, G], base 2
    arrived_ptr,  # int32 [levels, num_chunks, 2, kv_heads], zeros
    scale_log2e,
    soft_cap,
    window,
    batch_size,
    num_chunks,
    stride_q_batch,
    stride_q_head,
    stride_k_page,  # K and V strides in units of 16 bytes
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
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # power of two >= D
    DA: tl.constexpr,  # largest power of two <= D, the rest DB = D - DA a tile of its own; or padded: DP, and DB = 0
    DB: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,  # 0: 16-bit elements, else formats.KvFormat.code
    SCALES: tl.constexpr,  # 0 none, 1 one number a KV head, 2 per token and head, 3 the same inline
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BATCH: tl.constexpr,  # power of two >= batch_size
    JOIN_STAGES: tl.constexpr,  # partial results in flight at a time
    UNPACK: tl.constexpr,
    EXACT_DOT: tl.constexpr,  # the interpreter: its bfloat16 products are wrong
    HEADS_TOGETHER: tl.constexpr,  # neighbouring programs take the heads of one chunk, else the chunks of one head
    DEPENDENT: tl.constexpr,  # launched while the last kernel still ends
    JOIN_TOGETHER: tl.constexpr,  # as `join_pieces`'s
):
    """Attend to one chunk of tiles for one KV head; grid: num_chunks * KV_HEADS programs."""
    if DEPENDENT:
        await_last_launch()
    chunk, kv_head = chunk_of_program(num_chunks, KV_HEADS, HEADS_TOGETHER)
    total, chunks, tile, end_tile, first_seq, last_seq, seq_start = cut_batch(
        tl.arange(0, BATCH), chunk, num_chunks, seq_lens_ptr, batch_size, window, BLOCK_N, WINDOW, MIN_TILES
    )
    if chunk >= chunks:
        return

    heads = tl.arange(0, GP)
    per_pair: tl.constexpr = 2 if FORMAT > 0 else 1  # V dims in one stored element
    dims = tl.arange(0, DA)
    v_dims = tl.arange(0, DA // per_pair)
    if SCALES == 3:  # copies of 8 bytes go through L1, where the scale's sector is then found
        dims = tl.max_contiguous(dims, 8)
        v_dims = tl.max_contiguous(v_dims, 8 // per_pair)
    if DB > 0:
        k_tail = DA + tl.arange(0, DB)
        tail_rows: tl.constexpr = max(16, DB // per_pair)
        v_tail = tl.arange(0, tail_rows)
        v_tail_ok = (v_tail < DB // per_pair)[:, None]
    slots = tl.arange(0, BLOCK_N)
    head_ok = heads < G
    logit_scale = scale_log2e
    v_scale = 1.0
    if SCALES == 1:
        logit_scale *= tl.load(k_scale_ptr + kv_head)
        v_scale = tl.load(v_scale_ptr + kv_head)
    per_unit: tl.constexpr = 16 if FORMAT > 0 else 8  # elements in 16 bytes
    k_offsets = (slots * stride_k_token * per_unit)[:, None]
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
        q = tl.load(q_rows + dims[:, None], mask=head_ok[None, :] & (dims < D)[:, None], other=0.0)
        if FORMAT > 0:
            q = q.to(tl.float16)
        peak = tl.full([GP], float("-inf"), tl.float32)
        weight_sum = tl.zeros([BLOCK_N, GP], tl.float32)
        even = tl.zeros([DA // per_pair, GP], tl.float32)
        odd = tl.zeros([DA // per_pair, GP], tl.float32)
        if DB > 0:
            q_tail = tl.load(q_rows + k_tail[:, None], mask=head_ok[None, :], other=0.0)
            if FORMAT > 0:
                q_tail = q_tail.to(tl.float16)
            even_tail = tl.zeros([tail_rows, GP], tl.float32)
            odd_tail = tl.zeros([tail_rows, GP], tl.float32)

        bias = tl.zeros([GP], tl.float32)
        if FORMAT == 3:  # K comes with a constant added to every element
            bias += INT8_BIAS * tl.sum(q.to(tl.float32), 0)
            if DB > 0:
                bias += INT8_BIAS * tl.sum(q_tail.to(tl.float32), 0)
        for t in tl.range(begin, end, num_stages=STAGES):
            token = t * BLOCK_N
            page = next_page
            next_page = page_ahead(table, token, slots, last_page, PAGE, BLOCK_N)
            in_page = slot_in_page(token, slots, PAGE, BLOCK_N)
            valid = valid_slots(slots, token, seq_len, first_token, WINDOW)

            # 16-byte units fit 32 bits
            k_row = page * stride_k_page + in_page * stride_k_token + kv_head * stride_k_head
            v_row = page * stride_v_page + in_page * stride_v_token + kv_head * stride_v_head
            k_at = rows_at(k_ptr, k_row, k_offsets, per_unit, 1, PAGE, BLOCK_N)
            v_at = rows_at(v_ptr, v_row, v_offsets, 8, 0, PAGE, BLOCK_N)
            if DA > D:
                k = tl.load(k_at + dims[None, :], mask=(dims < D)[None, :], other=0)
            else:
                k = tl.load(k_at + dims[None, :])
            logits = tl.zeros([BLOCK_N, GP], tl.float32) - bias[None, :]
            logits = add_logits(logits, k, q, FORMAT, UNPACK, EXACT_DOT)
            if DB > 0:
                k = tl.load(k_at + k_tail[None, :])
                logits = add_logits(logits, k, q_tail, FORMAT, UNPACK, EXACT_DOT)
            if SCALES >= 2:
                if SCALES == 2:
                    scale_at = page * stride_scale_page + in_page * stride_scale_token + kv_head * stride_scale_head
                    if PAGE >= BLOCK_N:
                        scale_at += slots * stride_scale_token
                    k_scales_at = k_scale_ptr + scale_at
                    v_scales_at = v_scale_ptr + scale_at
                else:  # the row's own FP32 scale follows its elements
                    k_scale_row = k_row
                    v_scale_row = v_row
                    if PAGE >= BLOCK_N:
                        k_scale_row = k_row + slots * stride_k_token
                        v_scale_row = v_row + slots * stride_v_token
                    k_scales_at = k_scale_ptr + k_scale_row.to(tl.int64) * 4 + D // 4
                    v_scales_at = v_scale_ptr + v_scale_row.to(tl.int64) * 4 + D // 4
                logits *= (tl.load(k_scales_at) * logit_scale)[:, None]
                v_scales = tl.maximum(tl.load(v_scales_at, mask=valid, other=0.0), SMALLEST_SCALE)
            else:
                logits *= logit_scale
            if SOFT_CAP:
                logits = cap_logits(logits, soft_cap)
            if SCALES >= 2:
                logits += log2(v_scales, UNPACK)[:, None]
            logits = tl.where(valid[:, None], logits, float("-inf"))

            new_peak = tl.maximum(peak, tl.max(logits, 0))
            decay = tl.exp2(peak - new_peak)[None, :]
            peak = new_peak
            weights = tl.exp2(logits - (new_peak - OFFSET)[None, :])
            if SCALES >= 2:
                weight_sum = weight_sum * decay + weights * reciprocal(v_scales, UNPACK)[:, None]
            else:
                weight_sum = weight_sum * decay + weights

            if DA > D:
                v = tl.load(v_at + v_dims[:, None], mask=valid[None, :] & (v_dims < D // per_pair)[:, None], other=0)
            else:
                v = tl.load(v_at + v_dims[:, None], mask=valid[None, :], other=0)
            even, odd = add_values(even, odd, v, weights, decay, FORMAT, UNPACK, EXACT_DOT)
            if DB > 0:
                v_tail_at = v_at + (DA // per_pair + v_tail)[:, None]
                v = tl.load(v_tail_at, mask=valid[None, :] & v_tail_ok, other=0)
                even_tail, odd_tail = add_values(even_tail, odd_tail, v, weights, decay, FORMAT, UNPACK, EXACT_DOT)

        total_weight = tl.sum(weight_sum, 0)
        lse = peak - OFFSET + tl.log2(total_weight)
        complete = (from_tile == 0) & (to_tile == seq_tiles)
        if SINKS:
            sink = tl.load(sink_ptr + kv_head * G + heads, mask=head_ok, other=0.0) * LOG2_E
            if complete:
                total_weight += tl.exp2(sink - peak + OFFSET)
        inverse = tl.where(total_weight > 0.0, v_scale / total_weight, 0.0)
        even *= inverse[None, :]
        odd *= inverse[None, :]
        if complete:
            out_row = (out_ptr + seq * stride_out_batch.to(tl.int64) + (kv_head * G + heads) * D)[None, :]
            store_columns(out_row, even, odd, head_ok[None, :], min(DA, D), FORMAT > 0)
            if DB > 0:
                store_columns(out_row + DA, even_tail * inverse, odd_tail * inverse, head_ok[None, :], DB, FORMAT > 0)
        else:
            first_chunk, pieces, place = piece_of(chunk, seq_start, seq_tiles, total, chunks, BATCH)
            slot = place * (KV_HEADS * G) + kv_head * G + heads
            row = (partial_ptr + slot * D)[None, :]
            store_columns(row, even, odd, head_ok[None, :], min(DA, D), FORMAT > 0)
            if DB > 0:
                store_columns(row + DA, even_tail * inverse, odd_tail * inverse, head_ok[None, :], DB, FORMAT > 0)
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
