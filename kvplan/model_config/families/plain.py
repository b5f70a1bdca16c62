"""Decoder families of softmax attention and an MLP or experts: Llama, Mistral, Qwen, Gemma, Phi, GPT-OSS …

One table of traits says how a family differs; one reader builds the layers. A family that needs more than traits has a
small function of its own in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvplan.model_config.families.blocks import (
    AttentionShape,
    Parts,
    attention,
    attention_shape,
    embeddings,
    gated_mlp,
    layer_kinds,
    moe,
    norm,
    plain_mlp,
    share_equal,
)
from kvplan.model_config.fields import MAX_COUNT, Fields
from kvplan.model_config.types import Layer, Weight

WindowRule = Callable[[Fields, int, int], bool]
"""(fields, layer index, number of layers) → whether the layer has the sliding window."""


def _always(fields: Fields, index: int, num_layers: int) -> bool:
    return True


def _every_other(fields: Fields, index: int, num_layers: int) -> bool:
    return index % 2 == 0


def _pattern(default: int) -> WindowRule:
    """All but every N-th layer slide; N from ``sliding_window_pattern``, else ``default``.

    EXAONE spells the pattern out, as ``LLLG``; its last layer is always full.
    """

    def rule(fields: Fields, index: int, num_layers: int) -> bool:
        letters = fields.raw("sliding_window_pattern")
        if isinstance(letters, str) and letters and set(letters) <= {"L", "G"}:
            return letters[index % len(letters)] == "L" and index < num_layers - 1
        period = fields.integer("sliding_window_pattern", "_sliding_window_pattern", default=default)
        return (index + 1) % period != 0

    return rule


def _upper_layers(fields: Fields, index: int, num_layers: int) -> bool:
    """Qwen2's rule: with ``use_sliding_window``, layers from ``max_window_layers`` on slide."""
    return fields.boolean("use_sliding_window") and index >= fields.integer(
        "max_window_layers", default=num_layers, low=0
    )


@dataclass(frozen=True)
class Traits:
    """How a plain family differs from Llama.

    Without a rule of its own, a ``sliding_window`` holds for every layer, as vLLM applies it when a config has no
    ``layer_types`` (``engine/arg_utils.py``). ``window_default`` is the family's window when the config has no
    ``sliding_window`` at all (an explicit null means none), as Transformers' configuration classes default it;
    ``window_extra`` widens the stated window.
    """

    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: str = "none"
    norms: int = 2
    tied: bool = False
    gated: bool = True
    mlp_bias: bool = False
    window: WindowRule = _always
    window_default: int | None = None
    window_extra: int = 0
    head_dim_default: int | None = None
    sinks: bool = False
    shared_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    experts_in_intermediate: bool = False
    expert_module: str = "mlp"
    shared_module: str = "shared_experts"


LLAMA = Traits()
PLAIN = Traits(gated=False, qkv_bias=True, o_bias=True, mlp_bias=True)
TRAITS: dict[str, Traits] = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, window_default=4096),
    "mixtral": replace(LLAMA, experts_in_intermediate=True, expert_module="block_sparse_moe"),
    "ministral": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True, window=_upper_layers),
    "qwen2_moe": replace(LLAMA, qkv_bias=True, window=_upper_layers, shared_gate=True, shared_module="shared_expert"),
    "qwen3": replace(LLAMA, qk_norm="head", window=_upper_layers, head_dim_default=128),
    "qwen3_moe": replace(LLAMA, qk_norm="head", window=_upper_layers),
    "mimo": replace(LLAMA, qkv_bias=True, window=_upper_layers),
    "gemma": replace(LLAMA, tied=True, head_dim_default=256),
    "gemma2": replace(LLAMA, tied=True, norms=4, window=_every_other, window_default=4096, head_dim_default=256),
    "gemma3_text": replace(LLAMA, tied=True, norms=4, qk_norm="head", window=_pattern(6), window_default=4096,
                           head_dim_default=256),
    "phi3": LLAMA,
    "gpt_oss": replace(LLAMA, qkv_bias=True, o_bias=True, head_dim_default=64, sinks=True, window=_every_other,
                       router_bias=True, expert_bias=True, experts_in_intermediate=True),
    "minimax_m2": replace(LLAMA, qk_norm="full", router_bias=True, experts_in_intermediate=True,
                          expert_module="block_sparse_moe"),
    "glm4": replace(LLAMA, qkv_bias=True, norms=4),
    "glm4_moe": replace(LLAMA, router_bias=True),
    "cohere2": replace(LLAMA, tied=True, norms=1, window=_pattern(4), window_extra=1),
    "olmo2": replace(LLAMA, qk_norm="full"),
    "olmo3": replace(LLAMA, qk_norm="full", window=_pattern(4)),
    "smollm3": replace(LLAMA, tied=True),
    "granite": LLAMA,
    "seed_oss": replace(LLAMA, qkv_bias=True),
    "ernie4_5": replace(LLAMA, tied=True),
    "exaone4": replace(LLAMA, qk_norm="head", window=_pattern(4)),
    "hunyuan_v1_dense": replace(LLAMA, qk_norm="head"),
    "cohere": replace(LLAMA, tied=True, norms=1),
    "starcoder2": replace(PLAIN, tied=True),
    "gpt_neox": PLAIN,
    "opt": replace(PLAIN, tied=True),
    "bloom": replace(PLAIN, tied=True),
    "gpt2": replace(PLAIN, tied=True),
}  # fmt: skip
"""Traits by ``model_type``."""


