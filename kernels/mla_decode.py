"""Paged split-KV decode for latent attention (MLA, DeepSeek-V2, 2024): all query heads share one 512 + 64 row a token.

    out[b, h] = softmax(scale * q[b, h] . [latent, rope]^T) latent

with the query already absorbed into the latent space (576 numbers a head). Keys and values are the same bytes, read
once for up to 32 heads, in four blocks of 128 latent numbers. Work is cut and joined as in `decode_attention`. e4m3
becomes float16 exactly; the block scales of 656-byte rows multiply that block's logits and, beside it, its weights.
Sums are FP32.
"""

import math

import torch
import triton
import triton.language as tl

from .configs import Config, mla_config
from .decode_attention.join import join_pieces, piece_slot
from .decode_attention.kernel import MIN_TILES, OFFSET
from .decode_attention.plan import LEVELS
from .device import KernelFacts, architecture, interpreting, loaded_facts, resident_ctas, unpack_mode
from .latent_cache import LATENT_DIM, ROPE_DIM, LatentCache
from .schedule import batch_tiles, chunk_of_tile, chunk_start, sequence_tiles, used_chunks
from .unpack import unpack_elements

HEADS_A_PROGRAM = 32
FORMAT_CODES = {"bf16": 0, "fp8_e4m3": 1, "fp8_ds_mla": 2}


@triton.jit
def _latent_block(row_ptr, row_at, valid, dims, BLOCK: tl.constexpr, FORMAT: tl.constexpr, UNPACK: tl.constexpr):
    """Latent numbers 128 * BLOCK to 128 * BLOCK + 127 of the rows at `row_at`, `[BLOCK_N, 128]`, not yet scaled."""
    at = row_ptr + row_at[:, None] + (128 * BLOCK + dims)[None, :]
    latent = tl.load(at, mask=valid[:, None], other=0)
    if FORMAT > 0:
        latent = unpack_elements(latent, 1, UNPACK)
    return latent


@triton.jit
def _block_scale(row_ptr, row_at, valid, BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """FP32 scale of each row's block, `[BLOCK_N]`; 1 where rows carry none."""
    if FORMAT == 2:
        at = row_ptr.to(tl.pointer_type(tl.float32)) + row_at // 4 + 128 + BLOCK
        scale = tl.load(at, mask=valid, other=0.0)
    else:
        scale = 1.0
    return scale


@triton.jit
def _product(a, b, c, EXACT_DOT: tl.constexpr):
    """A b + c."""
    if EXACT_DOT:
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), c)
    else:
        c = tl.dot(a, b, c)
    return c


@triton.jit
def _block_logits(logits, q, latent, scale, FORMAT: tl.constexpr, EXACT_DOT: tl.constexpr):
    """Logits + scale * (q latent^T)."""
    if FORMAT == 2:
        logits += _product(q, tl.trans(latent), tl.zeros_like(logits), EXACT_DOT) * scale[None, :]
    else:
        logits = _product(q, tl.trans(latent), logits, EXACT_DOT)
    return logits


@triton.jit
def _block_values(acc, weights, latent, scale, decay, FORMAT: tl.constexpr, EXACT_DOT: tl.constexpr):
    """Acc * decay + (weights * scale) latent."""
    if FORMAT == 2:
        weights = weights * scale[None, :]
    return _product(weights.to(latent.dtype), latent, acc * decay[:, None], EXACT_DOT)


@triton.jit
def _store_blocks(at, acc0, acc1, acc2, acc3, ok):
    """Four `[heads, 128]` blocks of an output row."""
    tl.store(at, acc0.to(at.dtype.element_ty), mask=ok[:, None])
    tl.store(at + 128, acc1.to(at.dtype.element_ty), mask=ok[:, None])
    tl.store(at + 256, acc2.to(at.dtype.element_ty), mask=ok[:, None])
    tl.store(at + 384, acc3.to(at.dtype.element_ty), mask=ok[:, None])


