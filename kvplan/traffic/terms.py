"""The coefficients of a decode step on one GPU, and the bytes and FLOPs they give at a batch and a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from kvplan.deployment import Deployment
from kvplan.model_config.types import ModelConfig

if TYPE_CHECKING:
    import numpy.typing as npt  # takes 2 ms, and only types need it

Floats: TypeAlias = "npt.NDArray[np.float64]"
Number: TypeAlias = "float | Floats"
"""A float, or an array of them: formulas below take either."""


@dataclass(frozen=True, slots=True)
class KvRead:
    """Layers that read their cache alike, on one rank.

    Attributes:
        kind: ``full``, ``sliding``, ``chunked``, ``mla``, ``indexer``, ``sliding_mla`` or ``state``.
        bytes_per_state: bytes of one layer for one stored token (or compressed state), all head slots of the rank.
        scale_bytes_per_state: of which scales.
        tokens_per_state: tokens one stored state stands for.
        limit_states: the most states a step reads (window, chunk, top k); None reads all.
        constant_bytes: bytes a request reads and writes whatever its context (recurrent states).
        flops_per_state: attention FLOPs of one layer for one state read, on this rank.

    """

    kind: str
    num_layers: int
    bytes_per_state: int
    scale_bytes_per_state: int
    block_size_tokens: int
    tokens_per_state: int = 1
    limit_states: int | None = None
    constant_bytes: int = 0
    flops_per_state: float = 0.0

    def weight(self, slowdown: float) -> float:
        """``slowdown`` where the bytes are in the KV format, 1 for states and index keys, which have their own."""
        return 1.0 if self.kind in ("state", "indexer") else slowdown

    def states(self, context_tokens: Number) -> Number:
        """States one request reads in one layer at ``context_tokens``."""
        found = context_tokens / self.tokens_per_state
        return found if self.limit_states is None else np.minimum(found, self.limit_states)

    def read_bytes(self, context_tokens: Number) -> Number:
        """Bytes one request reads (recurrent states: and writes) in these layers."""
        if self.kind == "state":
            return np.zeros_like(context_tokens, dtype=float) + self.constant_bytes * self.num_layers
        return self.states(context_tokens) * (self.bytes_per_state * self.num_layers)

    def read_bytes_in_blocks(self, context_tokens: int) -> int:
        """The same with partly filled blocks read whole."""
        if self.kind == "state":
            return self.constant_bytes * self.num_layers
        states = self.block_size_tokens // self.tokens_per_state or 1
        wanted = -(-context_tokens // self.tokens_per_state)
        if self.limit_states is not None:
            wanted = min(wanted, self.limit_states)
        return -(-wanted // states) * states * self.bytes_per_state * self.num_layers

    def slope_bytes_per_token(self, context_tokens: Number) -> Number:
        """d(read bytes)/d(context) of one request: zero once a window is full."""
        if self.kind == "state":
            return np.zeros_like(context_tokens, dtype=float)
        slope = self.bytes_per_state * self.num_layers / self.tokens_per_state
        if self.limit_states is None:
            return np.zeros_like(context_tokens, dtype=float) + slope
        return np.where(np.asarray(context_tokens) / self.tokens_per_state < self.limit_states, slope, 0.0)


class WeightPart(NamedTuple):
    """One part of the weights: resident bytes on one GPU, parameters a token passes through (whole model), dtype."""

    resident_bytes: int
    active_parameters: float
    format: str


@dataclass(frozen=True)
class Traffic:
    """Coefficients of a decode step of one replica, over all pipeline stages, for one GPU of each stage.

    Attributes:
        weights: part (attention, mlp, shared_expert, router, expert, head) → bytes and parameters.
        num_experts, top_k_experts: 0 for dense models.
        kv: how each kind of layer reads its cache.
        hidden_size, num_layers, num_moe_layers, vocab_size: shapes messages and logits follow from.
        num_kernels: kernels a decode step launches in its layers, collectives apart; see ``_num_kernels``.
        prefill_attention_flops: FLOPs of causal attention over all ranks, per (token × token of context) pair.

    """

    model: ModelConfig
    deployment: Deployment
    weights: dict[str, WeightPart]
    num_experts: int
    top_k_experts: int
    kv: tuple[KvRead, ...]
    num_layers: int
    num_moe_layers: int
    num_kernels: int
    prefill_attention_flops: float

    @property
    def dense_weight_bytes(self) -> int:
        """Weight bytes a step always reads."""
        return sum(part.resident_bytes for name, part in self.weights.items() if name != "expert")

    @property
    def expert_chance(self) -> float:
        """Chance that a token chooses a given expert: top k over the number of experts; 0 for dense models."""
        return min(self.top_k_experts / self.num_experts, 0.999) if self.num_experts else 0.0

    def expert_share_read(self, num_tokens: Number, evenness: float | None = None) -> Number:
        """Share of the experts that ``num_tokens`` tokens touch; ``evenness`` None is uniform routing."""
        if evenness is None:
            return 1 - np.power(1 - self.expert_chance, num_tokens)
        return touched_share(num_tokens, self.expert_chance, evenness)

    def weight_read_bytes(self, num_tokens: Number, evenness: float | None = None) -> Number:
        """Weight bytes one step of ``num_tokens`` tokens (over all data parallel ranks) reads on one GPU."""
        experts = self.weights["expert"].resident_bytes * self.expert_share_read(num_tokens, evenness)
        return self.dense_weight_bytes + experts

    def kv_read_bytes(self, context_tokens: Number, slowdown: float = 1.0) -> Number:
        """KV bytes one request reads on one rank, those in the KV format counted ``slowdown`` times."""
        zero = np.zeros_like(context_tokens, dtype=float)
        return sum((part.read_bytes(context_tokens) * part.weight(slowdown) for part in self.kv), zero)

    def kv_slope_bytes_per_token(self, context_tokens: Number, slowdown: float = 1.0) -> Number:
        """d(KV bytes read)/d(context) of one request on one rank, counted alike."""
        zero = np.zeros_like(context_tokens, dtype=float)
        return sum((part.slope_bytes_per_token(context_tokens) * part.weight(slowdown) for part in self.kv), zero)

    def kv_flops(self, context_tokens: Number) -> Number:
        """Attention FLOPs of one request in one step on one rank."""
        zero = np.zeros_like(context_tokens, dtype=float)
        return sum((p.states(context_tokens) * (p.flops_per_state * p.num_layers) for p in self.kv), zero)

    def matrix_flops_per_token(self, part: str) -> float:
        """FLOPs one token costs in a part of the weights, over all GPUs of a stage: two a parameter."""
        return 2 * self.weights[part].active_parameters

    @property
    def num_collectives(self) -> int:
        """All-reduces (or all-to-all pairs) of one step: two a layer when a stage has more than one GPU."""
        return 2 * self.num_layers if self.deployment.tp_group_size > 1 else 0

    def message_bytes(self, batch_per_rank: Number) -> Number:
        """Bytes one collective carries: the 16-bit hidden states of the tokens of one rank."""
        return batch_per_rank * (self.model.hidden_size * 2)

    def activation_bytes(self, batch_per_rank: Number) -> Number:
        """Hidden states written and read around each of a layer's matrix products, roughly eight a layer, 16-bit."""
        return batch_per_rank * (8 * 2 * self.model.hidden_size * self.num_layers)


def touched_share(num_tokens: Number, chance: Number, evenness: Number) -> Number:
    """Share of the experts that tokens touch when their popularity is Gamma with shape ``evenness``, s::

        1 − (1 + T·((1 − q)^(−1/s) − 1))^−s,    q the chance that one token chooses a given expert

    One token touches a share q. A large s is uniform routing, 1 − (1 − q)^T; a small one a few popular experts that
    most tokens choose.
    """
    return 1 - (1 + num_tokens * ((1 - chance) ** (-1 / evenness) - 1)) ** -evenness
