"""What the kernels run: attention shapes of one rank, the KV formats of each kind of attention, and both together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kvplan.dtypes import canonical_kv_dtype, kv_format
from kvplan.errors import InputError, UnsupportedError, shorten
from kvplan.kernels.formats import (
    FORMATS,
    HEAD_DIMS,
    LATENT_DIM,
    LATENT_ROW_BYTES,
    ROPE_DIM,
    check_cache_shape,
    latent_head_blocks,
    row_bytes,
)
from kvplan.kernels.formats import kv_format as kernel_format
from kvplan.model_config import AttentionCache, LatentCache, ModelConfig, resolve_model
from kvplan.model_config.types import Cache

MAX_GROUP = 16
KERNEL_FORMATS = {
    "bfloat16": ("bf16", "none"), "float16": ("fp16", "none"),
    "fp8": ("fp8_e4m3", "tensor"), "fp8_e4m3": ("fp8_e4m3", "tensor"), "fp8_e5m2": ("fp8_e5m2", "tensor"),
    "fp8_per_token_head": ("fp8_e4m3", "token_head"), "int8_per_token_head": ("int8", "token_head"),
    "nvfp4": ("nvfp4", "block"), "int4:block32:fp16": ("int4", "block"),
}  # fmt: skip
"""KV dtype by its name in ``kvplan dtypes`` → (element, scale granularity) as the kernels name them."""
LATENT_FORMATS = {
    "bfloat16": ("bf16", "none"), "fp8": ("fp8_e4m3", "tensor"), "fp8_e4m3": ("fp8_e4m3", "tensor"),
    "fp8_ds_mla": ("fp8_ds_mla", "block"),
}  # fmt: skip
"""The same of rows of latent attention."""

GENERIC_ELEMENTS = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8_e4m3", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention heads of one rank, and the sliding window (None: full attention).

    Latent (MLA) attention has one KV head of ``head_dim`` numbers a token, of which the first ``latent_dim`` are the
    values too (None: K and V apart).
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window_tokens: int | None = None
    latent_dim: int | None = None

    @property
    def group_size(self) -> int:
        """Query heads a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def numbers_per_token(self) -> int:
        """Numbers of one token that a step reads."""
        return self.head_dim if self.latent_dim else 2 * self.num_kv_heads * self.head_dim

    @property
    def layout(self) -> str:
        """How its cache lies here: head-major pages, or pages of latent rows."""
        return "rows" if self.latent_dim else "HND"

    def describe(self) -> str:
        """``64 query heads, 8 KV heads of 128``, or ``16 query heads on a latent of 512 + 64``."""
        if self.latent_dim:
            rest = self.head_dim - self.latent_dim
            return f"{self.num_q_heads} query heads on a latent of {self.latent_dim} + {rest}"
        window = f", window {self.window_tokens:,}" if self.window_tokens else ""
        return f"{self.num_q_heads} query heads, {self.num_kv_heads} KV heads of {self.head_dim}{window}"


