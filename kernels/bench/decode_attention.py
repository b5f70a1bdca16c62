"""Decode attention on the GPU at hand: gate a shape family against the reference, then time cells of it."""

from dataclasses import asdict, dataclass, field

import torch

from ..configs import Config
from ..decode_attention import DecodePlan
from ..decode_attention.shape import DecodeShape
from ..formats import kv_format
from ..paged_cache import PagedKvCache, random_caches
from ..reference.decode_attention import decode_attention as reference
from ..reference.decode_attention import relative_error
from .timing import time_calls

GATE_LENGTHS = (3000, 17, 4097, 64, 1, 1023)
GATE_LENGTHS_ALONE = (40001, 1023, 1)
"""Batches of one: their pieces are joined in another way."""
TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 2e-3}
"""Largest relative error of a row allowed by `gate`, per output dtype: its rounding and that of 16-bit weights."""


LONG_REPLAY_BYTES = 1 << 32


@dataclass(frozen=True)
class DecodeCell:
    """One thing to time: a batch of lengths over caches of one kind."""

    seq_lens: tuple[int, ...]
    kv_dtype: str = "fp8_e4m3"
    scale_granularity: str = "tensor"
    layout: str = "HND"
    block_size_tokens: int = 64
    num_kv_heads: int = 8
    group_size: int = 8
    head_dim: int = 128
    window_tokens: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    config: Config | None = None
    num_chunks: int | None = field(default=None)

    @property
    def shape(self) -> DecodeShape:
        """What a plan for it is made for."""
        return DecodeShape(
            kv_format(self.kv_dtype),
            self.scale_granularity,
            self.layout,
            self.block_size_tokens,
            self.num_kv_heads,
            self.head_dim,
            self.group_size,
            one_sequence=len(self.seq_lens) == 1,
        )

    @property
    def num_q_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group_size

    @property
    def q_dtype(self) -> torch.dtype:
        """Queries and outputs are float16 beside a float16 cache, else bfloat16."""
        return torch.float16 if self.kv_dtype == "fp16" else torch.bfloat16


def build(cell: DecodeCell, seq_lens: tuple[int, ...], layers: int, device: str, seed: int):
    """(plan, caches, queries, sinks) for `cell`'s family at `seq_lens`: `layers` disjoint random caches.

    Memory is handed back to the driver first: carved out of a larger freed block, a cache of 1 GB has read 12% slower.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    caches = random_caches(
        list(seq_lens),
        kv_dtype=cell.kv_dtype,
        scale_granularity=cell.scale_granularity,
        layout=cell.layout,
        block_size_tokens=cell.block_size_tokens,
        num_kv_heads=cell.num_kv_heads,
        head_dim=cell.head_dim,
        num_layers=layers,
        device=device,
        seed=seed,
    )
    q = torch.randn(len(seq_lens), cell.num_q_heads, cell.head_dim, device=device).to(cell.q_dtype)
    sinks = torch.randn(cell.num_q_heads, device=device) if cell.sinks else None
    plan = DecodePlan(
        caches[0],
        num_q_heads=cell.num_q_heads,
        q_dtype=cell.q_dtype,
        window_tokens=cell.window_tokens,
        soft_cap=cell.soft_cap,
        sinks=sinks,
        config=cell.config,
        num_chunks=cell.num_chunks,
    )
    return plan, caches, q, sinks


def gate(cell: DecodeCell, *, device: str = "cuda", seed: int = 0, seq_lens: tuple[int, ...] | None = None) -> dict:
    """Compare the kernel with the float64 reference on `cell`'s family: a record with error and verdict.

    In one batch of `seq_lens` (default: awkward ones), or where the cell is of one sequence in batches of one.
    """
    if cell.shape.one_sequence:
        batches = [(n,) for n in seq_lens or GATE_LENGTHS_ALONE]
    else:
        batches = [seq_lens or GATE_LENGTHS]
    errors = []
    for lengths in batches:
        plan, caches, q, sinks = build(cell, lengths, 1, device, seed)
        for _ in range(2):  # the second finds the counters as the first left them
            out = torch.full_like(q, float("nan"))
            plan.run(q, caches[0], out)
        expected = reference(q, caches[0], window_tokens=cell.window_tokens, soft_cap=cell.soft_cap, sinks=sinks)
        errors.append(relative_error(out, expected))
    error = max(errors)
    limit = TOLERANCES[cell.q_dtype]
    return {"kind": "gate", **asdict(cell), "error": error, "tolerance": limit, "passed": error <= limit}


def graph_repeats(read_bytes: int, device: str) -> int:
    """How often the layers stand in a GPU's graph, so that a replay far outlasts its launch: about a millisecond."""
    if torch.device(device).type != "cuda":
        return 1
    return max(1, min(32, LONG_REPLAY_BYTES // max(read_bytes, LONG_REPLAY_BYTES // 32)))


def measure(
    cell: DecodeCell, *, layers: int = 2, device: str = "cuda", samples: int = 30, warmup: int = 8, seed: int = 0
) -> dict:
    """Time `cell` over `layers` disjoint caches in one graph: a record in SI units with the compiled kernel's facts."""
    plan, caches, q, _ = build(cell, cell.seq_lens, layers, device, seed)
    outs = [torch.empty_like(q) for _ in caches]

    def call(cache: PagedKvCache, out: torch.Tensor):
        return lambda: plan.run(q, cache, out)

    read = caches[0].read_bytes(cell.window_tokens)
    calls = [call(c, o) for c, o in zip(caches, outs, strict=True)] * graph_repeats(read * layers, device)
    timing = time_calls(calls, device=device, samples=samples, warmup=warmup)
    facts = asdict(plan.facts) if plan.facts else {}
    return {
        "kind": "decode_attention",
        **asdict(cell),
        "config": asdict(plan.config),
        "num_chunks": plan.num_chunks,
        "layers": layers,
        "graph_repeats": graph_repeats(read * layers, device),
        **timing.record(read),
        "registers": facts.get("registers"),
        "spills": facts.get("spills"),
        "shared_bytes": facts.get("shared_bytes"),
        "element_bits": kv_format(cell.kv_dtype).element_bits,
    }
