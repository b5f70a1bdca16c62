"""Which cells to time: attention shapes × KV formats × batches × contexts, cut to the memory at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvplan.dtypes import canonical_kv_dtype, kv_format
from kvplan.errors import InputError, UnsupportedError, shorten
from kvplan.kernels.formats import FORMATS, HEAD_DIMS, check_cache_shape, row_bytes
from kvplan.kernels.formats import kv_format as kernel_format
from kvplan.model_config import AttentionCache, resolve_model
from kvplan.units import format_bytes

MAX_GROUP = 16
MAX_CELLS = 2000
MAX_LAYERS = 64
L2_REUSE = 4
"""A replay goes through this many L2 caches' worth of KV before it comes back to the same bytes."""
BUILD_FACTOR = 1.2
"""Memory that a cell needs while it is filled, over the caches themselves."""
MEMORY_SHARE = 0.9

KERNEL_FORMATS = {
    "bfloat16": ("bf16", "none"), "float16": ("fp16", "none"),
    "fp8": ("fp8_e4m3", "tensor"), "fp8_e4m3": ("fp8_e4m3", "tensor"), "fp8_e5m2": ("fp8_e5m2", "tensor"),
    "fp8_per_token_head": ("fp8_e4m3", "token_head"), "int8_per_token_head": ("int8", "token_head"),
    "nvfp4": ("nvfp4", "block"), "int4:block32:fp16": ("int4", "block"),
}  # fmt: skip
"""KV dtype by its name in ``kvplan dtypes`` → (element, scale granularity) as the kernels name them."""

WEIGHT_BYTES = {"bf16": 2, "fp8": 1}
"""Bytes of a weight of a layer, by ``--weight-dtype``; the LM head stays in bf16, as FP8 checkpoints have it."""

GENERIC_ELEMENTS = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8_e4m3", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention heads of one rank, and the sliding window (None: full attention)."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window_tokens: int | None = None

    @property
    def group_size(self) -> int:
        """Query heads a KV head."""
        return self.num_q_heads // self.num_kv_heads

    def describe(self) -> str:
        """``64 query heads, 8 KV heads of 128``."""
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
        return kernel_names(self.kv_dtype)[0]

    @property
    def scale_granularity(self) -> str:
        """What one scale covers."""
        return kernel_names(self.kv_dtype)[1]

    def check(self) -> None:
        """Whether the kernels read this format at this head_dim.

        Raises:
            UnsupportedError: they do not; the message says what they read.

        """
        try:
            check_cache_shape(kernel_format(self.element), self.scale_granularity, "HND", 64, self.shape.head_dim)
        except ValueError as error:
            raise UnsupportedError(f"{self.kv_dtype}: {error}") from error

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K, V and per-token scales that a step reads for one token of context of one layer."""
        row, scale = row_bytes(kernel_format(self.element), self.shape.head_dim, self.scale_granularity)
        return int(2 * self.shape.num_kv_heads * (row + scale))

    def describe(self) -> str:
        """``fp8 (64 query heads, 8 KV heads of 128)``."""
        return f"{self.kv_dtype} ({self.shape.describe()})"


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to time: a family at a batch and a context, over ``layers`` disjoint caches."""

    family: Family
    batch_size: int
    context_tokens: int
    layers: int = 2

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's cache."""
        return self.batch_size * self.context_tokens * self.family.bytes_per_token

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same cell in another run."""
        shape = self.family.shape
        return (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.window_tokens or 0, self.family.kv_dtype,
                self.batch_size, self.context_tokens)  # fmt: skip

    def describe(self) -> str:
        """``fp8 batch 32 × 65,536``."""
        return f"{self.family.kv_dtype} batch {self.batch_size:,} × {self.context_tokens:,}"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A cell that was not timed, and why."""

    cell: str
    reason: str


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """What a run was asked to measure, complete enough to go on with it later."""

    shapes: tuple[Shape, ...]
    kv_dtypes: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    context_tokens: tuple[int, ...]
    effort: str
    device: str
    compare: tuple[str, ...] = ()
    seed: int = 0
    model: str | None = None
    tp_size: int | None = None
    step_context_tokens: tuple[int, ...] = ()
    step_weight_dtype: str = "bf16"

    @property
    def families(self) -> tuple[Family, ...]:
        """Shape × format, in order."""
        return tuple(Family(shape, dtype) for shape in self.shapes for dtype in self.kv_dtypes)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def request_from_dict(data: dict[str, Any], where: str) -> MeasureRequest:
    """A request from its JSON form.

    Raises:
        InputError: it does not have the form that ``as_dict`` gives.

    """
    try:
        shapes = tuple(Shape(**shape) for shape in data["shapes"])
        lists = {
            name: tuple(data[name])
            for name in ("kv_dtypes", "batch_sizes", "context_tokens", "compare", "step_context_tokens")
        }
        request = MeasureRequest(**{**data, **lists, "shapes": shapes})
        WEIGHT_BYTES[request.step_weight_dtype]
        return request
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: not the request of a run", hint="start a new run without --resume") from error


