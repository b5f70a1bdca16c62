"""Latent decode on the GPU at hand: gate against the reference, then time."""

from dataclasses import asdict, dataclass

import torch

from ..latent_cache import SOFTMAX_SCALE, random_latent_caches
from ..mla_decode import MlaPlan
from ..reference.decode_attention import relative_error
from ..reference.mla_decode import mla_decode as reference
from .decode_attention import graph_repeats
from .timing import time_calls

GATE_LENGTHS = (3000, 17, 2049, 64, 1)
TOLERANCE = 8e-3


@dataclass(frozen=True)
class MlaCell:
    """One thing to time: a batch of lengths, a format, the query heads of one rank."""

    seq_lens: tuple[int, ...]
    kv_dtype: str = "bf16"
    num_heads: int = 16
    block_size_tokens: int = 64


def _build(cell: MlaCell, seq_lens: tuple[int, ...], layers: int, device: str, seed: int):
    caches = random_latent_caches(
        list(seq_lens),
        kv_dtype=cell.kv_dtype,
        block_size_tokens=cell.block_size_tokens,
        num_layers=layers,
        device=device,
        seed=seed,
    )
    q = torch.randn(len(seq_lens), cell.num_heads, 576, device=device).bfloat16()
    return MlaPlan(caches[0], num_heads=cell.num_heads, softmax_scale=SOFTMAX_SCALE), caches, q


def gate(cell: MlaCell, *, device: str = "cuda", seed: int = 0, seq_lens: tuple[int, ...] = GATE_LENGTHS) -> dict:
    """Compare the kernel with the float64 reference: a record with error and verdict."""
    plan, caches, q = _build(cell, seq_lens, 1, device, seed)
    out = torch.full((*q.shape[:2], 512), float("nan"), dtype=q.dtype, device=q.device)
    plan.run(q, caches[0], out)
    error = relative_error(out, reference(q, caches[0], softmax_scale=SOFTMAX_SCALE))
    return {
        "kind": "gate",
        "kernel": "mla_decode",
        **asdict(cell),
        "error": error,
        "tolerance": TOLERANCE,
        "passed": error <= TOLERANCE,
    }


def measure(cell: MlaCell, *, layers: int = 2, device: str = "cuda", samples: int = 30, seed: int = 0) -> dict:
    """Time `cell` over `layers` disjoint caches in one graph: a record in SI units."""
    plan, caches, q = _build(cell, cell.seq_lens, layers, device, seed)
    outs = [torch.empty(*q.shape[:2], 512, dtype=q.dtype, device=q.device) for _ in caches]
    calls = [lambda c=c, o=o: plan.run(q, c, o) for c, o in zip(caches, outs, strict=True)]
    read = caches[0].read_bytes()
    facts = asdict(plan.facts) if plan.facts else {}
    timing = time_calls(calls * graph_repeats(read * layers, device), device=device, samples=samples)
    return {
        "kind": "mla_decode",
        **asdict(cell),
        "config": asdict(plan.config),
        "num_chunks": plan.num_chunks,
        "layers": layers,
        **timing.record(read),
        **{name: facts.get(name) for name in ("registers", "spills", "shared_bytes")},
    }
