"""torch's scaled_dot_product_attention, whatever backend it picks, on a dense cache of the same size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvplan.measure.plan import Cell


def dense_calls(
    cell: Cell, *, device: str, dtype: torch.dtype, seed: int
) -> tuple[list[Callable[[], torch.Tensor]], int]:
    """One call a layer over disjoint dense caches ``[batch, kv_heads, tokens, head_dim]``, and the bytes one reads."""
    shape = cell.family.shape
    generator = torch.Generator(device).manual_seed(seed)
    size = (cell.batch_size, shape.num_kv_heads, cell.context_tokens, shape.head_dim)
    q = torch.randn(cell.batch_size, shape.num_q_heads, 1, shape.head_dim, device=device, generator=generator).to(dtype)

    def call(k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def filled() -> torch.Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(generator=generator)

    pairs = [(filled(), filled()) for _ in range(cell.layers)]
    return [call(k, v) for k, v in pairs], 2 * pairs[0][0].numel() * pairs[0][0].element_size()
