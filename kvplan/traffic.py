"""What one decode step moves and computes on one GPU: weights, KV, activations, collectives.

Coefficients are worked out once for a (model, weight format, deployment, KV format); bytes and FLOPs at a batch and a
context are then arithmetic on numbers or numpy arrays of any one shape. Stored and read bytes are different quantities:
a sliding window stores whole blocks and reads its window, a sparse layer stores the context and reads its top k, a
replicated KV head is stored and read on every rank that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvplan.deployment import Deployment
from kvplan.dtypes import weight_format
from kvplan.errors import UnsupportedError
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.pages import Page
from kvplan.model_config.types import (
    AttentionCache,
    CompressedLatentCache,
    IndexerCache,
    LatentCache,
    ModelConfig,
    StateCache,
)
from kvplan.weights import format_of, weight_bytes

Floats = npt.NDArray[np.float64]
Number = float | Floats
"""A float, or an array of them: formulas below take either."""

ATTENTION_ROLES = ("attention", "state", "indexer")
FOUR_BIT = ("nvfp4", "mxfp4", "int4")


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
    def resident_weight_bytes(self) -> int:
        """Weight bytes one GPU keeps, all stages together; the embedding is counted as large as the head."""
        head = self.weights["head"].resident_bytes
        return sum(part.resident_bytes for part in self.weights.values()) + head

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

    def kv_read_bytes(self, context_tokens: Number) -> Number:
        """KV bytes one request reads on one rank."""
        return sum((part.read_bytes(context_tokens) for part in self.kv), np.zeros_like(context_tokens, dtype=float))

    def kv_slope_bytes_per_token(self, context_tokens: Number) -> Number:
        """d(KV bytes read)/d(context) of one request on one rank."""
        zero = np.zeros_like(context_tokens, dtype=float)
        return sum((part.slope_bytes_per_token(context_tokens) for part in self.kv), zero)

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


def weight_dtypes(model: ModelConfig, asked: str | None) -> tuple[str | None, str | None, str]:
    """(override for attention and dense parts, override for experts, the precision class).

    Four-bit requests on a model with experts quantise the experts only, as published checkpoints do; a checkpoint that
    already stores them so is taken as it is. The class is what matrix kernels and calibrations go by: ``bf16``,
    ``fp8``, ``fp4`` or ``int4``.
    """
    stored = checkpoint_format(model)
    name = weight_format(asked).name if asked is not None else stored
    if asked is None or name == stored or (stored == "mxfp4" and name == "nvfp4"):
        return None, None, precision_class(stored)
    if model.is_moe and name in FOUR_BIT:
        return "bf16", name, precision_class(name)
    return name, name, precision_class(name)


def checkpoint_format(model: ModelConfig) -> str:
    """The format most of the checkpoint's matrices are in: that of its experts, else of its MLPs."""
    for role in ("expert", "mlp", "attention"):
        for index, weight in model.weights():
            if weight.role == role and weight.linear:
                found = format_of(model, weight, index)
                return found.name if found is not None else "bf16"
    return "bf16"


def precision_class(format_name: str) -> str:
    """``fp8_block`` → ``fp8``, ``mxfp4`` → ``fp4``, ``fp16`` → ``bf16``."""
    if format_name in ("nvfp4", "mxfp4"):
        return "fp4"
    if format_name.startswith(("fp8", "mxfp8")):
        return "fp8"
    return {"int4": "int4", "int8": "int8"}.get(format_name, "bf16")


def _role_format(model: ModelConfig, roles: tuple[str, ...], override: str | None) -> str:
    for index, weight in model.weights():
        if weight.role in roles and weight.linear and len(weight.shape) == 2:
            found = format_of(model, weight, index, override)
            return found.name if found is not None else "bf16"
    return "bf16"


