"""What decode attention is compiled for: the kernel that reads a kind of cache, its configurations, its constants."""

import math
from dataclasses import dataclass

import torch

from ..configs import INLINE_TILES, Config, alone_configs, decode_configs, inline_config, padded_head_dim, run_configs
from ..device import GLUON
from ..formats import INLINE_SLOT_BYTES, KvFormat, int4_plane_dims
from ..paged_cache import PagedKvCache
from ..unpack import PLAIN
from .join import NARROW
from .kernel import attend
from .kernel_inline import attend_inline
from .kernel_int4 import attend_int4
from .kernel_nvfp4 import attend_nvfp4

if GLUON:
    from .runs import attend_runs
else:
    attend_runs = None

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


def _lies_close(data: torch.Tensor, layout: str) -> bool:
    """Whether the rows of a block follow each other: head-major those of each head, token-major all."""
    rows = data.stride()[1:] == (data.shape[2] * data.shape[3], data.shape[3], 1)
    return rows or (layout == "HND" and data.stride()[2:] == (data.shape[3], 1))


@dataclass(frozen=True)
class DecodeShape:
    """A kind of cache, and the query heads that share a KV head of it.

    `dense`: no gaps between the rows of a block, nor between its scales; `one_sequence`: the cut is for a batch of one,
    whose pieces all programs join together, and where joining those of several heads costs more than it saves.
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
            dense=all(_lies_close(x, cache.layout) for x in (cache.k, cache.v))
            and (cache.scale_granularity != "token_head" or cache.k_scale.stride(-1) == 1),
        )

    @property
    def _inline(self) -> bool:
        """Whether a row carries its own scale."""
        return self.scale_granularity == "token_head_inline"

    @property
    def _heads_side_by_side(self) -> int:
        """KV heads that a program of `attend_inline` reads: 4 or 2, whose rows fill whole sectors; 1: none."""
        heads = math.gcd(self.num_kv_heads, 4)
        wanted = self._inline and self.layout == "NHD" and self.dense and not self.one_sequence
        return heads if wanted and self.group_size <= 8 and (heads, self.head_dim) in INLINE_TILES else 1

    def _run_configs(self) -> tuple[Config, ...]:
        """Configurations of `attend_runs`; none where a KV head's tile is no run of bytes, or others are as fast."""
        in_runs = self.dense and (self.layout == "HND" or self.num_kv_heads == 1) and self.block_size_tokens >= 16
        if attend_runs is None or self.fmt.element_bits != 8 or not in_runs:
            return ()
        return run_configs(self.head_dim, self._inline, self.group_size, self.block_size_tokens)

    def configs(self, arch: int | None) -> tuple[Config, ...]:
        """Configurations to choose from, the default first; `arch` None: a CPU or ROCm."""
        heads = self._heads_side_by_side
        if heads > 1 and self.block_size_tokens >= 16:
            return (inline_config(arch, self.head_dim, heads, self.block_size_tokens),)
        others = decode_configs(arch, self.fmt.element_bits, self.head_dim, self.group_size, self._inline)
        if arch is None:
            return others
        if not self.one_sequence or self._inline:
            return (*self._run_configs(), *others)
        per_token = self.scale_granularity == "token_head"
        return (*alone_configs(self.fmt.element_bits, self.head_dim, self.group_size, per_token), *others)

    def heads_a_program(self, config: Config) -> int:
        """KV heads that one program reads: more than 1 by `attend_inline`, whose tiles lie within a block."""
        within_block = config.block_n <= self.block_size_tokens and not config.whole_runs
        return self._heads_side_by_side if within_block else 1

    def kernel(self, config: Config) -> object:
        """The kernel that reads such a cache."""
        if config.whole_runs:
            return attend_runs
        if self.fmt.element_bits == 4:
            return attend_int4 if self.fmt.name == "int4" else attend_nvfp4
        return attend_inline if self.heads_a_program(config) > 1 else attend

    def constants(
        self,
        config: Config,
        *,
        soft_cap: bool,
        window: bool,
        sinks: bool,
        batch: int,
        unpack: int,
        exact_dot: bool,
        dependent: bool,
    ) -> dict:
        """The kernel's compile-time arguments."""
        dim_padded = _power_of_two(self.head_dim)
        first_dims, rest_dims = split_head_dim(self.fmt.element_bits, self.head_dim)
        group_padded = max(8, _power_of_two(self.group_size))
        heads = self.heads_a_program(config)
        rows = max(group_padded, _power_of_two(heads * self.group_size))
        tile_bytes = heads * config.block_n * dim_padded * 2 * self.fmt.element_bits // 8
        row_bytes = self.head_dim + (INLINE_SLOT_BYTES if self._inline else 0)
        width = 1 << (row_bytes.bit_length() - 1)
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
            "WIDTH": width,
            "TAIL": row_bytes - width,
            "WARPS": config.num_warps,
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
            "DEPENDENT": dependent,
            "JOIN_TOGETHER": config.num_warps if self.one_sequence and unpack != PLAIN else 0,
        }
        return {name: value for name, value in found.items() if name in self.kernel(config).arg_names}
