"""One layer's paged cache of latent attention (DeepSeek-style MLA): 512 latent and 64 rotary numbers a token.

Formats: `bf16` (576 elements a row), `fp8_e4m3` (576 bytes, one scale for the cache), and `fp8_ds_mla`, the 656-byte
row of DeepSeek's and vLLM's sparse MLA: 512 e4m3 bytes, four FP32 scales (one for each 128 latent numbers), 64 bf16
rotary numbers.
"""

from dataclasses import dataclass, replace

import torch

from .formats import LATENT_DIM, LATENT_ROW_BYTES, ROPE_DIM
from .paged_cache import block_table

SCALE_BLOCK = 128
E4M3_MAX = 448.0
SOFTMAX_SCALE = 192**-0.5
"""DeepSeek-V2 and V3 scale logits by the head dim before absorption, 128 + 64."""


@dataclass(frozen=True)
class LatentCache:
    """`data` `[pages, slots, row]`, bf16 or uint8; `scale` FP32 `[1]` (of `fp8_e4m3`, else 1)."""

    kv_dtype: str
    block_size_tokens: int
    data: torch.Tensor
    scale: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    def read_bytes(self) -> int:
        """Bytes that one decode step has to read (int; synchronises)."""
        return int(self.seq_lens.long().sum()) * LATENT_ROW_BYTES[self.kv_dtype]


def encode_rows(rows: torch.Tensor, kv_dtype: str, scale: torch.Tensor) -> torch.Tensor:
    """Rows `[tokens, 576]` (float) as stored: bf16, or uint8 bytes. `scale`: the cache's, of `fp8_e4m3`."""
    if kv_dtype == "bf16":
        return rows.bfloat16()
    if kv_dtype == "fp8_e4m3":
        return (rows.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    blocks = rows[:, :LATENT_DIM].float().view(-1, LATENT_DIM // SCALE_BLOCK, SCALE_BLOCK)
    largest = blocks.abs().amax(-1)
    scales = (largest / torch.full_like(largest, E4M3_MAX)).clamp_min(1e-12)
    codes = (blocks / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    rope = rows[:, LATENT_DIM:].bfloat16().contiguous()
    return torch.cat([codes.view(torch.uint8).flatten(1), scales.view(torch.uint8), rope.view(torch.uint8)], dim=1)


def decode_rows(stored: torch.Tensor, kv_dtype: str, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values `[tokens, 576]` of stored rows in `dtype`."""
    if kv_dtype == "bf16":
        return stored.to(dtype)
    if kv_dtype == "fp8_e4m3":
        return stored.view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)
    codes = (
        stored[:, :LATENT_DIM]
        .contiguous()
        .view(torch.float8_e4m3fn)
        .to(dtype)
        .view(-1, LATENT_DIM // SCALE_BLOCK, SCALE_BLOCK)
    )
    scales = stored[:, LATENT_DIM : LATENT_DIM + 16].contiguous().view(torch.float32).to(dtype)
    rope = stored[:, LATENT_DIM + 16 :].contiguous().view(torch.bfloat16).to(dtype)
    return torch.cat([(codes * scales[..., None]).flatten(1), rope], dim=1)


def random_latent_caches(
    seq_lens: list[int],
    *,
    kv_dtype: str,
    block_size_tokens: int = 64,
    num_layers: int = 1,
    device: str = "cuda",
    seed: int = 0,
    spare: float | None = None,
) -> list[LatentCache]:
    """Caches with disjoint random pages, one block table. `spare` fills slots no token uses (fp8: NaN codes)."""
    if kv_dtype not in LATENT_ROW_BYTES:
        raise ValueError(f"latent KV format {kv_dtype!r} is not one of {', '.join(LATENT_ROW_BYTES)}")
    generator = torch.Generator(device).manual_seed(seed)
    table = block_table(seq_lens, block_size_tokens, device, seed)
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    pages = sum(-(-n // block_size_tokens) for n in seq_lens)
    scale = torch.full((1,), 1 / 64 if kv_dtype == "fp8_e4m3" else 1.0, device=device)
    caches = []
    for _ in range(num_layers):
        dtype = torch.bfloat16 if kv_dtype == "bf16" else torch.uint8
        row = LATENT_ROW_BYTES[kv_dtype] // dtype.itemsize
        data = torch.empty(pages, block_size_tokens, row, dtype=dtype, device=device)
        for part in data.split(1024):
            rows = torch.randn(part[..., 0].numel(), LATENT_DIM + ROPE_DIM, device=device, generator=generator)
            part.copy_(encode_rows(rows, kv_dtype, scale).view(part.shape))
        caches.append(LatentCache(kv_dtype, block_size_tokens, data, scale, table, lengths))
    return caches if spare is None else [_with_spare(c, spare) for c in caches]


def latent_cache_from_rows(rows: torch.Tensor, *, kv_dtype: str, block_size_tokens: int = 64) -> LatentCache:
    """One sequence's rows `[tokens, 576]` (float), quantised, in a cache of its own; slots no token uses hold zeros."""
    device, tokens = str(rows.device), torch.arange(len(rows), device=rows.device)
    table = block_table([len(rows)], block_size_tokens, device)
    scale = rows.abs().max().float().view(1) / E4M3_MAX if kv_dtype == "fp8_e4m3" else torch.ones(1, device=device)
    stored = encode_rows(rows, kv_dtype, scale)
    data = stored.new_zeros(table.shape[1], block_size_tokens, stored.shape[1])
    data[table[0, tokens // block_size_tokens].long(), tokens % block_size_tokens] = stored
    length = torch.tensor([len(rows)], dtype=torch.int32, device=device)
    return LatentCache(kv_dtype, block_size_tokens, data, scale, table, length)


def _with_spare(cache: LatentCache, spare: float) -> LatentCache:
    data = cache.data.clone()
    for row, length in enumerate(cache.seq_lens.tolist()):
        if used := length % cache.block_size_tokens:
            page = int(cache.block_table[row, length // cache.block_size_tokens])
            data[page, used:] = spare if cache.kv_dtype == "bf16" else 0x7F
    return replace(cache, data=data)