def make_traffic(model: ModelConfig, plan: CachePlan, deployment: Deployment, weight_dtype: str | None) -> Traffic:
    """Work out the coefficients.

    Args:
        model: the model.
        plan: its cache under the engine's rules, with ``tp_size`` the attention TP size.
        deployment: ranks.
        weight_dtype: how weights are stored, None as in the checkpoint.

    Raises:
        UnsupportedError: the model has no layers to step through.

    """
    if not model.layers:
        raise UnsupportedError(f"{model.name} has no layers")
    top_k = max((layer.top_k_experts for layer in model.layers), default=0)
    num_experts = max((layer.num_experts for layer in model.layers), default=0)
    flops = _attention_flops(model)
    return Traffic(
        model=model,
        deployment=deployment,
        weights=_weight_parts(model, deployment, weight_dtype),
        num_experts=num_experts,
        top_k_experts=top_k,
        kv=_kv_reads(model, plan, deployment, flops),
        num_layers=model.num_layers,
        num_moe_layers=sum(layer.num_experts > 0 for layer in model.layers),
        num_kernels=_num_kernels(model),
        prefill_attention_flops=_prefill_flops(model),
    )


@lru_cache(maxsize=1024)
def _weight_parts(model: ModelConfig, deployment: Deployment, weight_dtype: str | None) -> dict[str, WeightPart]:
    """Part → what one GPU keeps of it; remembered, for no KV format changes it."""
    attention_dtype, expert_dtype, _ = weight_dtypes(model, weight_dtype)
    ranks = deployment.tp_group_size
    attention = weight_bytes(model, tp_size=deployment.attention_tp_size, weight_dtype=attention_dtype).by_role
    dense = weight_bytes(model, tp_size=ranks, weight_dtype=attention_dtype).by_role
    experts = weight_bytes(
        model, tp_size=ranks, ep_size=deployment.expert_parallel_size, weight_dtype=expert_dtype
    ).by_role
    active = _active_parameters(model)
    parts = {
        "attention": (sum(attention.get(role, 0) for role in ATTENTION_ROLES), ATTENTION_ROLES, attention_dtype),
        "mlp": (dense.get("mlp", 0), ("mlp",), attention_dtype),
        "shared_expert": (dense.get("shared_expert", 0), ("shared_expert",), attention_dtype),
        "router": (dense.get("router", 0), ("router",), attention_dtype),
        "expert": (experts.get("expert", 0), ("expert",), expert_dtype),
        "head": (dense.get("lm_head") or dense.get("embedding", 0), ("lm_head",), None),
    }
    weights = {
        name: WeightPart(size, sum(active.get(role, 0.0) for role in roles), _role_format(model, roles, dtype))
        for name, (size, roles, dtype) in parts.items()
    }
    weights["head"] = WeightPart(
        weights["head"].resident_bytes, active.get("lm_head") or active.get("embedding", 0.0), weights["head"].format
    )
    return weights


ATTENTION_KERNELS = {"full": 6, "sliding": 6, "chunked": 6, "mla": 11, "compressed": 14, "indexer": 7, "state": 8}
"""Cache kind → kernels of a layer that keeps it: projections, rope and cache write, attention and its merge."""
QK_NORM_KERNELS, MLP_KERNELS, EXPERT_KERNELS, SHARED_EXPERT_KERNELS = 2, 5, 10, 3
"""Norms of q and k; norm, two products, activation and its quantisation; router, top k, permutation and the same for
experts; a shared expert beside them. Counted from how vLLM, SGLang and TensorRT-LLM write these layers."""


@lru_cache(maxsize=512)
def _num_kernels(model: ModelConfig) -> int:
    distinct = {id(layer): layer for layer in model.layers}
    count = {}
    for key, layer in distinct.items():
        roles = {weight.role for weight in layer.weights}
        count[key] = (
            sum(ATTENTION_KERNELS[cache.kind] for cache in layer.caches)
            + QK_NORM_KERNELS * any(weight.name.endswith("q_norm") for weight in layer.weights)
            + (EXPERT_KERNELS if layer.num_experts else MLP_KERNELS)
            + SHARED_EXPERT_KERNELS * ("shared_expert" in roles)
        )
    return sum(count[id(layer)] for layer in model.layers)


