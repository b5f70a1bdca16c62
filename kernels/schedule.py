"""Device functions: how the decode work of a batch is cut into equal chunks.

Each sequence is a run of tiles of BLOCK_N tokens; the runs stand one after another, in batch order, and the whole line
is cut into `num_chunks` chunks that differ by at most one tile. A chunk may end inside a sequence (the pieces are
combined afterwards) and may hold several sequences. So every program reads the same number of bytes whatever the
lengths, and equal lengths with a multiple of the batch size for `num_chunks` give cuts at sequence ends.
"""

import triton
import triton.language as tl

from .device import GLUON

if GLUON:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def await_last_launch():
    """Let the next launch come up, and wait until the last one has ended and all it wrote is seen.

    For kernels launched while the last one still ends: its programs leave and these take their places at once. Nothing
    may be read before. (CUDA C++ Programming Guide, programmatic dependent launch.)
    """
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def sequence_tiles(seq_len, window, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """(first tile, tiles) that a decode step reads of a sequence; at least one tile."""
    first = seq_len * 0
    if WINDOW:
        first = tl.maximum(seq_len - window, 0) // BLOCK_N
    return first, tl.maximum(tl.cdiv(seq_len, BLOCK_N) - first, 1)


@triton.jit
def batch_tiles(rows, seq_lens_ptr, batch_size, window, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Tiles of each sequence of the batch, for `rows` from 0 to at least `batch_size`; zero past it."""
    seq_lens = tl.load(seq_lens_ptr + rows, mask=rows < batch_size, other=0)
    tiles = sequence_tiles(seq_lens, window, BLOCK_N, WINDOW)[1]
    return tl.where(rows < batch_size, tiles, 0)


@triton.jit
def used_chunks(total_tiles, batch_size, num_chunks, MIN_TILES: tl.constexpr):
    """Chunks really cut: none shorter than MIN_TILES, and a multiple of the batch size when that costs under 1/8."""
    used = tl.maximum(tl.minimum(num_chunks, total_tiles // MIN_TILES), 1)
    aligned = used // batch_size * batch_size
    return tl.where(aligned * 8 >= used * 7, aligned, used)


@triton.jit
def chunk_start(chunk, total_tiles, chunks):
    """First tile of `chunk` on the line of `total_tiles`."""
    size = total_tiles // chunks  # chunk * total_tiles // chunks, in 32 bits
    return chunk * size + chunk * (total_tiles - chunks * size) // chunks


@triton.jit
def chunk_of_tile(tile, total_tiles, chunks):
    """The chunk that holds `tile`."""
    return (((tile + 1).to(tl.int64) * chunks - 1) // total_tiles).to(tl.int32)


@triton.jit
def cut_batch(
    rows,
    chunk,
    num_chunks,
    seq_lens_ptr,
    batch_size,
    window,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Where `chunk` lies: (tiles of the batch, chunks used, its first tile, its end, its first and last sequence, and
    the tile at which that first one starts). A chunk past those used has nothing to do. `rows` as for
    `batch_tiles`: one row says that the batch is of one, which leaves less to reckon.
    """
    ONE: tl.constexpr = rows.shape[0] == 1
    if ONE:
        total = sequence_tiles(tl.load(seq_lens_ptr), window, BLOCK_N, WINDOW)[1]
        batch_size = 1
    else:
        tiles = batch_tiles(rows, seq_lens_ptr, batch_size, window, BLOCK_N, WINDOW)
        total = tl.sum(tiles, 0)
    chunks = used_chunks(total, batch_size, num_chunks, MIN_TILES if BLOCK_N < 128 else 1)
    tile = chunk_start(chunk, total, chunks)
    end_tile = chunk_start(chunk + 1, total, chunks)
    first_seq = total * 0
    last_seq = first_seq
    seq_start = first_seq
    if not ONE:
        ends = tl.cumsum(tiles, 0)
        first_seq = tl.sum((ends <= tile).to(tl.int32), 0)
        last_seq = tl.sum((ends < end_tile).to(tl.int32), 0)
        seq_start = tl.sum(tl.where(rows < first_seq, tiles, 0), 0)
    return total, chunks, tile, end_tile, first_seq, last_seq, seq_start


@triton.jit
def chunk_of_program(num_chunks, PARTS: tl.constexpr, PARTS_TOGETHER: tl.constexpr):
    """(chunk, part) of this program, `PARTS` KV heads, say: neighbours take a chunk's parts, or a part's chunks."""
    if PARTS_TOGETHER:
        part = tl.program_id(0) % PARTS
        chunk = tl.program_id(0) // PARTS
    else:
        part = tl.program_id(0) // num_chunks
        chunk = tl.program_id(0) % num_chunks
    return chunk, part


@triton.jit
def share_of_sequence(seq_len, seq_start, tile, end_tile, window, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """What a chunk from `tile` to `end_tile` holds of the sequence that starts at tile `seq_start` of the line.

    (First tile that is read of the sequence, tiles that are, of these the chunk's first and its end, first token that
    counts.)
    """
    seq_first, seq_tiles = sequence_tiles(seq_len, window, BLOCK_N, WINDOW)
    from_tile = tile - seq_start
    to_tile = tl.minimum(end_tile - seq_start, seq_tiles)
    first_token = seq_len * 0
    if WINDOW:
        first_token = tl.maximum(seq_len - window, 0)
    return seq_first, seq_tiles, from_tile, to_tile, first_token
