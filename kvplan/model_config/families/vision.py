"""Weights of vision towers that sit beside a language model. They hold memory and no KV cache."""

from __future__ import annotations

from kvplan.model_config.families.blocks import linear, norm
from kvplan.model_config.fields import MAX_COUNT, Fields
from kvplan.model_config.types import Weight

GATED_TOWERS = ("pixtral", "gemma4_vision", "mistral3")
"""Towers whose MLP has a gate and whose linear layers have no biases."""


def stated_vision(outer: Fields) -> dict[str, int] | None:
    """Layers and width of ``vision_config`` where it states them by CLIP's names, or with Kimi's ``vt_`` before these,
    which engines drop; None without a tower.
    """
    fields = outer.child("vision_config")
    if fields is None:
        return None
    found = {name: fields.optional_integer(name, f"vt_{name}") for name in ("num_hidden_layers", "hidden_size")}
    return {name: value for name, value in found.items() if value is not None}


def vision_weights(outer: Fields) -> list[Weight]:
    """The tower described by ``vision_config``, or nothing when the config gives no dimensions.

    A ViT: patch embedding, ``depth`` blocks of attention and an MLP (gated without biases in Pixtral and Gemma 4, two
    matrices with biases elsewhere), a position table when its size is stated, and the mergers or projectors that lead
    to the language model.
    """
    fields = outer.child("vision_config")
    if fields is None or not fields.has("hidden_size"):
        return []
    hidden = fields.integer("embed_dim", "hidden_size")  # Qwen2-VL's hidden_size is the language model's
    depth = fields.integer("depth", "num_hidden_layers", default=0, low=0, high=4096)
    inner = fields.integer("intermediate_size", default=4 * hidden)
    gated = fields.text("model_type") in GATED_TOWERS or outer.text("model_type") in ("gemma4", "mistral3")
    weights = _embeddings(fields, hidden)
    if depth:
        weights += _blocks(hidden, inner, depth, gated)
    return weights + _mergers(outer, fields, hidden)


def _embeddings(fields: Fields, hidden: int) -> list[Weight]:
    patch = fields.integer("patch_size", default=16, high=4096)
    temporal = fields.integer("temporal_patch_size", default=1, high=64)
    channels = fields.integer("in_channels", "in_chans", "num_channels", default=3, high=64)
    size = (hidden, channels * temporal * patch * patch)
    weights = [Weight("visual.patch_embed", "vision", size, "replicated", linear=False)]
    positions = fields.optional_integer("num_position_embeddings", high=MAX_COUNT * 16)
    if positions is None and fields.has("position_embedding_size"):
        positions = 2 * fields.integer("position_embedding_size", high=MAX_COUNT)
    if positions:
        weights.append(Weight("visual.pos_embed", "vision", (positions, hidden), "replicated", linear=False))
    return weights


def _blocks(hidden: int, inner: int, depth: int, gated: bool) -> list[Weight]:
    bias = not gated
    weights = [
        *linear("visual.attn.qkv", "vision", 3 * hidden, hidden, "column", bias, copies=depth),
        *linear("visual.attn.proj", "vision", hidden, hidden, "row", bias, copies=depth),
        *linear("visual.mlp.fc1", "vision", inner, hidden, "column", bias, copies=depth),
        *linear("visual.mlp.fc2", "vision", hidden, inner, "row", bias, copies=depth),
        norm("visual.norms", (2 if gated else 4) * hidden, copies=depth),
    ]
    if gated:
        weights += linear("visual.mlp.gate", "vision", inner, hidden, "column", copies=depth)
    return weights


def _mergers(outer: Fields, fields: Fields, hidden: int) -> list[Weight]:
    """Qwen-VL's patch mergers, or Mistral's merger and projector."""
    merge = fields.optional_integer("spatial_merge_size", high=64)
    out = fields.optional_integer("out_hidden_size") or (
        fields.optional_integer("hidden_size") if fields.has("embed_dim") else None
    )
    if merge and out:
        merged = hidden * merge * merge
        copies = 1 + len(fields.integers("deepstack_visual_indexes") or [])
        return [
            *linear("visual.merger.fc1", "vision", merged, merged, "column", True, copies=copies),
            *linear("visual.merger.fc2", "vision", out, merged, "row", True, copies=copies),
        ]
    merge = outer.optional_integer("spatial_merge_size", high=64)
    text = outer.child("text_config")
    if merge and text is not None and text.has("hidden_size"):
        width = text.integer("hidden_size")
        return [
            *linear("visual.patch_merger", "vision", hidden, hidden * merge * merge, "replicated"),
            *linear("visual.projector.fc1", "vision", width, hidden, "column"),
            *linear("visual.projector.fc2", "vision", width, width, "row"),
        ]
    return []