def kernel_names(kv_dtype: str) -> tuple[str, str]:
    """(element, scale granularity) of a KV dtype, as the kernels name them.

    Raises:
        UnsupportedError: the bundled kernels do not read that format.

    """
    name = canonical_kv_dtype(kv_dtype)
    if name in KERNEL_FORMATS:
        return KERNEL_FORMATS[name]
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


def element_bits(element: str) -> int:
    """Bits of one element, by its name among the kernels."""
    return int(kernel_format(element).element_bits)


def parse_kv_dtypes(names: Iterable[str]) -> tuple[str, ...]:
    """Canonical KV dtypes, each once, in order.

    Raises:
        UnknownNameError, UnsupportedError: no such format, or one that the kernels do not read.

    """
    found: dict[str, None] = {}
    for name in names:
        if name.strip().lower() == "auto":
            name = "bf16"
        kernel_names(name)
        found[kv_format(name).name] = None
    return tuple(found)


def checked_shape(shape: Shape) -> Shape:
    """``shape``, if the kernels take it.

    Raises:
        UnsupportedError: a head_dim or a group size that they do not read.
        InputError: query heads that KV heads do not divide.

    """
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


def model_shapes(model: str, tp_size: int) -> tuple[Shape, ...]:
    """The distinct attention shapes of one rank of ``model`` under tensor parallelism, most layers first.

    Raises:
        InputError: TP does not divide the query heads.
        UnsupportedError: no layer of it is plain attention, or of a shape that the kernels read.

    """
    config = resolve_model(model)
    counts: dict[Shape, int] = {}
    for layer in config.layers:
        for cache in layer.caches:
            if not isinstance(cache, AttentionCache) or cache.head_dim != cache.head_dim_v:
                continue
            if cache.num_q_heads % tp_size:
                raise InputError(f"{config.name}: TP {tp_size} does not divide {cache.num_q_heads} query heads")
            kv_heads = max(1, cache.num_kv_heads // tp_size)
            window = cache.window_tokens or cache.chunk_tokens
            shape = Shape(cache.num_q_heads // tp_size, kv_heads, cache.head_dim, window)
            counts[shape] = counts.get(shape, 0) + 1
    if not counts:
        raise UnsupportedError(
            f"{config.name} has no attention layer that caches K and V of one width",
            hint="`kvplan measure` times MHA, GQA and MQA; give a shape with --num-q-heads --num-kv-heads --head-dim",
        )
    return tuple(checked_shape(shape) for shape in sorted(counts, key=lambda s: -counts[s]))


def plan_cells(
    request: MeasureRequest, *, free_bytes: int, l2_bytes: int | None, max_layers: int = MAX_LAYERS
) -> tuple[list[Cell], list[Skipped]]:
    """The cells of ``request`` that fit ``free_bytes``, most telling first, and those that do not.

    The largest batch comes first, and of each batch the longest and the shortest context: a run cut short by its time
    budget has slopes for every format.

    Raises:
        InputError: more cells than a run takes.

    """
    count = len(request.families) * len(request.batch_sizes) * len(request.context_tokens)
    if count > MAX_CELLS:
        raise InputError(f"{count:,} cells", hint=f"a run takes {MAX_CELLS:,} at most; shorten a list")
    cells, skipped = [], []
    for batch in sorted(set(request.batch_sizes), reverse=True):
        for context in _outside_in(request.context_tokens):
            for family in request.families:
                cell = _with_layers(Cell(family, batch, context), free_bytes, l2_bytes, max_layers)
                need = int(cell.layers * cell.layer_bytes * BUILD_FACTOR)
                if need > free_bytes * MEMORY_SHARE:
                    reason = f"needs {format_bytes(need)}, {format_bytes(int(free_bytes * MEMORY_SHARE))} are free"
                    skipped.append(Skipped(cell.describe(), reason))
                else:
                    cells.append(cell)
    return cells, skipped


def _outside_in(contexts: Sequence[int]) -> list[int]:
    ordered = sorted(set(contexts))
    ends = [ordered[-1], ordered[0]] if len(ordered) > 1 else ordered
    return ends + [context for context in reversed(ordered) if context not in ends]


def _with_layers(cell: Cell, free_bytes: int, l2_bytes: int | None, max_layers: int) -> Cell:
    """Enough layers that none is still in L2 when its turn comes; one, where memory holds no more and one is enough."""
    wanted = -(-L2_REUSE * (l2_bytes or 0) // cell.layer_bytes)
    layers = max(2, min(max_layers, wanted))
    room = int(free_bytes * MEMORY_SHARE / BUILD_FACTOR) // cell.layer_bytes
    if room < layers and (room >= 2 or wanted <= 1):
        layers = max(1, room)
    return replace(cell, layers=layers)
