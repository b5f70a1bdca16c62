"""Paged split-KV decode for latent attention (MLA, DeepSeek-V2, 2024): all query heads share one 512 + 64 row a token.

    out[b, h] = softmax(scale * q[b, h] . [latent, rope]^T) latent

with the query already absorbed into the latent space (576 numbers a head). Keys and values are the same bytes, read
once for up to 32 heads, in four blocks of 128 latent numbers. Work is cut and joined as in `decode_attention`. e4m3
becomes float16 exactly, in pairs (even and odd numbers of a row): 16-bit copies serve both products, transposed and as
they are. The block scales of 656-byte rows multiply that block's logits and, beside it, its weights. Sums are FP32.
"""

import triton
import triton.language as tl

from ..decode_attention.join import join_pieces, piece_of
from ..decode_attention.kernel import MIN_TILES, OFFSET, product
from ..schedule import chunk_of_program, cut_batch, share_of_sequence
from ..unpack import unpack_pairs


@triton.jit
def _tile(row_ptr, row_at, valid, BLOCK: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr):
    """Numbers of block `BLOCK` of the rows at `row_at`, as stored: `[BLOCK_N, WIDTH]` bf16, or half as many pairs."""
    per_pair: tl.constexpr = 2 if FORMAT > 0 else 1
    dims = 128 // per_pair * BLOCK + tl.arange(0, WIDTH // per_pair)
    return tl.load(row_ptr + row_at[:, None] + dims[None, :], mask=valid[:, None], other=0)


