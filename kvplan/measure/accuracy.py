"""What a KV format costs in accuracy: attention over a quantised cache against the same over the values themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from kvplan.kernels.latent_cache import SOFTMAX_SCALE, LatentCache, latent_cache_from_rows
from kvplan.kernels.paged_cache import PagedKvCache, cache_from_dense
from kvplan.measure.family import Family

Cache: TypeAlias = PagedKvCache | LatentCache
Attend = Callable[[torch.Tensor, Cache, int | None], torch.Tensor]


def format_error(family: Family, attend: Attend, *, device: str, tokens: int, q_dtype: torch.dtype, seed: int) -> float:
    """Relative L2 error of ``attend`` on a cache of ``tokens`` standard normal keys and values, against float64.

    The reference attends over the unquantised values: quantisation, the kernel and its output dtype all count.
    """
    shape = family.shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, shape.head_dim, device=device, generator=generator)

    k = normal(tokens, shape.num_kv_heads)
    cache: Cache
    if shape.latent_dim:
        v, scale = k[..., : shape.latent_dim], SOFTMAX_SCALE
        cache = latent_cache_from_rows(k[:, 0], kv_dtype=family.element, block_size_tokens=64)
    else:
        v, scale = normal(tokens, shape.num_kv_heads), shape.head_dim**-0.5
        cache = cache_from_dense(
            [k], [v], kv_dtype=family.element, scale_granularity=family.scale_granularity, block_size_tokens=64
        )
    q = normal(1, shape.num_q_heads).to(q_dtype)
    got = attend(q, cache, None).double()
    grouped = q[0].double().view(shape.num_kv_heads, shape.group_size, shape.head_dim)
    logits = torch.einsum("hgd,nhd->hgn", grouped, k.double()) * scale
    exact = torch.einsum("hgn,nhd->hgd", torch.softmax(logits, dim=-1), v.double()).reshape(got.shape)
    return float((got - exact).norm() / exact.norm())
