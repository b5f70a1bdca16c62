"""What kvplan knows about a model: its layers, what each layer keeps per token, and the shapes of its weights.

Nothing here depends on an engine, a precision of the cache or a parallelism. Shapes are global (before TP).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

Sharding = Literal["column", "row", "kv", "expert", "vocab", "replicated"]
"""How tensor parallelism splits a weight. ``kv`` splits by KV head and replicates beyond one head a rank; ``expert``
splits by expert under expert parallelism and like a column otherwise."""

Role = Literal[
    "attention", "state", "indexer", "mlp", "expert", "shared_expert", "router", "norm",
    "embedding", "lm_head", "vision", "mtp",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight, or ``copies`` of it (experts).

    Attributes:
        name: module path inside its layer as Hugging Face names it, e.g. ``self_attn.q_proj``; absolute for weights
            outside the layers.
        shape: ``(out_features, in_features)`` of a linear layer, or any shape for what is never quantised.
        linear: whether quantisation schemes may apply.

    """

    name: str
    role: Role
    shape: tuple[int, ...]
    sharding: Sharding
    copies: int = 1
    linear: bool = True

    @property
    def num_parameters(self) -> int:
        """Elements in all copies."""
        return prod(self.shape) * self.copies


@dataclass(frozen=True, slots=True)
class AttentionCache:
    """Softmax attention that caches K and V for each KV head.

    ``window_tokens`` (sliding window) and ``chunk_tokens`` (chunked local attention) are None for full attention.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    window_tokens: int | None = None
    chunk_tokens: int | None = None

    @property
    def kind(self) -> Literal["full", "sliding", "chunked"]:
        """``full``, ``sliding`` or ``chunked``."""
        if self.window_tokens is not None:
            return "sliding"
        return "chunked" if self.chunk_tokens is not None else "full"


@dataclass(frozen=True, slots=True)
class LatentCache:
    """Multi-head latent attention: one latent of ``latent_dim`` + ``rope_dim`` per token, shared by all heads.

    ``top_k_tokens`` is set for sparse attention: how many tokens a step reads. Source: DeepSeek-V2 (arXiv 2405.04434).
    """

    num_q_heads: int
    latent_dim: int
    rope_dim: int
    top_k_tokens: int | None = None

    @property
    def kind(self) -> str:
        """``mla``."""
        return "mla"


@dataclass(frozen=True, slots=True)
class IndexerCache:
    """Keys of a sparse-attention indexer: ``head_dim`` FP8 values and one FP32 scale per 128 of them, per token.

    ``num_kv_heads`` and ``element`` describe indexers that keep one bf16 key per KV head instead.
    Source: DeepSeek-V3.2-Exp report; vLLM ``vllm/models/deepseek_v32``.
    """

    head_dim: int
    num_index_heads: int
    element: Literal["fp8_scaled", "bf16"] = "fp8_scaled"

    @property
    def kind(self) -> str:
        """``indexer``."""
        return "indexer"

    @property
    def payload_bytes(self) -> int:
        """Bytes of the key elements of one token."""
        return self.head_dim * (1 if self.element == "fp8_scaled" else 2)

    @property
    def scale_bytes(self) -> int:
        """Bytes of FP32 scales of one token."""
        return 4 * -(-self.head_dim // 128) if self.element == "fp8_scaled" else 0


StateFamily = Literal["mamba1", "mamba2", "gdn", "kda", "lightning", "short_conv"]


@dataclass(frozen=True, slots=True)
class StateCache:
    """A recurrent state of constant size per request.

    Attributes:
        family: which recurrence; engines treat them differently.
        conv_channels: channels of the rolling convolution window, split in TP groups; ``conv_groups`` of
            ``conv_group_dim`` extra channels each are B and C of Mamba2, replicated when TP exceeds the groups.
        conv_width: kernel width; the window keeps ``conv_width - 1`` tokens.
        state_shape: the recurrent state before TP; its first dimension (or second for ``mamba1``) is split.
        state_dtype: torch dtype of the recurrent state; None follows the model dtype.
        conv_parts: separate convolution windows (Kimi Delta Attention keeps one for q, k and v each).

    """

    family: StateFamily
    conv_channels: int
    conv_width: int
    state_shape: tuple[int, ...]
    state_dtype: str | None = None
    conv_groups: int = 0
    conv_group_dim: int = 0
    conv_parts: int = 1

    @property
    def kind(self) -> str:
        """``state``."""
        return "state"


@dataclass(frozen=True, slots=True)
class CompressedLatentCache:
    """DeepSeek-V4 attention: a short sliding window of latents plus latents compressed ``ratio`` to one.

    ``ratio`` 0 keeps the window only; ratio 4 adds an indexer. Source: DeepSeek-V4 ``compress_ratios``;
    vLLM ``vllm/models/deepseek_v4``.
    """

    num_q_heads: int
    head_dim: int
    window_tokens: int
    ratio: int
    index_head_dim: int
    top_k_tokens: int

    @property
    def kind(self) -> str:
        """``compressed``."""
        return "compressed"


Cache = AttentionCache | LatentCache | IndexerCache | StateCache | CompressedLatentCache


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: what it caches and what it weighs. Equal layers share one object."""

    caches: tuple[Cache, ...]
    weights: tuple[Weight, ...]
    top_k_experts: int = 0
    num_experts: int = 0


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint says its linear weights and its KV cache are stored.

    Attributes:
        method: the checkpoint's own word (``fp8``, ``modelopt``, ``compressed-tensors``, ``awq``, ``mxfp4`` …).
        weight_format: default format of linear layers, a key of ``kvplan.dtypes.WEIGHT_FORMATS``.
        role_formats: formats that differ by role (``expert`` → ``nvfp4``).
        excluded: module patterns left in 16 bits (glob, or ``re:`` regular expression).
        per_module: module pattern → format, for mixed checkpoints.
        kv_cache_format: the KV format engines take from the checkpoint for ``auto``, or None.
        kv_cache_declared: the KV format the checkpoint names, whether or not engines pick it up.
        group: elements per scale along the input dimension, where the checkpoint says.

    """

    method: str
    weight_format: str
    role_formats: tuple[tuple[str, str], ...] = ()
    excluded: tuple[str, ...] = ()
    per_module: tuple[tuple[str, str], ...] = ()
    kv_cache_format: str | None = None
    kv_cache_declared: str | None = None
    group: int | None = None


@dataclass(frozen=True, eq=False)
class ModelConfig:
    """A model as kvplan plans it. Compared by identity, so that what is derived from it can be remembered.

    Attributes:
        name: what the user is shown.
        source: where the facts come from (file or address).
        architecture: Hugging Face class name.
        layers: decoder layers in order; MTP and draft layers are not among them.
        outer_weights: embeddings, LM head, final norm, vision tower.
        max_context_tokens: the longest context the checkpoint claims.
        dtype: torch dtype of unquantised weights.
        quantization: None for a 16-bit checkpoint.
        notes: what the reader assumed or left out, for people.
        vision_config: of a model with a vision tower, what its config states of ``num_hidden_layers`` and
            ``hidden_size`` under these names; None without one.

    """

    name: str
    source: str
    architecture: str
    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    outer_weights: tuple[Weight, ...]
    max_context_tokens: int | None
    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    mtp_weights: tuple[Weight, ...] = ()
    exact_weights: ExactWeights | None = None
    notes: tuple[str, ...] = ()
    family: str = "plain"
    extra: dict[str, int] = field(default_factory=dict)
    vision_config: dict[str, int] | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    def weights(self) -> Iterator[tuple[int | None, Weight]]:
        """Every weight with the index of its layer (None outside the layers)."""
        for weight in self.outer_weights:
            yield None, weight
        for index, layer in enumerate(self.layers):
            for weight in layer.weights:
                yield index, weight

    @cached_property
    def num_parameters(self) -> int:
        """Logical parameters, MTP left out: unpacked, unquantised element count."""
        return sum(weight.num_parameters for _, weight in self.weights())

    @cached_property
    def num_active_parameters(self) -> int:
        """Parameters one token passes through: of each expert bank, only ``top_k_experts`` of the experts."""
        total = sum(w.num_parameters for w in self.outer_weights if w.role not in ("vision",))
        for layer in self.layers:
            for weight in layer.weights:
                share = layer.top_k_experts / layer.num_experts if weight.role == "expert" and layer.num_experts else 1
                total += int(weight.num_parameters * share)
        return total

    @cached_property
    def is_moe(self) -> bool:
        """Whether any layer routes to experts."""
        return any(layer.num_experts for layer in self.layers)

    @cached_property
    def cache_kinds(self) -> frozenset[str]:
        """The kinds of cache its layers keep: ``full``, ``sliding``, ``chunked``, ``mla``, ``indexer``, ``state``."""
        return frozenset(cache.kind for layer in self.layers for cache in layer.caches)


@dataclass(frozen=True, slots=True)
class ExactWeights:
    """Weight bytes read from safetensors headers or an index.

    Attributes:
        total_bytes: bytes of every tensor.
        tensors: tensor name, bytes, and bytes with 16 bits a value at most, when headers were read; empty for a bare
            index.
        source: file it was read from.

    """

    total_bytes: int
    source: str
    tensors: tuple[tuple[str, int, int], ...] = ()

    def in_16_bits(self) -> ExactWeights:
        """What an engine loads of a float32 checkpoint; a bare index is of 32 bits throughout."""
        narrow = tuple((name, size, size) for name, _, size in self.tensors)
        total = sum(size for _, size, _ in narrow) if narrow else self.total_bytes // 2
        return ExactWeights(total, f"{self.source}, 16 bits a value", narrow)


def beyond_claim(tokens: int, claimed_tokens: int | None) -> str | None:
    """What is to be said of a request longer than the checkpoint claims to read; None of others."""
    if claimed_tokens is None or tokens <= claimed_tokens:
        return None
    return (
        f"{tokens:,} tokens is beyond the {claimed_tokens:,} the checkpoint claims: engines refuse it unless told to "
        "scale RoPE"
    )