@triton.jit
def _block_scale(row_ptr, row_at, valid, BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """FP32 scale of each row's block, `[BLOCK_N]`; 1 where rows carry none."""
    if FORMAT == 2:
        at = row_ptr.to(tl.pointer_type(tl.float32)) + row_at // 2 + 128 + BLOCK
        scale = tl.load(at, mask=valid, other=0.0)
    else:
        scale = 1.0
    return scale


@triton.jit
def _block_logits(
    logits, even_q, odd_q, tile, scale, FORMAT: tl.constexpr, UNPACK: tl.constexpr, EXACT_DOT: tl.constexpr
):
    """Logits + scale * (q tile^T). Pairs are unpacked as operands of the product, so one copy serves both products."""
    tile = tl.trans(tile)
    if FORMAT == 0:
        logits = product(even_q, tile, logits, EXACT_DOT)
    else:
        even, odd = unpack_pairs(tile, 1, UNPACK)
        part = logits
        if FORMAT == 2:
            part = tl.zeros_like(logits)
        part = product(even_q, even, part, EXACT_DOT)
        part = product(odd_q, odd, part, EXACT_DOT)
        if FORMAT == 2:
            part = logits + part * scale[None, :]
        logits = part
    return logits


@triton.jit
def _block_values(
    even, odd, weights, tile, scale, decay, FORMAT: tl.constexpr, UNPACK: tl.constexpr, EXACT_DOT: tl.constexpr
):
    """Accumulator * decay + (weights * scale) tile; `odd` only serves pairs."""
    if FORMAT == 0:
        even = product(weights.to(tile.dtype), tile, even * decay[:, None], EXACT_DOT)
    else:
        if FORMAT == 2:
            weights = weights * scale[None, :]
        w = weights.to(tl.float16)
        even_values, odd_values = unpack_pairs(tile, 1, UNPACK)
        even = product(w, even_values, even * decay[:, None], EXACT_DOT)
        odd = product(w, odd_values, odd * decay[:, None], EXACT_DOT)
    return even, odd


@triton.jit
def _store_block(at, even, odd, ok, BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """128 numbers of output rows at `at`: pairs of even and odd ones, or `even` as it is."""
    dims = 128 * BLOCK + (2 if FORMAT > 0 else 1) * tl.arange(0, even.shape[1])[None, :]
    tl.store(at[:, None] + dims, even.to(at.dtype.element_ty), mask=ok[:, None])
    if FORMAT > 0:
        tl.store(at[:, None] + dims + 1, odd.to(at.dtype.element_ty), mask=ok[:, None])


@triton.jit
def _query(at, ok, BLOCK: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr):
    """Query numbers of one block: `[heads, WIDTH]` twice, or the even and the odd ones as float16."""
    dims = 128 * BLOCK + (2 if FORMAT > 0 else 1) * tl.arange(0, WIDTH // 2 if FORMAT > 0 else WIDTH)[None, :]
    even = tl.load(at[:, None] + dims, mask=ok[:, None], other=0.0)
    odd = even
    if FORMAT > 0:
        even = even.to(tl.float16)
        odd = tl.load(at[:, None] + dims + 1, mask=ok[:, None], other=0.0).to(tl.float16)
    return even, odd


@triton.jit(do_not_specialize=["batch_size", "num_chunks", "stride_q_batch", "stride_table_row", "stride_out_batch"])
def attend_latent(
    q_ptr,
    row_ptr,
    scale_ptr,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    arrived_ptr,
    scale_log2e,
    batch_size,
    num_chunks,
    stride_q_batch,
    stride_table_row,
    stride_out_batch,
    HEAD_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of one program
    HP: tl.constexpr,  # padded to a power of two, at least 16
    ROW: tl.constexpr,  # elements of a row: bf16, or uint16 pairs of bytes
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    BATCH: tl.constexpr,
    JOIN_STAGES: tl.constexpr,
    UNPACK: tl.constexpr,
    EXACT_DOT: tl.constexpr,
):
    """Attend to one chunk of tiles for one block of query heads; grid: num_chunks * HEAD_BLOCKS programs."""
    chunk, head_block = chunk_of_program(num_chunks, HEAD_BLOCKS, True)
    total, chunks, tile, end_tile, first_seq, last_seq, seq_start = cut_batch(
        tl.arange(0, BATCH), chunk, num_chunks, seq_lens_ptr, batch_size, 0, BLOCK_N, False, MIN_TILES
    )
    if chunk >= chunks:
        return

    heads = tl.arange(0, HP)
    head_ok = heads < HEADS
    rope_dims = tl.arange(0, 64)
    per_pair: tl.constexpr = 2 if FORMAT > 0 else 1
    ROPE_FORMAT: tl.constexpr = 1 if FORMAT == 1 else 0
    # log2 of the largest weight: times a block's scale up to 511 (latent numbers up to 229,000) it stays inside float16
    LARGEST: tl.constexpr = 7.0 if FORMAT == 2 else OFFSET
    slots = tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr)
    logit_scale = scale_log2e * scale
    for seq in tl.range(first_seq, last_seq + 1, num_stages=1):
        seq_len = tl.load(seq_lens_ptr + seq)
        _, seq_tiles, from_tile, to_tile, _ = share_of_sequence(seq_len, seq_start, tile, end_tile, 0, BLOCK_N, False)
        table = block_table_ptr + seq * stride_table_row.to(tl.int64)
        last_page = (tl.maximum(seq_len, 1) - 1) // PAGE
        q_at = q_ptr + seq * stride_q_batch.to(tl.int64) + (head_block * HEADS + heads) * 576
        even_q0, odd_q0 = _query(q_at, head_ok, 0, 128, FORMAT)
        even_q1, odd_q1 = _query(q_at, head_ok, 1, 128, FORMAT)
        even_q2, odd_q2 = _query(q_at, head_ok, 2, 128, FORMAT)
        even_q3, odd_q3 = _query(q_at, head_ok, 3, 128, FORMAT)
        even_rope, odd_rope = _query(q_at, head_ok, 4, 64, ROPE_FORMAT)
        peak = tl.full([HP], float("-inf"), tl.float32)
        weight_sum = tl.zeros([HP], tl.float32)
        even0 = tl.zeros([HP, 128 // per_pair], tl.float32)
        even1 = tl.zeros([HP, 128 // per_pair], tl.float32)
        even2 = tl.zeros([HP, 128 // per_pair], tl.float32)
        even3 = tl.zeros([HP, 128 // per_pair], tl.float32)
        odd0 = tl.zeros([HP, 128 // per_pair], tl.float32)
        odd1 = tl.zeros([HP, 128 // per_pair], tl.float32)
        odd2 = tl.zeros([HP, 128 // per_pair], tl.float32)
        odd3 = tl.zeros([HP, 128 // per_pair], tl.float32)
        pages = tl.load(table + tl.minimum((from_tile * BLOCK_N + slots) // PAGE, last_page))
        for t in tl.range(from_tile, to_tile, num_stages=STAGES):
            tokens = t * BLOCK_N + slots
            valid = tokens < seq_len
            row_at = (pages.to(tl.int64) * PAGE + tokens % PAGE) * ROW
            pages = tl.load(table + tl.minimum((tokens + BLOCK_N) // PAGE, last_page))
            tile0 = _tile(row_ptr, row_at, valid, 0, 128, FORMAT)
            tile1 = _tile(row_ptr, row_at, valid, 1, 128, FORMAT)
            tile2 = _tile(row_ptr, row_at, valid, 2, 128, FORMAT)
            tile3 = _tile(row_ptr, row_at, valid, 3, 128, FORMAT)
            scale0 = _block_scale(row_ptr, row_at, valid, 0, FORMAT)
            scale1 = _block_scale(row_ptr, row_at, valid, 1, FORMAT)
            scale2 = _block_scale(row_ptr, row_at, valid, 2, FORMAT)
            scale3 = _block_scale(row_ptr, row_at, valid, 3, FORMAT)
            if FORMAT == 2:  # after 512 bytes and four scales, 64 bf16 numbers
                rope = tl.load(
                    row_ptr.to(tl.pointer_type(tl.bfloat16)) + row_at[:, None] + 264 + rope_dims[None, :],
                    mask=valid[:, None],
                    other=0.0,
                )
            else:
                rope = _tile(row_ptr, row_at, valid, 4, 64, FORMAT)
            logits = tl.zeros([HP, BLOCK_N], tl.float32)
            logits = _block_logits(logits, even_rope, odd_rope, rope, 1.0, ROPE_FORMAT, UNPACK, EXACT_DOT)
            logits = _block_logits(logits, even_q0, odd_q0, tile0, scale0, FORMAT, UNPACK, EXACT_DOT)
            logits = _block_logits(logits, even_q1, odd_q1, tile1, scale1, FORMAT, UNPACK, EXACT_DOT)
            logits = _block_logits(logits, even_q2, odd_q2, tile2, scale2, FORMAT, UNPACK, EXACT_DOT)
            logits = _block_logits(logits, even_q3, odd_q3, tile3, scale3, FORMAT, UNPACK, EXACT_DOT)
            logits = tl.where(valid[None, :], logits * logit_scale, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            decay = tl.exp2(peak - new_peak)
            peak = new_peak
            weights = tl.exp2(logits - (new_peak - LARGEST)[:, None])
            weight_sum = weight_sum * decay + tl.sum(weights, 1)
            even0, odd0 = _block_values(even0, odd0, weights, tile0, scale0, decay, FORMAT, UNPACK, EXACT_DOT)
            even1, odd1 = _block_values(even1, odd1, weights, tile1, scale1, decay, FORMAT, UNPACK, EXACT_DOT)
            even2, odd2 = _block_values(even2, odd2, weights, tile2, scale2, decay, FORMAT, UNPACK, EXACT_DOT)
            even3, odd3 = _block_values(even3, odd3, weights, tile3, scale3, decay, FORMAT, UNPACK, EXACT_DOT)

        lse = peak - LARGEST + tl.log2(weight_sum)
        inverse = (scale / weight_sum)[:, None]
        if (from_tile == 0) & (to_tile == seq_tiles):
            out_at = out_ptr + seq * stride_out_batch.to(tl.int64) + head_block * (HEADS * 512) + heads * 512
            _store_block(out_at, even0 * inverse, odd0 * inverse, head_ok, 0, FORMAT)
            _store_block(out_at, even1 * inverse, odd1 * inverse, head_ok, 1, FORMAT)
            _store_block(out_at, even2 * inverse, odd2 * inverse, head_ok, 2, FORMAT)
            _store_block(out_at, even3 * inverse, odd3 * inverse, head_ok, 3, FORMAT)
        else:
            first_chunk, pieces, place = piece_of(chunk, seq_start, seq_tiles, total, chunks, BATCH)
            slot = (place * HEAD_BLOCKS + head_block) * HEADS
            piece_at = partial_ptr + slot.to(tl.int64) * 512 + heads * 512
            _store_block(piece_at, even0 * inverse, odd0 * inverse, head_ok, 0, FORMAT)
            _store_block(piece_at, even1 * inverse, odd1 * inverse, head_ok, 1, FORMAT)
            _store_block(piece_at, even2 * inverse, odd2 * inverse, head_ok, 2, FORMAT)
            _store_block(piece_at, even3 * inverse, odd3 * inverse, head_ok, 3, FORMAT)
            tl.store(partial_lse_ptr + slot + heads, lse, mask=head_ok)
            join_pieces(
                partial_lse_ptr,
                out_ptr + seq * stride_out_batch.to(tl.int64),
                partial_ptr,
                partial_lse_ptr,
                arrived_ptr,
                chunk - first_chunk,
                first_chunk,
                pieces,
                num_chunks,
                head_block,
                HEAD_BLOCKS,
                HEADS,
                HP,
                512,
                512,
                False,
                JOIN_STAGES,
                0,
                UNPACK,
            )
        tile = seq_start + seq_tiles
        seq_start = tile
