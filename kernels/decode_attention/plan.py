"""Host side of decode attention: buffers, configuration and launches for one shape."""

import math
from dataclasses import replace

import torch

from ..configs import Config
from ..device import (
    KernelFacts,
    architecture,
    dependent_launch,
    interpreting,
    launches_evenly,
    loaded_facts,
    resident_ctas,
    unpack_mode,
)
from ..paged_cache import PagedKvCache
from .shape import BATCH_BUCKETS, DecodeShape

LEVELS = 4
"""Levels of the join: enough for 8**4 = 4,096 chunks."""


def _check_addresses(cache: PagedKvCache) -> None:
    """ValueError where the kernels, which count in 16 bytes, whole rows of scales and 32 bits, cannot reach a cache."""
    per_unit = 16 // cache.k.element_size()
    for data in (cache.k, cache.v):
        if data.shape[0] * data.stride(0) // per_unit >= 1 << 31:
            raise ValueError("a layer's cache spans 32 GiB or more: its addresses do not fit the kernel's 32 bits")
        if any(stride % per_unit for stride in data.stride()[:3]):
            raise ValueError("rows of K and V must begin at multiples of 16 bytes")
    if cache.scale_granularity in ("token_head", "block"):
        blocks = cache.k_scale.shape[3] if cache.scale_granularity == "block" else 1
        strides = cache.k_scale.stride()
        if strides != cache.v_scale.stride() or any(stride % blocks for stride in strides[:3]):
            raise ValueError("scales of K and V must lie alike, in whole rows")
        if cache.k_scale.shape[0] * strides[0] >= 1 << 31:
            raise ValueError("a layer has 2**31 scales or more: their addresses do not fit the kernel's 32 bits")