def read_plain(fields: Fields, traits: Traits) -> Parts:
    """Build a plain decoder from its config."""
    shape = attention_shape(fields, head_dim_default=traits.head_dim_default)
    num_layers = fields.num_layers
    vocab = fields.integer("vocab_size")
    window = fields.optional_integer("sliding_window", low=0, high=2**31) or None
    if "sliding_window" not in fields.data:
        window = traits.window_default
    if "use_sliding_window" in fields.data and not fields.boolean("use_sliding_window"):
        window = None
    if window is not None:
        window += traits.window_extra
    kinds = layer_kinds(
        fields, num_layers,
        lambda i: "sliding_attention" if window and traits.window(fields, i, num_layers) else "full_attention",
    )  # fmt: skip
    chunk = fields.optional_integer("attention_chunk_size", high=2**31)
    layers = [_layer(fields, traits, shape, index, kind, window, chunk) for index, kind in enumerate(kinds)]
    outer = embeddings(fields, shape.hidden, vocab, tied_default=traits.tied)
    return Parts(share_equal(layers), outer)


def _layer(fields: Fields, traits: Traits, shape: AttentionShape, index: int, kind: str, window: int | None,
           chunk: int | None) -> Layer:  # fmt: skip
    if kind not in ("full_attention", "sliding_attention", "chunked_attention", "attention"):
        raise fields.fail(f"layer_types[{index}]", f"is {kind!r}, which this family has no layer for")
    if kind == "sliding_attention" and window is None:
        raise fields.fail("sliding_window", "is missing though layer_types name sliding_attention")
    bias = fields.boolean("attention_bias", "qkv_bias", "use_qkv_bias", default=bool(traits.qkv_bias))
    o_bias = fields.boolean("attention_bias", default=bool(traits.o_bias)) if traits.o_bias is not False else False
    if traits.qkv_bias and not traits.o_bias:
        o_bias = False
    qk_norm = traits.qk_norm
    if fields.has("use_qk_norm"):
        qk_norm = (qk_norm if qk_norm != "none" else "head") if fields.boolean("use_qk_norm") else "none"
    caches, weights = attention(
        shape,
        bias=bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        sinks=traits.sinks,
        window_tokens=window if kind == "sliding_attention" else None,
        chunk_tokens=chunk if kind == "chunked_attention" else None,
    )
    norms = tuple(norm(f"norm_{n}", shape.hidden) for n in range(traits.norms))
    experts, mlp = mlp_or_experts(fields, traits, shape.hidden, index)
    chosen = ("num_experts_per_tok", "experts_per_token", "top_k_experts", "moe_topk", "moe_k")
    top_k = fields.integer(*chosen, default=1) if experts else 0
    return Layer(caches, (*weights, *mlp, *norms), min(top_k, experts), experts)


SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")


def num_experts_of(fields: Fields) -> int:
    """Routed experts of an MoE layer; 0 for a dense model."""
    return fields.integer("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", default=0, low=0,
                          high=MAX_COUNT)  # fmt: skip


def is_expert_layer(fields: Fields, index: int) -> bool:
    """Whether layer ``index`` routes to experts, by any of the field's conventions."""
    if not num_experts_of(fields):
        return False
    dense = fields.integers("mlp_only_layers")
    if dense is not None and index in dense:
        return False
    first_dense = fields.integer("first_k_dense_replace", "moe_layer_start_index", default=0, low=0)
    if index < first_dense:
        return False
    frequency = fields.raw("moe_layer_freq")
    if isinstance(frequency, list):
        flags = fields.integers("moe_layer_freq", high=1) or []
        return index < len(flags) and flags[index] == 1
    if frequency is not None and index % fields.integer("moe_layer_freq"):
        return False
    step = fields.integer("decoder_sparse_step", default=1, low=0)
    return step > 0 and (index + 1) % step == 0


def mlp_or_experts(fields: Fields, traits: Traits, hidden: int, index: int) -> tuple[int, tuple[Weight, ...]]:
    """(number of experts or 0, weights of the layer's feed-forward part)."""
    if not is_expert_layer(fields, index):
        names = ("dense_intermediate_size", "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
        inner = fields.integer(*names, default=4 * hidden)
        bias = fields.boolean("mlp_bias", default=traits.mlp_bias)
        return 0, (gated_mlp if traits.gated else plain_mlp)(hidden, inner, bias=bias)
    experts = num_experts_of(fields)
    inner_names = (
        ("intermediate_size",) if traits.experts_in_intermediate else ("moe_intermediate_size", "intermediate_size")
    )
    inner = fields.integer(*inner_names)
    shared = fields.integer("shared_expert_intermediate_size", "share_expert_dim", default=0, low=0)
    if not shared:
        shared = fields.integer(*SHARED, default=0, low=0, high=MAX_COUNT) * inner
    return experts, moe(
        hidden,
        experts,
        inner,
        shared_intermediate=shared,
        shared_gate=traits.shared_gate,
        router_bias=traits.router_bias,
        expert_bias=traits.expert_bias,
        gated=traits.gated,
        name=traits.expert_module,
        shared_name=traits.shared_module,
    )
