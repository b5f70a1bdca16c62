"""Which cells to time: attention shapes × KV formats × batches × contexts, cut to the memory at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

from kvplan.errors import InputError
from kvplan.measure.family import Family, Shape
from kvplan.units import format_bytes

MAX_CELLS = 2000
MAX_LAYERS = 64
L2_REUSE = 4
"""A replay goes through this many L2 caches' worth of KV before it comes back to the same bytes."""
BUILD_FACTOR = 1.2
"""Memory that a cell needs while it is filled, over the caches themselves."""
MEMORY_SHARE = 0.9
MAX_SEED = 2**63 - 1
"""What torch's generators take."""

REPLAYS = {"quick": 20, "thorough": 50}
"""Of each cell, by effort."""
PEERS = {"torch": "torch SDPA", "flashinfer": "FlashInfer XQA", "vllm": "vLLM FlashAttention-3"}
"""What ``--compare`` can put beside ours, and how it is called in reports."""

WEIGHT_BYTES = {"bf16": 2, "fp8": 1}
"""Bytes of a weight of a layer, by ``--weight-dtype``; the LM head stays in bf16, as FP8 checkpoints have it."""


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
    def read_bytes(self) -> int:
        """Bytes that one call has to read of it: no more than the window's."""
        tokens = min(self.context_tokens, self.family.shape.window_tokens or self.context_tokens)
        return self.batch_size * tokens * self.family.bytes_per_token

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
    def latent_heads(self) -> int | None:
        """Query heads of its latent attention; None for plain attention."""
        return next((shape.num_q_heads for shape in self.shapes if shape.latent_dim), None)

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
        InputError: it does not have the form that ``as_dict`` gives, or what it names cannot be measured.

    """
    refused = InputError(f"{where}: not the request of a run", hint="start a new run without --resume")
    try:
        shapes = tuple(Shape(**shape) for shape in data["shapes"])
        lists = {
            name: tuple(data[name])
            for name in ("kv_dtypes", "batch_sizes", "context_tokens", "compare", "step_context_tokens")
        }
        request = MeasureRequest(**{**data, **lists, "shapes": shapes})
        sound = _is_sound(request)
    except (KeyError, TypeError) as error:
        raise refused from error
    if not sound:
        raise refused
    return request


def _is_sound(request: MeasureRequest) -> bool:
    """Whether its sizes are counts, and its names are known; formats are looked up where they are measured."""
    lists = (request.shapes, request.kv_dtypes, request.batch_sizes, request.context_tokens)
    sizes = [size for shape in request.shapes for size in astuple(shape) if size is not None]
    counts = [*sizes, *request.batch_sizes, *request.context_tokens, *request.step_context_tokens]
    return (
        all(lists)
        and all(type(count) is int and count > 0 for count in counts)
        and type(request.seed) is int
        and 0 <= request.seed <= MAX_SEED
        and request.effort in REPLAYS
        and set(request.compare) <= PEERS.keys()
        and request.step_weight_dtype in WEIGHT_BYTES
    )


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
