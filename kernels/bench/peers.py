"""Other implementations of paged decode attention, on the very cache our kernel reads, in the same run.

`flashinfer`: XQA, TensorRT-LLM's decode kernel as FlashInfer packages it (compiled on first use, needs nvcc).
`vllm`: FlashAttention-3 as vLLM ships it; for FP8 caches it wants the query in e4m3 too, converted here before timing.
Neither is needed for anything else; what is not installed says so. bf16, and e4m3 with no scale or one for the cache.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from ..paged_cache import PagedKvCache
from ..reference.decode_attention import decode_attention as reference
from ..reference.decode_attention import relative_error
from .decode_attention import DecodeCell, build, graph_repeats
from .timing import time_calls

Call = Callable[[], object]
XQA_BLOCKS = (16, 32, 64, 128)
GATE_LENGTHS = (3000, 129, 4096, 640, 1, 1023)
MOST_ERROR = 0.2
"""Relative error from which a peer is not attention; rounding queries and weights to e4m3 costs up to 0.07."""


def _stored(cache: PagedKvCache) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as `[pages, slots, heads, dim]` views of their element dtype."""
    views = (cache.by_page_slot_head(x) for x in (cache.k, cache.v))
    return tuple(x if cache.fmt.element_bits == 16 else x.view(torch.float8_e4m3fn) for x in views)


class Xqa:
    """FlashInfer's `xqa`."""

    label = "FlashInfer XQA"

    def __init__(self, device: torch.device | str) -> None:
        import flashinfer

        self.version = f"flashinfer {flashinfer.__version__}"
        self._xqa = flashinfer.xqa
        self._workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
        self._semaphores = torch.zeros(8 << 20, dtype=torch.uint8, device=device).view(torch.uint32)

    def call(self, q: torch.Tensor, cache: PagedKvCache, out: torch.Tensor) -> Call:
        """A launch of `q` `[batch, heads, dim]` over `cache` into `out`."""
        k, v = _stored(cache)
        scale = float(cache.k_scale.flatten()[0]) if cache.scale_granularity == "tensor" else 1.0
        lengths = cache.seq_lens.view(torch.uint32).unsqueeze(1)
        return lambda: self._xqa(
            q.unsqueeze(1),
            k,
            v,
            cache.block_table,
            lengths,
            out.unsqueeze(1),
            self._workspace,
            self._semaphores,
            cache.num_kv_heads,
            cache.block_size_tokens,
            q_scale=1.0,
            kv_scale=scale,
        )


class FlashAttention3:
    """vLLM's `flash_attn_varlen_func` with `fa_version=3`."""

    label = "vLLM FlashAttention-3"

    def __init__(self, device: torch.device | str) -> None:
        from vllm.vllm_flash_attn import flash_attn_interface

        if not flash_attn_interface.FA3_AVAILABLE:
            raise ImportError(f"vLLM's FlashAttention-3: {flash_attn_interface.FA3_UNAVAILABLE_REASON}")
        self.version = "vllm's _vllm_fa3_C"
        self._interface = flash_attn_interface

    def call(self, q: torch.Tensor, cache: PagedKvCache, out: torch.Tensor) -> Call:
        """A launch of `q` `[batch, heads, dim]` over `cache` into `out`."""
        k, v = _stored(cache)
        batch, num_q_heads, head_dim = q.shape
        longest = int(cache.seq_lens.max())
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        scales = {}
        if cache.fmt.element_bits == 8:
            q = q.to(torch.float8_e4m3fn)
            one = torch.ones(batch, cache.num_kv_heads, device=q.device)
            scale = cache.k_scale.flatten()[0] if cache.scale_granularity == "tensor" else 1.0
            scales = {"q_descale": one, "k_descale": one * scale, "v_descale": one * scale}
        schedule = self._interface.get_scheduler_metadata(
            batch,
            1,
            longest,
            num_q_heads,
            cache.num_kv_heads,
            head_dim,
            cache.seq_lens,
            qkv_dtype=q.dtype,
            cu_seqlens_q=starts,
            page_size=cache.block_size_tokens,
            causal=True,
        )
        return lambda: self._interface.flash_attn_varlen_func(
            q,
            k,
            v,
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=longest,
            seqused_k=cache.seq_lens,
            block_table=cache.block_table,
            softmax_scale=head_dim**-0.5,
            causal=True,
            out=out,
            scheduler_metadata=schedule,
            fa_version=3,
            **scales,
        )


PEERS = {"flashinfer": Xqa, "vllm": FlashAttention3}
PACKAGES = {"flashinfer": ("flashinfer", "flashinfer-python"), "vllm": ("vllm", "vllm")}


def missing(name: str) -> str | None:
    """Why the peer cannot be tried here: not installed; None when it can."""
    module, package = PACKAGES[name]
    return None if importlib.util.find_spec(module) else f"{module} is not installed (pip install {package})"


def unsupported(name: str, cell: DecodeCell) -> str | None:
    """Why the peer does not read such a cell; None when it does."""
    if (cell.kv_dtype, cell.scale_granularity) not in (("bf16", "none"), ("fp8_e4m3", "none"), ("fp8_e4m3", "tensor")):
        return f"{name} reads bf16, and e4m3 with one scale, not {cell.kv_dtype} {cell.scale_granularity}"
    if name == "flashinfer" and cell.block_size_tokens not in XQA_BLOCKS:
        return f"XQA reads blocks of {', '.join(map(str, XQA_BLOCKS))} tokens"
    return None


def measure(
    name: str, cell: DecodeCell, *, layers: int = 2, device: str = "cuda", samples: int = 30, seed: int = 0
) -> dict:
    """Time peer `name` on `cell` as `decode_attention.measure` times ours; `error` is against the float64 reference.

    A peer may quantise more than the cache (FlashAttention-3: the query and the weights), so `error` is reported.
    ImportError when it does not load; ValueError when it does not read such a cell; RuntimeError when what it computes
    is not attention of this cache.
    """
    if reason := missing(name):
        raise ImportError(reason)
    if reason := unsupported(name, cell):
        raise ValueError(reason)
    peer = PEERS[name](device)
    small = replace(cell, seq_lens=GATE_LENGTHS)
    _, (cache,), q, _ = build(small, small.seq_lens, 1, device, seed)
    out = torch.full_like(q, float("nan"))
    peer.call(q, cache, out)()
    error = relative_error(out, reference(q, cache))
    if not error < MOST_ERROR:
        raise RuntimeError(f"{peer.label}: its output is off by {error:.1e}; nothing of it was timed")
    _, caches, q, _ = build(cell, cell.seq_lens, layers, device, seed)
    read = caches[0].read_bytes()
    calls = [peer.call(q, c, torch.empty_like(q)) for c in caches] * graph_repeats(read * layers, device)
    timing = time_calls(calls, device=device, samples=samples)
    return {
        "kind": "peer",
        "name": name,
        "label": peer.label,
        "version": peer.version,
        **asdict(cell),
        "layers": layers,
        **timing.record(read),
        "error": error,
    }
