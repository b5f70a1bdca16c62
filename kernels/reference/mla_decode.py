"""Latent-attention decode, written as its definition."""

import torch

from ..formats import LATENT_DIM
from ..latent_cache import LatentCache, decode_rows


def mla_decode(
    q: torch.Tensor, cache: LatentCache, *, softmax_scale: float, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Output `[batch, heads, 512]` in `dtype` for absorbed queries `[batch, heads, 576]` (latent, then rotary)."""
    out = torch.empty(*q.shape[:2], LATENT_DIM, dtype=dtype, device=q.device)
    for seq, length in enumerate(cache.seq_lens.tolist()):
        tokens = torch.arange(length, device=q.device)
        page = cache.block_table[seq, tokens // cache.block_size_tokens].long()
        stored = cache.data[page, tokens % cache.block_size_tokens].contiguous()
        keys = decode_rows(stored, cache.kv_dtype, cache.scale, dtype)
        weights = torch.softmax(q[seq].to(dtype) @ keys.T * softmax_scale, dim=-1)
        out[seq] = weights @ keys[:, :LATENT_DIM]
    return out