@dataclass(frozen=True, slots=True)
class Family:
    """Cells that run the same compiled kernel: a shape and a format."""

    shape: Shape
    kv_dtype: str

    @property
    def element(self) -> str:
        """The element format as the kernels name it."""
        return kernel_names(self.kv_dtype, bool(self.shape.latent_dim))[0]

    @property
    def scale_granularity(self) -> str:
        """What one scale covers."""
        return kernel_names(self.kv_dtype, bool(self.shape.latent_dim))[1]

    def check(self) -> None:
        """Whether the kernels read this format of this shape.

        Raises:
            UnsupportedError: they do not; the message says what they read.

        """
        element, granularity = self.element, self.scale_granularity
        if self.shape.latent_dim:
            return
        try:
            check_cache_shape(kernel_format(element), granularity, "HND", 64, self.shape.head_dim)
        except ValueError as error:
            raise UnsupportedError(f"{self.kv_dtype}: {error}") from error

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K, V and per-token scales that a step reads for one token of context of one layer."""
        if self.shape.latent_dim:
            return int(LATENT_ROW_BYTES[self.element])
        row, scale = row_bytes(kernel_format(self.element), self.shape.head_dim, self.scale_granularity)
        return int(2 * self.shape.num_kv_heads * (row + scale))

    def describe(self) -> str:
        """``fp8 (64 query heads, 8 KV heads of 128)``."""
        return f"{self.kv_dtype} ({self.shape.describe()})"


def kernel_names(kv_dtype: str, latent: bool = False) -> tuple[str, str]:
    """(element, scale granularity) of a KV dtype, as the kernels of plain or latent attention name them.

    Raises:
        UnsupportedError: those kernels do not read that format.

    """
    name = canonical_kv_dtype(kv_dtype)
    formats = LATENT_FORMATS if latent else KERNEL_FORMATS
    if name in formats:
        return formats[name]
    if latent:
        raise UnsupportedError(
            f"KV dtype {shorten(kv_dtype)!r}: the bundled kernel of latent attention does not read it",
            hint=f"it reads {', '.join(LATENT_FORMATS)}",
        )
    if name in LATENT_FORMATS:
        raise UnsupportedError(f"KV dtype {shorten(kv_dtype)!r}: rows of latent attention, which this shape is not",
                               hint="--model deepseek-v3 has them")  # fmt: skip
    element, _, rest = name.partition(":")
    granularity, _, scale_dtype = rest.partition(":")
    known = GENERIC_ELEMENTS.get(element)
    if known is not None and scale_dtype in ("", "fp32") and granularity in FORMATS[known].scale_granularities:
        return known, granularity
    raise UnsupportedError(
        f"KV dtype {shorten(kv_dtype)!r}: the bundled kernels do not read it",
        hint=f"they read {', '.join(KERNEL_FORMATS)}, and fp8 or int8 with scales of a tensor, head or token_head "
        "(fp8:head)",
    )


def parse_kv_dtypes(names: Iterable[str], latent: bool = False) -> tuple[str, ...]:
    """Canonical KV dtypes of plain or latent attention, each once, in order.

    Raises:
        UnknownNameError, UnsupportedError: no such format, or one that the kernels do not read.

    """
    found: dict[str, None] = {}
    for name in names:
        if name.strip().lower() == "auto":
            name = "bf16"
        kernel_names(name, latent)
        found[kv_format(name).name] = None
    return tuple(found)


def checked_shape(shape: Shape) -> Shape:
    """``shape``, if the kernels take it.

    Raises:
        UnsupportedError: a head_dim, a latent or a group size that they do not read.
        InputError: query heads that KV heads do not divide.

    """
    if shape.latent_dim:
        return _checked_latent(shape, shape.head_dim - shape.latent_dim)
    if min(shape.num_q_heads, shape.num_kv_heads) < 1 or shape.num_q_heads % shape.num_kv_heads:
        raise InputError(
            f"{shape.num_q_heads} query heads cannot share {shape.num_kv_heads} KV heads evenly",
            hint="--num-q-heads must be a multiple of --num-kv-heads",
        )
    if shape.head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        raise UnsupportedError(f"head_dim {shape.head_dim}: the bundled kernels read {known}")
    if shape.group_size > MAX_GROUP:
        raise UnsupportedError(
            f"{shape.group_size} query heads a KV head: the bundled kernels read groups of 1 to {MAX_GROUP}"
        )
    return shape


def _checked_latent(shape: Shape, rope_dim: int) -> Shape:
    if (shape.latent_dim, rope_dim) != (LATENT_DIM, ROPE_DIM):
        raise UnsupportedError(
            f"a latent of {shape.latent_dim} + {rope_dim}: the bundled kernel reads {LATENT_DIM} + {ROPE_DIM}"
        )
    try:
        latent_head_blocks(shape.num_q_heads)
    except ValueError as error:
        raise UnsupportedError(str(error), hint="another --tp") from error
    return shape


def model_shapes(model: str, tp_size: int) -> tuple[Shape, ...]:
    """The distinct attention shapes of one rank of ``model`` under tensor parallelism, most layers first.

    Latent attention counts where no layer is plain attention: the two have kernels and formats of their own.

    Raises:
        InputError: TP does not divide the query heads.
        UnsupportedError: no layer of it has attention that the kernels read, or of a shape that they do not.

    """
    config = resolve_model(model)
    caches = [cache for layer in config.layers for cache in layer.caches]
    counts = Counter(shape for cache in caches if (shape := _rank_shape(config, cache, tp_size)) is not None)
    if not counts:
        sparse = any(isinstance(cache, LatentCache) for cache in caches)
        raise UnsupportedError(
            f"{config.name} has sparse latent attention: the bundled kernel reads every token of the context"
            if sparse
            else f"{config.name} has no attention layer that the bundled kernels read",
            hint="`kvplan measure` times MHA, GQA, MQA and dense latent attention; give a shape with --num-q-heads "
            "--num-kv-heads --head-dim",
        )
    chosen = [shape for shape in counts if shape.latent_dim is None] or list(counts)
    return tuple(checked_shape(shape) for shape in sorted(chosen, key=lambda s: -counts[s]))


def _rank_shape(config: ModelConfig, cache: Cache, tp_size: int) -> Shape | None:
    """What one rank of ``tp_size`` attends with; None for a cache that the kernels do not read.

    A KV head is on several ranks where they outnumber the heads, a latent on each.
    """
    is_plain = isinstance(cache, AttentionCache) and cache.head_dim == cache.head_dim_v
    is_dense_latent = isinstance(cache, LatentCache) and cache.top_k_tokens is None
    if not (is_plain or is_dense_latent):
        return None
    assert isinstance(cache, AttentionCache | LatentCache)
    if cache.num_q_heads % tp_size:
        raise InputError(f"{config.name}: TP {tp_size} does not divide {cache.num_q_heads} query heads")
    heads = cache.num_q_heads // tp_size
    if isinstance(cache, LatentCache):
        return Shape(heads, 1, cache.latent_dim + cache.rope_dim, latent_dim=cache.latent_dim)
    window = cache.window_tokens or cache.chunk_tokens
    return Shape(heads, max(1, cache.num_kv_heads // tp_size), cache.head_dim, window)