@triton.jit
def _load_query(at, dims, ok, BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """Query numbers of one latent block, `[heads, 128]`."""
    q = tl.load(at + (128 * BLOCK + dims)[None, :], mask=ok[:, None], other=0.0)
    if FORMAT > 0:
        q = q.to(tl.float16)
    return q


@triton.jit
def _rope_tile(row_ptr, row_at, valid, dims, FORMAT: tl.constexpr, UNPACK: tl.constexpr):
    """Rotary numbers `[BLOCK_N, 64]`: bf16, or float16 when they are e4m3."""
    if FORMAT == 2:
        rope_at = row_ptr.to(tl.pointer_type(tl.bfloat16)) + row_at[:, None] // 2 + 264 + dims[None, :]
        rope = tl.load(rope_at, mask=valid[:, None], other=0.0)
    else:
        rope = tl.load(row_ptr + row_at[:, None] + 512 + dims[None, :], mask=valid[:, None], other=0)
        if FORMAT == 1:
            rope = unpack_elements(rope, 1, UNPACK)
    return rope


@triton.jit(do_not_specialize=["batch_size", "num_chunks", "stride_q_batch", "stride_table_row", "stride_out_batch"])
def _attend(
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
    ROW: tl.constexpr,  # elements of a row: bytes, or bf16
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    BATCH: tl.constexpr,
    JOIN_STAGES: tl.constexpr,
    UNPACK: tl.constexpr,
    EXACT_DOT: tl.constexpr,
):
    head_block = tl.program_id(0) % HEAD_BLOCKS
    chunk = tl.program_id(0) // HEAD_BLOCKS
    rows, tiles = batch_tiles(seq_lens_ptr, batch_size, 0, BLOCK_N, False, BATCH)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    chunks = used_chunks(total, batch_size, num_chunks, MIN_TILES)
    if chunk >= chunks:
        return
    tile = chunk_start(chunk, total, chunks)
    end_tile = chunk_start(chunk + 1, total, chunks)
    first_seq = tl.sum((ends <= tile).to(tl.int32), 0)
    last_seq = tl.sum((ends < end_tile).to(tl.int32), 0)
    seq_start = tl.sum(tl.where(rows < first_seq, tiles, 0), 0)

    heads = tl.arange(0, HP)
    head_ok = heads < HEADS
    dims = tl.arange(0, 128)
    rope_dims = tl.arange(0, 64)
    slots = tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr)
    logit_scale = scale_log2e * scale
    for seq in tl.range(first_seq, last_seq + 1, num_stages=1):
        seq_len = tl.load(seq_lens_ptr + seq)
        seq_tiles = sequence_tiles(seq_len, 0, BLOCK_N, False)[1]
        from_tile = tile - seq_start
        to_tile = tl.minimum(end_tile - seq_start, seq_tiles)
        table = block_table_ptr + seq * stride_table_row.to(tl.int64)
        last_page = (tl.maximum(seq_len, 1) - 1) // PAGE
        q_at = q_ptr + seq * stride_q_batch.to(tl.int64) + ((head_block * HEADS + heads) * 576)[:, None]
        q0 = _load_query(q_at, dims, head_ok, 0, FORMAT)
        q1 = _load_query(q_at, dims, head_ok, 1, FORMAT)
        q2 = _load_query(q_at, dims, head_ok, 2, FORMAT)
        q3 = _load_query(q_at, dims, head_ok, 3, FORMAT)
        q_rope = tl.load(q_at + 512 + rope_dims[None, :], mask=head_ok[:, None], other=0.0)
        if FORMAT == 1:
            q_rope = q_rope.to(tl.float16)
        peak = tl.full([HP], float("-inf"), tl.float32)
        weight_sum = tl.zeros([HP], tl.float32)
        acc0 = tl.zeros([HP, 128], tl.float32)
        acc1 = tl.zeros([HP, 128], tl.float32)
        acc2 = tl.zeros([HP, 128], tl.float32)
        acc3 = tl.zeros([HP, 128], tl.float32)
        pages = tl.load(table + tl.minimum((from_tile * BLOCK_N + slots) // PAGE, last_page))
        for t in tl.range(from_tile, to_tile, num_stages=STAGES):
            tokens = t * BLOCK_N + slots
            valid = tokens < seq_len
            row_at = (pages.to(tl.int64) * PAGE + tokens % PAGE) * ROW
            pages = tl.load(table + tl.minimum((tokens + BLOCK_N) // PAGE, last_page))
            latent0 = _latent_block(row_ptr, row_at, valid, dims, 0, FORMAT, UNPACK)
            latent1 = _latent_block(row_ptr, row_at, valid, dims, 1, FORMAT, UNPACK)
            latent2 = _latent_block(row_ptr, row_at, valid, dims, 2, FORMAT, UNPACK)
            latent3 = _latent_block(row_ptr, row_at, valid, dims, 3, FORMAT, UNPACK)
            scale0 = _block_scale(row_ptr, row_at, valid, 0, FORMAT)
            scale1 = _block_scale(row_ptr, row_at, valid, 1, FORMAT)
            scale2 = _block_scale(row_ptr, row_at, valid, 2, FORMAT)
            scale3 = _block_scale(row_ptr, row_at, valid, 3, FORMAT)
            rope = _rope_tile(row_ptr, row_at, valid, rope_dims, FORMAT, UNPACK)
            logits = _product(q_rope, tl.trans(rope), tl.zeros([HP, BLOCK_N], tl.float32), EXACT_DOT)
            logits = _block_logits(logits, q0, latent0, scale0, FORMAT, EXACT_DOT)
            logits = _block_logits(logits, q1, latent1, scale1, FORMAT, EXACT_DOT)
            logits = _block_logits(logits, q2, latent2, scale2, FORMAT, EXACT_DOT)
            logits = _block_logits(logits, q3, latent3, scale3, FORMAT, EXACT_DOT)
            logits = tl.where(valid[None, :], logits * logit_scale, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            decay = tl.exp2(peak - new_peak)
            peak = new_peak
            weights = tl.exp2(logits - (new_peak - OFFSET)[:, None])
            weight_sum = weight_sum * decay + tl.sum(weights, 1)
            acc0 = _block_values(acc0, weights, latent0, scale0, decay, FORMAT, EXACT_DOT)
            acc1 = _block_values(acc1, weights, latent1, scale1, decay, FORMAT, EXACT_DOT)
            acc2 = _block_values(acc2, weights, latent2, scale2, decay, FORMAT, EXACT_DOT)
            acc3 = _block_values(acc3, weights, latent3, scale3, decay, FORMAT, EXACT_DOT)

        lse = peak - OFFSET + tl.log2(weight_sum)
        inverse = (scale / weight_sum)[:, None]
        cell = heads[:, None] * 512 + dims[None, :]
        if (from_tile == 0) & (to_tile == seq_tiles):
            out_at = out_ptr + seq * stride_out_batch.to(tl.int64) + head_block * (HEADS * 512)
            _store_blocks(out_at + cell, acc0 * inverse, acc1 * inverse, acc2 * inverse, acc3 * inverse, head_ok)
        else:
            first_chunk = chunk_of_tile(seq_start, total, chunks)
            pieces = chunk_of_tile(seq_start + seq_tiles - 1, total, chunks) - first_chunk + 1
            slot = (piece_slot(first_chunk, chunk - first_chunk) * HEAD_BLOCKS + head_block) * HEADS
            at = partial_ptr + slot.to(tl.int64) * 512 + cell
            _store_blocks(at, acc0 * inverse, acc1 * inverse, acc2 * inverse, acc3 * inverse, head_ok)
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
            )
        tile = seq_start + seq_tiles
        seq_start = tile


class MlaPlan:
    """Latent decode for caches of one shape: `run` launches it on one layer.

    `num_heads` query heads (16 to 128 a rank in practice; above 32 they are split among programs, evenly). ValueError
    for other counts.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        num_heads: int,
        softmax_scale: float,
        config: Config | None = None,
        num_chunks: int | None = None,
    ) -> None:
        self.head_blocks = -(-num_heads // HEADS_A_PROGRAM)
        if num_heads < 1 or num_heads % self.head_blocks:
            raise ValueError(f"{num_heads} query heads do not split evenly among programs of at most {HEADS_A_PROGRAM}")
        self.num_heads = num_heads
        self.batch = cache.block_table.shape[0]
        self.arch = architecture(cache.data.device)
        heads = num_heads // self.head_blocks
        padded = max(16, 1 << (heads - 1).bit_length())
        self.config = config or mla_config(self.arch)
        self._scale_log2e = softmax_scale * math.log2(math.e)
        self._flags = {
            "HEAD_BLOCKS": self.head_blocks,
            "HEADS": heads,
            "HP": padded,
            "ROW": cache.data.shape[-1],
            "PAGE": cache.block_size_tokens,
            "BLOCK_N": self.config.block_n,
            "STAGES": self.config.num_stages,
            "FORMAT": FORMAT_CODES[cache.kv_dtype],
            "BATCH": max(16, 1 << (self.batch - 1).bit_length()),
            "JOIN_STAGES": 2,
            "UNPACK": unpack_mode(self.arch),
            "EXACT_DOT": interpreting(),
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }
        self.num_chunks = num_chunks or 1
        self._allocate(cache)
        self.facts: KernelFacts | None = None
        if not interpreting():
            q = torch.empty(
                self.batch, num_heads, LATENT_DIM + ROPE_DIM, dtype=torch.bfloat16, device=cache.data.device
            )
            args = self._arguments(q, cache, q[..., :LATENT_DIM].contiguous())
            self.facts = loaded_facts(_attend.warmup(*args, grid=(1,), **self._flags))
        if num_chunks is None:
            resident = resident_ctas(self.facts, self.arch, cache.data.device, self.config.ctas_per_sm)
            self.num_chunks = max(1, resident // self.head_blocks)
            self._allocate(cache)

    def _allocate(self, cache: LatentCache) -> None:
        device = cache.data.device
        rows = self.num_chunks * 2 * self.num_heads
        self._partial = torch.empty(rows, LATENT_DIM, device=device)
        self._partial_lse = torch.empty(rows, device=device)
        self._arrived = torch.zeros(LEVELS * self.num_chunks * 2 * self.head_blocks, dtype=torch.int32, device=device)

    def _arguments(self, q: torch.Tensor, cache: LatentCache, out: torch.Tensor) -> tuple:
        return (
            *(q, cache.data, cache.scale, cache.block_table, cache.seq_lens, out),
            *(self._partial, self._partial_lse, self._arrived, self._scale_log2e),
            *(self.batch, self.num_chunks, q.stride(0), cache.block_table.stride(0), out.stride(0)),
        )

    def run(self, q: torch.Tensor, cache: LatentCache, out: torch.Tensor | None = None) -> torch.Tensor:
        """Output `[batch, heads, 512]` for absorbed queries `[batch, heads, 576]` (bf16, contiguous); one launch."""
        if out is None:
            out = torch.empty(*q.shape[:2], LATENT_DIM, dtype=q.dtype, device=q.device)
        _attend[(self.num_chunks * self.head_blocks,)](*self._arguments(q, cache, out), **self._flags)
        return out
