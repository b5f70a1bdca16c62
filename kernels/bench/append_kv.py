"""Quantise-and-append on the GPU at hand: gate against the reference bit for bit, then time."""

from dataclasses import asdict, dataclass

import torch

from ..append_kv import append_kv
from ..paged_cache import random_caches
from ..reference.append_kv import append_kv as reference
from .timing import time_calls


@dataclass(frozen=True)
class AppendCell:
    """New tokens a step (the batch, at decode) into a cache of one kind."""

    num_tokens: int
    kv_dtype: str = "fp8_e4m3"
    scale_granularity: str = "token_head"
    layout: str = "HND"
    block_size_tokens: int = 64
    num_kv_heads: int = 8
    head_dim: int = 128


def _caches(cell: AppendCell, layers: int, device: str):
    return random_caches(
        [cell.block_size_tokens * 4] * cell.num_tokens,
        kv_dtype=cell.kv_dtype,
        scale_granularity=cell.scale_granularity,
        layout=cell.layout,
        block_size_tokens=cell.block_size_tokens,
        num_kv_heads=cell.num_kv_heads,
        head_dim=cell.head_dim,
        num_layers=layers,
        device=device,
    )


def _inputs(cell: AppendCell, device: str):
    shape = (cell.num_tokens, cell.num_kv_heads, cell.head_dim)
    k, v = (torch.randn(shape, device=device).bfloat16() for _ in "kv")
    slots = torch.randperm(cell.num_tokens * 4 * cell.block_size_tokens, device=device)[: cell.num_tokens]
    return k, v, slots


def gate(cell: AppendCell, *, device: str = "cuda") -> dict:
    """Compare the kernel's cache with the reference's: a record with the number of differing bytes and the verdict."""
    k, v, slots = _inputs(cell, device)
    (got,), (expected,) = _caches(cell, 1, device), _caches(cell, 1, device)
    append_kv(k, v, got, slots)
    reference(k, v, expected, slots)
    names = ("k", "v", "k_scale", "v_scale")
    pairs = [(getattr(got, n).view(torch.uint8), getattr(expected, n).view(torch.uint8)) for n in names]
    differing = sum(int((a != b).sum()) for a, b in pairs)
    return {
        "kind": "gate",
        "kernel": "append_kv",
        **asdict(cell),
        "differing_bytes": differing,
        "passed": differing == 0,
    }


def measure(cell: AppendCell, *, layers: int = 8, device: str = "cuda", samples: int = 30) -> dict:
    """Seconds of one layer's append, over `layers` caches in one graph."""
    k, v, slots = _inputs(cell, device)
    caches = _caches(cell, layers, device)
    timing = time_calls([lambda c=c: append_kv(k, v, c, slots) for c in caches], device=device, samples=samples)
    return {
        "kind": "append_kv",
        **asdict(cell),
        "layers": layers,
        **timing.record(),
    }
