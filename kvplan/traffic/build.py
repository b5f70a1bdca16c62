"""From a model, its cache under an engine's rules and the ranks to the coefficients of a step."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from kvplan.deployment import Deployment
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
from kvplan.traffic.precision import role_format, weight_dtypes
from kvplan.traffic.terms import KvRead, Traffic, WeightPart
from kvplan.weights import weight_bytes

ATTENTION_ROLES = ("attention", "state", "indexer")


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
        name: WeightPart(size, sum(active.get(role, 0.0) for role in roles), role_format(model, roles, dtype))
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
                flops_per_state=flops.get(page.kind, 0.0) * plan.dcp_size / deployment.attention_tp_size,
            )
        )
    return tuple(found)