def _active_parameters(model: ModelConfig) -> dict[str, float]:
    """Role → parameters one token passes through, whole model."""
    found: dict[str, float] = {}
    for weight in model.outer_weights:
        found[weight.role] = found.get(weight.role, 0.0) + weight.num_parameters
    for layer in model.layers:
        share = layer.top_k_experts / layer.num_experts if layer.num_experts else 1.0
        for weight in layer.weights:
            count = weight.num_parameters * (share if weight.role == "expert" else 1.0)
            found[weight.role] = found.get(weight.role, 0.0) + count
    return found


def _cache_flops(cache: Any) -> float:
    """FLOPs one query token costs per cached token in one layer, all heads: two products of two FLOPs an element."""
    if isinstance(cache, AttentionCache):
        return 2.0 * cache.num_q_heads * (cache.head_dim + cache.head_dim_v)
    if isinstance(cache, LatentCache):
        return 2.0 * cache.num_q_heads * (2 * cache.latent_dim + cache.rope_dim)
    if isinstance(cache, IndexerCache):
        return 2.0 * cache.num_index_heads * cache.head_dim
    if isinstance(cache, CompressedLatentCache):
        return 4.0 * cache.num_q_heads * cache.head_dim
    return 0.0


def _attention_flops(model: ModelConfig) -> dict[str, float]:
    """Cache kind → FLOPs of one layer per state read, averaged over the layers that have it."""
    sums: dict[str, list[float]] = {}
    for layer in model.layers:
        for cache in layer.caches:
            sums.setdefault(cache.kind, []).append(_cache_flops(cache))
    found = {kind: sum(values) / len(values) for kind, values in sums.items()}
    if "compressed" in found:
        found |= {"mla": found["compressed"], "sliding_mla": found["compressed"]}
    return found


def _prefill_flops(model: ModelConfig) -> float:
    """FLOPs per (token, earlier token) pair of prefill in layers whose reach grows with the context.

    Latent attention prefills with expanded heads (DeepSeek-V2 section 2.1), about a quarter of the absorbed form.
    """
    total = 0.0
    for layer in model.layers:
        for cache in layer.caches:
            if isinstance(cache, LatentCache):
                total += _cache_flops(cache) * 0.25
            elif isinstance(cache, AttentionCache) and cache.kind == "full":
                total += _cache_flops(cache)
    return total


def _top_k(model: ModelConfig, page: Page) -> int | None:
    """States a sparse layer reads of its latents, or None when it reads all."""
    if page.kind != "mla":
        return None
    for layer in model.layers:
        for cache in layer.caches:
            if isinstance(cache, LatentCache) and cache.top_k_tokens:
                return cache.top_k_tokens
            if isinstance(cache, CompressedLatentCache) and cache.ratio == page.tokens_per_state == 4:
                return cache.top_k_tokens
    return None


def _kv_reads(
    model: ModelConfig, plan: CachePlan, deployment: Deployment, flops: dict[str, float]
) -> tuple[KvRead, ...]:
    """One entry per distinct page, its layers over all groups added up."""
    layers: dict[Page, int] = {}
    for group in plan.groups:
        for run in group.runs:
            layers[run.page] = layers.get(run.page, 0) + run.num_layers
    states = [c for layer in model.layers for c in layer.caches if isinstance(c, StateCache)]
    found = []
    for page, count in layers.items():
        limit = _top_k(model, page) if page.window_tokens is None else -(-page.window_tokens // page.tokens_per_state)
        found.append(
            KvRead(
                kind=page.kind,
                num_layers=count,
                bytes_per_state=page.num_heads * page.slot_bytes,
                scale_bytes_per_state=page.num_heads * page.scale_bytes,
                block_size_tokens=page.block_size_tokens,
                tokens_per_state=page.tokens_per_state * plan.dcp_size,
                limit_states=limit,
                constant_bytes=2 * page.state_bytes if states else 0,
                flops_per_state=flops.get(page.kind, 0.0) / deployment.attention_tp_size,
            )
        )
    return tuple(found)
