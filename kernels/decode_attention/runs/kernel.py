"""Decode attention over 8-bit pages that copies a tile as it lies in the cache, in whole runs (Gluon).

The scheme, the scales and the join are `kernel`'s. What differs: a tile of one KV head is a run of bytes in each of its
pages (`layouts`) and is copied as such, so that rows of 80, 96 or 144 bytes cost no sector twice, which copies row
by row do. And a program reads a tile from shared memory into registers at once and lets the next one into its place, so
that every buffer is in flight while it computes: one is enough.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ...schedule import await_last_launch, chunk_of_program, cut_batch, share_of_sequence
from ...unpack import INT8_BIAS, unpack_elements, unpack_pairs
from ..join import LOG2_E, piece_of
from ..kernel import MIN_TILES, NOT_SPECIALISED, OFFSET, SMALLEST_SCALE, cap_logits, log2, reciprocal
from .join import join_runs
from .layouts import copy_layout, product_layout
from .tiles import begin_tile, load_columns, load_rows, load_slots, pages_of


@gluon.jit
def store_pairs(ptr, even, odd, rest, ok, WIDTH: tl.constexpr, REST: tl.constexpr, layout: tl.constexpr):
    """Store accumulators [dims, heads] at ptr [1, heads]: even and odd dims, then the `rest`."""
    dims = gl.arange(0, WIDTH // 2, gl.SliceLayout(1, layout))[:, None]
    gl.store(ptr + 2 * dims, even.to(ptr.dtype.element_ty), mask=ok)
    gl.store(ptr + 2 * dims + 1, odd.to(ptr.dtype.element_ty), mask=ok)
    if REST > 0:
        dims = WIDTH + gl.arange(0, REST, gl.SliceLayout(1, layout))[:, None]
        gl.store(ptr + dims, rest.to(ptr.dtype.element_ty), mask=ok)


@gluon.jit(do_not_specialize=NOT_SPECIALISED)
def attend_runs(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
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
    WIDTH: tl.constexpr,  # bytes of a row before its tail, the largest power of two
    TAIL: tl.constexpr,  # the rest of the row: dims, or its scale's slot
    PAGE: tl.constexpr,  # at least BLOCK_N; less only without a tail
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,  # as `kernel.attend`'s
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BATCH: tl.constexpr,
    UNPACK: tl.constexpr,
    WARPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attend to one chunk of tiles for one KV head; arguments as `kernel.attend`'s."""
    ROW: tl.constexpr = WIDTH + TAIL
    REST: tl.constexpr = D - WIDTH  # dims in the tail
    TILE_UNITS: tl.constexpr = BLOCK_N * ROW // 16
    mma: tl.constexpr = product_layout(WARPS)
    k_layout: tl.constexpr = gl.DotOperandLayout(0, mma, 4)
    q_layout: tl.constexpr = gl.DotOperandLayout(1, mma, 4)
    v_layout: tl.constexpr = gl.DotOperandLayout(0, mma, 2)
    w_layout: tl.constexpr = gl.DotOperandLayout(1, mma, 2)
    token_layout: tl.constexpr = gl.SliceLayout(1, mma)
    head_layout: tl.constexpr = gl.SliceLayout(0, mma)
    page_layout: tl.constexpr = copy_layout(min(PAGE, BLOCK_N) * WIDTH, 16, WARPS)
    scale_page_layout: tl.constexpr = copy_layout(min(PAGE, BLOCK_N), 1, WARPS)

    if DEPENDENT:
        await_last_launch()
    chunk, kv_head = chunk_of_program(num_chunks, KV_HEADS, False)
    batch_rows = gl.arange(0, BATCH, gl.BlockedLayout([1], [32], [WARPS], [0]))
    total, chunks, tile, end_tile, first_seq, last_seq, seq_start = cut_batch(
        batch_rows, chunk, num_chunks, seq_lens_ptr, batch_size, window, BLOCK_N, WINDOW, MIN_TILES
    )
    if chunk >= chunks:
        return
    flat: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_memory = gl.allocate_shared_memory(gl.uint8, [STAGES * TILE_UNITS, 16], flat)
    v_memory = gl.allocate_shared_memory(gl.uint8, [STAGES * TILE_UNITS, 16], flat)
    if SCALES == 2:
        k_scale_memory = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], flat)
        v_scale_memory = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], flat)
        memories = (k_memory, v_memory, k_scale_memory, v_scale_memory)
    else:
        memories = (k_memory, v_memory)
    pointers = (k_ptr, v_ptr, k_scale_ptr, v_scale_ptr)
    strides = (
        stride_k_page,
        stride_k_token,
        stride_k_head,
        stride_v_page,
        stride_v_token,
        stride_v_head,
        stride_scale_page,
        stride_scale_token,
        stride_scale_head,
    )

    logit_scale = scale_log2e
    v_scale = 1.0
    if SCALES == 1:
        logit_scale *= gl.load(k_scale_ptr + kv_head)
        v_scale = gl.load(v_scale_ptr + kv_head)
    slots = gl.arange(0, BLOCK_N, token_layout)
    head = gl.arange(0, GP, head_layout)[None, :]  # query heads of the KV head
    head_ok = head < G
    q_head = gl.arange(0, GP, gl.SliceLayout(0, q_layout))[None, :]
    q_dims = gl.arange(0, WIDTH, gl.SliceLayout(1, q_layout))[:, None]
    for seq in range(first_seq, last_seq + 1):
        seq_len = gl.load(seq_lens_ptr + seq)
        seq_first, seq_tiles, from_tile, to_tile, first_token = share_of_sequence(
            seq_len, seq_start, tile, end_tile, window, BLOCK_N, WINDOW
        )
        table = block_table_ptr + seq * stride_table_row.to(gl.int64)
        last_page = (gl.maximum(seq_len, 1) - 1) // PAGE
        begin = seq_first + from_tile
        end = seq_first + to_tile

        tl.debug_barrier()  # every warp has read the last sequence's tiles
        ahead = begin * BLOCK_N
        for stage in gl.static_range(STAGES):
            page = pages_of(table, ahead, last_page, page_layout, PAGE, BLOCK_N)
            scale_page = pages_of(table, ahead, last_page, scale_page_layout, PAGE, BLOCK_N)
            begin_tile(
                *(memories, stage, pointers, (page, scale_page), ahead, gl.where(begin + stage < end, seq_len, 0)),
                *(first_token, kv_head, strides, PAGE, BLOCK_N, WIDTH, TAIL, SCALES, WINDOW, WARPS),
            )
            ahead += BLOCK_N
        page = pages_of(table, ahead, last_page, page_layout, PAGE, BLOCK_N)
        scale_page = pages_of(table, ahead, last_page, scale_page_layout, PAGE, BLOCK_N)

        q_at = q_ptr + seq * stride_q_batch.to(gl.int64) + (kv_head * G + q_head) * stride_q_head
        q = gl.load(q_at + q_dims, mask=q_head < G, other=0.0).to(gl.float16)
        if REST > 0:
            rest_dims = WIDTH + gl.arange(0, REST, gl.SliceLayout(1, q_layout))[:, None]
            q_rest = gl.load(q_at + rest_dims, mask=q_head < G, other=0.0).to(gl.float16)
        no_logits = gl.zeros([BLOCK_N, GP], gl.float32, mma)
        if FORMAT == 3:  # K comes with a constant added to every element
            bias = INT8_BIAS * gl.sum(q.to(gl.float32), 0)
            if REST > 0:
                bias += INT8_BIAS * gl.sum(q_rest.to(gl.float32), 0)
            no_logits -= gl.convert_layout(bias, head_layout)[None, :]
        peak = gl.full([GP], float("-inf"), gl.float32, head_layout)
        weight_sum = gl.zeros([BLOCK_N, GP], gl.float32, mma)
        even = gl.zeros([WIDTH // 2, GP], gl.float32, mma)
        odd = gl.zeros([WIDTH // 2, GP], gl.float32, mma)
        rest = gl.zeros([max(16, REST), GP], gl.float32, mma)
        slot = begin * 0
        for t in range(begin, end):
            token = t * BLOCK_N
            async_copy.wait_group(STAGES - 1)
            at = slot * TILE_UNITS
            behind = at + WIDTH // 16
            k = load_rows(k_memory.index(at), k_layout, gl.uint8, BLOCK_N, WIDTH, TAIL)
            v = load_columns(v_memory.index(at), v_layout, gl.uint16, BLOCK_N, WIDTH // 2, TAIL // 2)
            if REST > 0:
                k_rest = load_rows(k_memory.index(behind), k_layout, gl.uint8, BLOCK_N, TAIL, WIDTH)
                v_rest = load_columns(v_memory.index(behind), v_layout, gl.uint8, BLOCK_N, TAIL, WIDTH)
            if SCALES == 2:
                k_scales = k_scale_memory.index(slot).load(token_layout)
                v_scales = v_scale_memory.index(slot).load(token_layout)
            elif SCALES == 3:
                k_scales = load_slots(k_memory.index(behind), BLOCK_N, ROW, WARPS)
                v_scales = load_slots(v_memory.index(behind), BLOCK_N, ROW, WARPS)
            begin_tile(  # in its place: what follows needs registers only
                *(memories, slot, pointers, (page, scale_page), ahead, gl.where(t + STAGES < end, seq_len, 0)),
                *(first_token, kv_head, strides, PAGE, BLOCK_N, WIDTH, TAIL, SCALES, WINDOW, WARPS),
            )
            ahead += BLOCK_N
            page = pages_of(table, ahead, last_page, page_layout, PAGE, BLOCK_N)
            scale_page = pages_of(table, ahead, last_page, scale_page_layout, PAGE, BLOCK_N)
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)

            valid = slots < seq_len - token
            if WINDOW:
                valid = valid & (slots >= first_token - token)
            logits = mma_v2(unpack_elements(k, FORMAT, UNPACK), q, no_logits)
            if REST > 0:
                logits = mma_v2(unpack_elements(k_rest, FORMAT, UNPACK), q_rest, logits)
            if SCALES >= 2:
                logits *= (k_scales * logit_scale)[:, None]
                v_scales = gl.maximum(v_scales, SMALLEST_SCALE)
            else:
                logits *= logit_scale
            if SOFT_CAP:
                logits = cap_logits(logits, soft_cap)
            if SCALES >= 2:
                logits += log2(v_scales, UNPACK)[:, None]
            logits = gl.where(valid[:, None], logits, float("-inf"))

            new_peak = gl.maximum(peak, gl.max(logits, 0))
            decay = gl.exp2(peak - new_peak)[None, :]
            peak = new_peak
            weights = gl.exp2(logits - (new_peak - OFFSET)[None, :])
            if SCALES >= 2:
                weight_sum = weight_sum * decay + weights * reciprocal(v_scales, UNPACK)[:, None]
            else:
                weight_sum = weight_sum * decay + weights
            w = gl.convert_layout(weights.to(gl.float16), w_layout)
            v_even, v_odd = unpack_pairs(v, FORMAT, UNPACK)
            even = mma_v2(v_even, w, even * decay)
            odd = mma_v2(v_odd, w, odd * decay)
            if REST > 0:
                v_rest = unpack_elements(v_rest, FORMAT, UNPACK)
                if FORMAT == 3:
                    v_rest -= INT8_BIAS
                rest = mma_v2(v_rest, w, rest * decay)
        async_copy.wait_group(0)

        total_weight = gl.sum(weight_sum, 0)
        lse = peak - OFFSET + tl.log2(total_weight)
        complete = (from_tile == 0) & (to_tile == seq_tiles)
        row = gl.arange(0, GP, head_layout)
        if SINKS:
            sink = gl.load(sink_ptr + kv_head * G + row, mask=row < G, other=0.0) * LOG2_E
            if complete:
                total_weight += gl.exp2(sink - peak + OFFSET)
        inverse = (v_scale / total_weight)[None, :]
        even *= inverse
        odd *= inverse
        rest *= inverse
        out_row = out_ptr + seq * stride_out_batch.to(gl.int64) + kv_head * (G * D)
        if complete:
            store_pairs(out_row + head * D, even, odd, rest, head_ok, WIDTH, REST, mma)
        else:
            first_chunk, pieces, place = piece_of(chunk, seq_start, seq_tiles, total, chunks, BATCH)
            first_row = (place * KV_HEADS + kv_head) * G
            store_pairs(partial_ptr + (first_row + head) * D, even, odd, rest, head_ok, WIDTH, REST, mma)
            gl.store(partial_lse_ptr + (first_row + row), lse, mask=row < G)
            join_runs(
                *(sink_ptr + kv_head * G, out_row, partial_ptr, partial_lse_ptr, arrived_ptr),
                *(chunk - first_chunk, first_chunk, pieces, num_chunks, kv_head, KV_HEADS, G, D, SINKS, WARPS),
            )
        tile = seq_start + seq_tiles
        seq_start = tile
