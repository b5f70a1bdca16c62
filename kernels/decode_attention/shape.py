"""What decode attention is compiled for: the kernel that reads a kind of cache, its configurations, its constants."""

import math
from dataclasses import dataclass

from ..configs import INLINE_TILES, Config, decode_configs, inline_config, padded_head_dim
from ..formats import KvFormat, int4_plane_dims
from ..paged_cache import PagedKvCache
from .join import NARROW
from .kernel import attend
from .kernel_inline import attend_inline
from .kernel_int4 import attend_int4
from .kernel_nvfp4 import attend_nvfp4

BATCH_BUCKETS = (1, 32, 128, 1024, 8192)
SCALE_CODES = {"none": 0, "tensor": 1, "head": 1, "token_head": 2, "token_head_inline": 3, "block": 0}


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def join_stages(cells: int, tile_bytes: int, num_stages: int) -> int:
    """Partial results of `cells` FP32 numbers that fit the main loop's tile buffers, at most eight."""
    return max(2, min(NARROW.value, tile_bytes * (num_stages - 1) // (4 * cells)))


def split_head_dim(element_bits: int, head_dim: int) -> tuple[int, int]:
    """(width of the first tile, dims of the second) that a row of `head_dim` is read as; see the kernel's DA and DB."""
    if padded_head_dim(element_bits, head_dim):
        return _power_of_two(head_dim), 0
    first = 1 << (head_dim.bit_length() - 1)
    return first, head_dim - first


@dataclass(frozen=True)
class DecodeShape:
    """A kind of cache, and the query heads that share a KV head of it.

    `dense`: no gaps between the rows of a block (asked of token-major inline rows only); `one_sequence`: the cut is for
    a batch of one.
    """

    fmt: KvFormat
    scale_granularity: str
    layout: str
    block_size_tokens: int
    num_kv_heads: int
    head_dim: int
    group_size: int
    dense: bool = True
    one_sequence: bool = False

    @classmethod
    def of(cls, cache: PagedKvCache, group_size: int) -> "DecodeShape":
        """The shape of `cache` read by `group_size` query heads a KV head."""
        return cls(
            cache.fmt,
            cache.scale_granularity,
            cache.layout,
            cache.block_size_tokens,
            cache.num_kv_heads,
            cache.head_dim,
            group_size,
            dense=(cache.scale_granularity, cache.layout) != ("token_head_inline", "NHD")
            or all(x.stride()[1:] == (x.shape[2] * x.shape[3], x.shape[3], 1) for x in (cache.k, cache.v)),
        )

    @property
    def _heads_side_by_side(self) -> int:
        """KV heads that a program of `attend_inline` reads: 4 or 2, whose rows fill whole sectors; 1: none."""
        heads = math.gcd(self.num_kv_heads, 4)
        inline = (self.scale_granularity, self.layout, self.dense) == ("token_head_inline", "NHD", True)
        wanted = inline and not self.one_sequence
        return heads if wanted and self.group_size <= 8 and (heads, self.head_dim) in INLINE_TILES else 1

    def configs(self, arch: int | None) -> tuple[Config, ...]:
        """Configurations to choose from, the default first; `arch` None: a CPU or ROCm."""
        heads = self._heads_side_by_side
        if heads > 1 and self.block_size_tokens >= 16:
            return (inline_config(arch, self.head_dim, heads, self.block_size_tokens),)
        return decode_configs(arch, self.fmt.element_bits, self.head_dim, self.group_size)

    def heads_a_program(self, config: Config) -> int:
        """KV heads that one program reads: more than 1 by `attend_inline`, whose tiles lie within a block."""
        return self._heads_side_by_side if config.block_n <= self.block_size_tokens else 1

    def kernel(self, config: Config) -> object:
        """The kernel that reads such a cache."""
        if self.fmt.element_bits == 4:
            return attend_int4 if self.fmt.name == "int4" else attend_nvfp4
        return attend_inline if self.heads_a_program(config) > 1 else attend

    def constants(
        self, config: Config, *, soft_cap: bool, window: bool, sinks: bool, batch: int, unpack: int, exact_dot: bool
    ) -> dict:
        """The kernel's compile-time arguments."""
        dim_padded = _power_of_two(self.head_dim)
        first_dims, rest_dims = split_head_dim(self.fmt.element_bits, self.head_dim)
        group_padded = max(8, _power_of_two(self.group_size))
        heads = self.heads_a_program(config)
        rows = max(group_padded, _power_of_two(heads * self.group_size))
        tile_bytes = heads * config.block_n * dim_padded * 2 * self.fmt.element_bits // 8
        found = {
            "KV_HEADS": self.num_kv_heads,
            "HEADS": heads,
            "G": self.group_size,
            "GP": group_padded,
            "ROWS": rows,
            "D": self.head_dim,
            "DP": dim_padded,
            "DA": first_dims,
            "DB": rest_dims,
            "PLANE": int4_plane_dims(self.head_dim),
            "PAGE": self.block_size_tokens,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
            "FORMAT": self.fmt.code,
            "SCALES": SCALE_CODES[self.scale_granularity],
            "SOFT_CAP": soft_cap,
            "WINDOW": window,
            "SINKS": sinks,
            "BATCH": next(b for b in BATCH_BUCKETS if b >= batch),
            "JOIN_STAGES": join_stages(rows * dim_padded, tile_bytes, config.num_stages),
            "HEADS_TOGETHER": self.layout == "NHD",
            "UNPACK": unpack,
            "EXACT_DOT": exact_dot,
        }
        return {name: value for name, value in found.items() if name in self.kernel(config).arg_names}
