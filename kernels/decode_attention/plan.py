"""Host side of decode attention: buffers, configuration and launches for one shape."""

import math

import torch

from ..configs import Config, decode_configs, padded_head_dim
from ..device import KernelFacts, architecture, interpreting, loaded_facts, resident_ctas, unpack_mode
from ..paged_cache import PagedKvCache
from .join import NARROW
from .kernel import attend
from .kernel_int4 import attend_int4
from .kernel_nvfp4 import attend_nvfp4

BATCH_BUCKETS = (1, 32, 128, 1024, 8192)
SCALE_CODES = {"none": 0, "tensor": 1, "head": 1, "token_head": 2, "token_head_inline": 3, "block": 0}
LEVELS = 4
"""Levels of the join: enough for 16**4 = 65,536 chunks."""


def decode_kernel(kv_dtype: str):
    """The kernel that reads caches of `kv_dtype`."""
    return {"int4": attend_int4, "nvfp4": attend_nvfp4}.get(kv_dtype, attend)


def join_stages(cells: int, tile_bytes: int, num_stages: int) -> int:
    """Partial results of `cells` FP32 numbers that fit the main loop's tile buffers, at most eight."""
    return max(2, min(NARROW.value, tile_bytes * (num_stages - 1) // (4 * cells)))


def split_head_dim(element_bits: int, head_dim: int) -> tuple[int, int]:
    """(width of the first tile, dims of the second) that a row of `head_dim` is read as; see the kernel's DA and DB."""
    if padded_head_dim(element_bits, head_dim):
        return _power_of_two(head_dim), 0
    first = 1 << (head_dim.bit_length() - 1)
    return first, head_dim - first


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


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
        per_unit = 16 // cache.k.element_size()
        for data in (cache.k, cache.v):
            if data.shape[0] * data.stride(0) // per_unit >= 1 << 31:
                raise ValueError("a layer's cache spans 32 GiB or more: its addresses do not fit the kernel's 32 bits")
        self.device = cache.k.device
        self.arch = architecture(self.device)
        self.group = num_q_heads // cache.num_kv_heads
        self.num_q_heads = num_q_heads
        self.q_dtype = q_dtype
        self.sinks = sinks
        self.config = config or decode_configs(self.arch, cache.fmt.element_bits, cache.head_dim, self.group)[0]
        self._scalars = (
            (cache.head_dim**-0.5 if softmax_scale is None else softmax_scale) * math.log2(math.e),
            (soft_cap or 0.0) * math.log2(math.e),
            window_tokens or 0,
        )
        self._shape = (cache.fmt, cache.scale_granularity, cache.layout, cache.block_size_tokens, cache.head_dim)
        group_padded = max(8, _power_of_two(self.group))
        dim_padded = _power_of_two(cache.head_dim)
        first_dims, rest_dims = split_head_dim(cache.fmt.element_bits, cache.head_dim)
        self._flags = {
            "KV_HEADS": cache.num_kv_heads,
            "G": self.group,
            "GP": group_padded,
            "D": cache.head_dim,
            "DP": dim_padded,
            "DA": first_dims,
            "DB": rest_dims,
            "PAGE": cache.block_size_tokens,
            "BLOCK_N": self.config.block_n,
            "STAGES": self.config.num_stages,
            "FORMAT": cache.fmt.code,
            "SCALES": SCALE_CODES[cache.scale_granularity],
            "SOFT_CAP": soft_cap is not None,
            "WINDOW": window_tokens is not None,
            "SINKS": sinks is not None,
            "BATCH": next(b for b in BATCH_BUCKETS if b >= self.batch),
            "JOIN_STAGES": join_stages(
                group_padded * dim_padded,
                self.config.block_n * dim_padded * 2 * cache.fmt.element_bits // 8,
                self.config.num_stages,
            ),
            "HEADS_TOGETHER": cache.layout == "NHD",
            "UNPACK": unpack_mode(self.arch),
            "EXACT_DOT": interpreting(),
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
            **({"maxnreg": self.config.max_registers} if self.config.max_registers else {}),
        }
        self._kernel = decode_kernel(cache.fmt.name)
        self._flags = {k: v for k, v in self._flags.items() if k.islower() or k in self._kernel.arg_names}
        self.num_chunks = num_chunks or 1
        self._allocate(cache)
        self.facts = self._compile(cache)
        if num_chunks is None:
            resident = resident_ctas(self.facts, self.arch, self.device, self.config.ctas_per_sm)
            self.num_chunks = max(1, resident // cache.num_kv_heads)
            self._allocate(cache)

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
        k, v = cache.k, cache.v if cache.fmt.element_bits == 16 else cache.v.view(torch.uint16)
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
        if (cache.fmt, cache.scale_granularity, cache.layout, cache.block_size_tokens, cache.head_dim) != self._shape:
            raise ValueError("this cache is not of the shape the plan was made for")
        if out is None:
            out = torch.empty_like(q)
        args, flags = self._attend_call(q, cache, out)
        self._kernel[(self.num_chunks * cache.num_kv_heads,)](*args, **flags)
        return out


def decode_attention(q: torch.Tensor, cache: PagedKvCache, **options: object) -> torch.Tensor:
    """`DecodePlan(cache, num_q_heads=..., **options).run(q, cache)` for a single call."""
    return DecodePlan(cache, num_q_heads=q.shape[1], q_dtype=q.dtype, **options).run(q, cache)


__all__ = ["BATCH_BUCKETS", "DecodePlan", "decode_attention"]
