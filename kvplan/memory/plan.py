"""The answer to a sizing request: typed, the same object the CLI prints and ``--json`` serialises."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from kvplan.memory.request import SizeRequest, Source

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model as it was read; ``layer_kinds`` is cache kind → number of layers."""

    name: str
    source: str
    architecture: str
    family: str
    num_layers: int
    num_parameters: int
    num_active_parameters: int
    max_context_tokens: int | None
    weight_format: str
    layer_kinds: dict[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers with one page, inside one block table. ``group`` numbers the block tables."""

    kind: str
    num_layers: int
    page_bytes: int
    scale_bytes_per_page: int
    block_size_tokens: int
    num_kv_heads_per_rank: int
    window_tokens: int | None = None
    padding_bytes_per_page: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True)
class KvCache:
    """The KV cache of one GPU.

    Attributes:
        rules: ``exact`` or ``approximation``.
        bytes_per_token, scale_bytes_per_token: what one more token of context stores on one GPU, in the layers that
            grow with the context; whole numbers unless a format packs fractions.
        bytes_per_request, blocks_per_request: what one request of the context may hold on one GPU.
        num_blocks: the null block among them, as engines log it; None without a budget.
        capacity_tokens: what the engine logs as its cache size in tokens.
        max_concurrency: what the engine logs, at ``max_model_len_tokens``.

    """

    engine: str
    engine_version: str
    rules: str
    kv_cache_dtype: str
    bytes_per_token: int | float
    scale_bytes_per_token: int | float
    block_size_tokens: int
    bytes_per_block: int
    bytes_per_request: int
    scale_bytes_per_request: int
    blocks_per_request: int
    num_blocks: int | None
    capacity_tokens: int | None
    max_concurrency: float | None
    groups: tuple[CacheGroup, ...]


@dataclass(frozen=True, slots=True)
class TermSource:
    """Where a term comes from, how it was computed, and the flag that overrides it."""

    source: Source | None
    detail: str
    override: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one GPU in bytes; None is unknown. ``sources`` has an entry for each term.

    ``excess_bytes`` is what KV bytes that were given, or set aside by a fraction given for weights and KV, are, with
    all other terms, beyond the GPU's memory.
    """

    total_bytes: int | None
    usable_bytes: int | None
    weights_bytes: int | None
    activation_bytes: int | None
    graph_bytes: int | None
    overhead_bytes: int | None
    kv_cache_bytes: int | None
    excess_bytes: int
    sources: dict[str, TermSource]


@dataclass(frozen=True, slots=True)
class Answers:
    """What was asked: does it fit, how many, how long. Requests count over all replicas.

    Attributes:
        kv_needed_bytes: KV of ``batch_size`` (or one) requests at ``context_tokens``, on all GPUs.
        kv_short_bytes_per_gpu: bytes missing on each GPU; 0 when it fits, None if unknown.
        max_batch_at_context: requests held, and, where ``max_num_seqs`` was stated, let run at once.
        max_running: requests that ``max_num_seqs``, or else the engine's default, lets run at once; None if unknown.
        max_running_source: ``given``, ``exact`` of a default, ``assumed`` of one worked out from the planned cache.

    """

    context_tokens: int
    batch_size: int | None
    kv_needed_bytes: int
    kv_needed_bytes_per_gpu: int
    kv_short_bytes_per_gpu: int | None
    max_batch_at_context: int | None
    max_context_at_batch_tokens: int | None
    num_gpus: int
    max_running: int | None = None
    max_running_source: Source | None = None

    @property
    def num_waiting(self) -> int:
        """Requests of the batch that wait because the scheduler was told to run fewer at once."""
        stated = self.max_running if self.max_running_source == "given" else None
        return 0 if stated is None else max((self.batch_size or 1) - stated, 0)


@dataclass(frozen=True, slots=True)
class FormatRow:
    """One KV format in the comparison. ``forbidden`` says what rules it out; other fields are then None.

    Attributes:
        scale_share: scale bytes over all bytes of the blocks a request holds.
        effective_gain: bytes of a 16-bit request over bytes of this one.

    """

    kv_cache_dtype: str
    bytes_per_token: int | float | None = None
    scale_bytes_per_token: int | float | None = None
    scale_share: float | None = None
    capacity_tokens: int | None = None
    max_batch_at_context: int | None = None
    advertised_gain: float | None = None
    effective_gain: float | None = None
    block_size_tokens: int | None = None
    forbidden: str | None = None


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One GPU profile: the fewest of its GPUs that hold the weights and the KV asked for, and how they are laid out.

    ``num_replicas`` is over all servers; ``dp_size`` of them share the experts of one server (1 elsewhere).
    """

    gpu: str
    display_name: str
    memory_bytes: int
    smallest_tp_size: int | None
    dp_size: int | None = None
    num_replicas: int | None = None
    num_gpus: int | None = None
    kv_cache_bytes: int | None = None
    max_batch_at_context: int | None = None
    reason: str | None = None

    @property
    def layout(self) -> str:
        """TP and DP of one server, and how many servers: ``TP 8``, ``TP 4 × 3``, ``TP 1, DP 8 × 2``."""
        shared, servers = self.dp_size or 1, (self.num_replicas or 1) // (self.dp_size or 1)
        return f"TP {self.smallest_tp_size}" + f", DP {shared}" * (shared > 1) + f" × {servers}" * (servers > 1)


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One line of the waste ledger, on one GPU."""

    name: str
    label: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Advice:
    """Something worth doing or knowing, with its number."""

    code: str
    message: str
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One formula with its numbers, and where it comes from."""

    name: str
    formula: str
    source: str


@dataclass(frozen=True, slots=True)
class SizePlan:
    """The whole answer. Bytes are per GPU unless a name says otherwise.

    Attributes:
        request: what was asked, with defaults filled in.
        model: what was read of the model; None for one from flags.
        kv_cache: bytes a token, blocks, capacity, groups of layers.
        memory: the budget of one GPU, each term with its source.
        fits: whether the engine starts and holds the batch; None without a budget. Where no context and no batch is
            asked about, KV bytes that are given count as there: what the engine's allocator makes of them.
        answers: how many requests, how long, what is missing.
        comparison, gpus: other KV formats; without a GPU, the fewest of each that would do.
        ledger: where the KV bytes of one GPU go, holding ``ledger_requests``.
        advice: what to change, with what it wins.
        rules: formulas of the engine with their numbers.

    """

    request: SizeRequest
    model: ModelFacts | None
    kv_cache: KvCache
    memory: Memory
    fits: bool | None
    answers: Answers
    comparison: tuple[FormatRow, ...] = ()
    gpus: tuple[GpuRow, ...] = ()
    ledger: tuple[LedgerLine, ...] = ()
    ledger_requests: int | None = None
    advice: tuple[Advice, ...] = ()
    rules: tuple[Rule, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def verdict(self) -> bool | None:
        """``fits``, and False wherever the KV bytes given or set aside are more than the GPU has."""
        return False if self.memory.excess_bytes else self.fits

    @property
    def too_long_tokens(self) -> int | None:
        """The longest request, where the engine refuses to start for it though the requests asked for fit."""
        if self.memory.excess_bytes:
            return None
        held = (self.answers.max_batch_at_context or 0) >= (self.answers.batch_size or 1)
        return self.request.max_model_len_tokens if self.fits is False and held else None

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON; the keys are the JSON contract."""
        result: dict[str, Any] = _plain(self)
        return result

    def to_json(self, indent: int | None = None) -> str:
        """One JSON object."""
        return json.dumps(self.as_dict(), indent=indent)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