class DecodePlan:
    """Decode attention for caches of one shape: choose the cut once, then `run` every layer of a step.

    `cache` is any layer's cache (its tensors are only looked at for shapes, strides and dtypes). `num_chunks` fixes the
    number of chunks a KV head is cut into (default: what fills the GPU once). `window_tokens`, `soft_cap` and `sinks`
    as in the reference. ValueError when the query does not fit the cache, or a layer's cache is 32 GiB or larger.
    """

    def __init__(
        self,
        cache: PagedKvCache,
        *,
        num_q_heads: int,
        q_dtype: torch.dtype = torch.bfloat16,
        softmax_scale: float | None = None,
        soft_cap: float | None = None,
        window_tokens: int | None = None,
        sinks: torch.Tensor | None = None,
        config: Config | None = None,
        num_chunks: int | None = None,
    ) -> None:
        if num_q_heads % cache.num_kv_heads or not 1 <= num_q_heads // cache.num_kv_heads <= 16:
            raise ValueError(
                f"{num_q_heads} query heads over {cache.num_kv_heads} KV heads: groups of 1 to 16 are read"
            )
        self.batch = cache.block_table.shape[0]
        if self.batch > BATCH_BUCKETS[-1]:
            raise ValueError(f"batch of {self.batch} sequences: at most {BATCH_BUCKETS[-1]}")
        _check_addresses(cache)
        self.device = cache.k.device
        self.arch = architecture(self.device)
        self.group = num_q_heads // cache.num_kv_heads
        self.num_q_heads = num_q_heads
        self.q_dtype = q_dtype
        self.sinks = None if sinks is None else sinks.float()
        shape = self._shape = DecodeShape.of(cache, self.group)
        if self.batch == 1:
            shape = replace(shape, one_sequence=True)
        self.config = config or shape.configs(self.arch)[0]
        self.heads_a_program = shape.heads_a_program(self.config)
        self._scalars = (
            (cache.head_dim**-0.5 if softmax_scale is None else softmax_scale) * math.log2(math.e),
            (soft_cap or 0.0) * math.log2(math.e),
            window_tokens or 0,
        )
        self._flags = shape.constants(
            self.config,
            soft_cap=soft_cap is not None,
            window=window_tokens is not None,
            sinks=sinks is not None,
            batch=self.batch,
            unpack=unpack_mode(self.arch),
            exact_dot=interpreting(),
            dependent=dependent_launch(self.arch),
        )
        self._flags |= {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        if self.config.max_registers:
            self._flags["maxnreg"] = self.config.max_registers
        if self._flags["DEPENDENT"]:
            self._flags["launch_pdl"] = True
        if self._flags.get("JOIN_TOGETHER"):  # all programs must run at once
            self._flags["launch_cooperative_grid"] = True
        self._kernel = shape.kernel(self.config)
        self._programs = cache.num_kv_heads // self.heads_a_program
        self.num_chunks = num_chunks or 1
        self._allocate(cache)
        self.facts = self._compile(cache)
        if self._flags["DEPENDENT"] and not launches_evenly(self.facts, self.arch, self.config.ctas_per_sm):
            self._flags |= {"DEPENDENT": False, "launch_pdl": False}
            self.facts = self._compile(cache)
        resident = resident_ctas(self.facts, self.arch, self.device, self.config.ctas_per_sm)
        if num_chunks is None:
            self.num_chunks = max(1, resident // self._programs)
            self._allocate(cache)
        elif self._flags.get("JOIN_TOGETHER") and num_chunks * self._programs > resident:
            raise ValueError(f"{num_chunks} chunks of one sequence: the GPU runs {resident // self._programs} at once")

    def _allocate(self, cache: PagedKvCache) -> None:
        rows = self.num_chunks * 2 * self.num_q_heads
        self._partial = torch.empty(rows, cache.head_dim, device=self.device)
        self._partial_lse = torch.empty(rows, device=self.device)
        counters = LEVELS * self.num_chunks * 2 * cache.num_kv_heads
        self._arrived = torch.zeros(counters, dtype=torch.int32, device=self.device)

    def _compile(self, cache: PagedKvCache) -> KernelFacts | None:
        if interpreting():
            return None
        q = torch.empty(self.batch, self.num_q_heads, cache.head_dim, dtype=self.q_dtype, device=self.device)
        args, flags = self._attend_call(q, cache, q)
        return loaded_facts(self._kernel.warmup(*args, grid=(1,), **flags))

    def _attend_call(self, q: torch.Tensor, cache: PagedKvCache, out: torch.Tensor) -> tuple[tuple, dict]:
        per_unit = 16 // cache.k.element_size()
        strides = []
        for data in (cache.k, cache.v):
            view = cache.by_page_slot_head(data)
            strides += [view.stride(i) // per_unit for i in range(3)]
        k_scale, v_scale, scale_strides = cache.k_scale, cache.v_scale, (0, 0, 0)
        if cache.scale_granularity == "token_head":
            scale_strides = k_scale.transpose(1, 2).stride()
        elif cache.scale_granularity == "block":
            scale_strides = tuple(s // k_scale.shape[-1] for s in k_scale.transpose(1, 2).stride()[:3])
        elif cache.scale_granularity == "token_head_inline":
            k_scale, v_scale = cache.k.view(torch.float32), cache.v.view(torch.float32)
        as_stored = cache.fmt.element_bits == 16 or self.config.whole_runs
        k, v = cache.k, cache.v if as_stored else cache.v.view(torch.uint16)
        if cache.fmt.element_bits == 4:
            k = k.view(torch.uint16)
        if cache.fmt.name == "int4":
            packed = torch.uint32 if cache.head_dim == 64 else torch.uint64
            k_scale, v_scale = k_scale.view(packed), v_scale.view(packed)
        args = (
            *(q, k, v, k_scale, v_scale, q if self.sinks is None else self.sinks),
            *(cache.block_table, cache.seq_lens, out, self._partial, self._partial_lse, self._arrived),
            *self._scalars,
            *(self.batch, self.num_chunks, q.stride(0), q.stride(1)),
            *strides,
            *scale_strides,
            *(cache.block_table.stride(0), out.stride(0)),
            *([cache.global_scales] if cache.global_scales is not None else []),
        )
        return args, self._flags

    def run(self, q: torch.Tensor, cache: PagedKvCache, out: torch.Tensor | None = None) -> torch.Tensor:
        """Attention output `[batch, q_heads, head_dim]` for `q` of that shape; one launch, no synchronisation.

        Lengths must be at least 1. `out`, when given, is contiguous in its last two dimensions.
        """
        if DecodeShape.of(cache, self.group) != self._shape:
            raise ValueError("this cache is not of the shape the plan was made for")
        if q.shape[0] != self.batch or cache.block_table.shape[0] != self.batch:
            raise ValueError(f"the plan is for a batch of {self.batch} sequences")
        _check_addresses(cache)
        if out is None:
            out = torch.empty_like(q)
        args, flags = self._attend_call(q, cache, out)
        kernel = self._kernel[(self.num_chunks * self._programs,)]
        try:
            kernel(*args, **flags)
        except RuntimeError as error:
            if "cooperative launch" not in str(error):
                raise
            flags |= {"JOIN_TOGETHER": 0, "launch_cooperative_grid": False}  # fewer run at once than reckoned
            kernel(*args, **flags)
        return out


def decode_attention(q: torch.Tensor, cache: PagedKvCache, **options: object) -> torch.Tensor:
    """`DecodePlan(cache, num_q_heads=..., **options).run(q, cache)` for a single call."""
    return DecodePlan(cache, num_q_heads=q.shape[1], q_dtype=q.dtype, **options).run(q, cache)


__all__ = ["BATCH_BUCKETS", "DecodePlan", "decode_attention"]
