"""From a config.json (as parsed JSON) to a ``ModelConfig``. No model code is ever run; unknown families are refused
unless their fields describe plain attention, and then the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvplan.model_config.families import find_family
from kvplan.model_config.families.vision import stated_vision, vision_weights
from kvplan.model_config.fields import Fields
from kvplan.model_config.quantization import read_quantization
from kvplan.model_config.types import ExactWeights, ModelConfig

TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")

_DTYPES = {"bfloat16", "float16"}


def read_model_config(
    data: Mapping[str, Any],
    *,
    where: str,
    name: str,
    source: str,
    hf_quant: Mapping[str, Any] | None = None,
    exact_weights: ExactWeights | None = None,
) -> ModelConfig:
    """Build a ``ModelConfig`` from a Hugging Face config.

    Args:
        data: config.json as an object.
        where: what error messages call the file.
        name: what the user is shown.
        source: where the facts come from.
        hf_quant: hf_quant_config.json, when the checkpoint has one.
        exact_weights: bytes read from safetensors, when there.

    Raises:
        ConfigError: a field is missing or cannot be true; the message names the file and the field.

    """
    outer = Fields(data, where)
    fields = _text_fields(outer)
    architectures = outer.strings("architectures") or fields.strings("architectures") or []
    architecture = architectures[0] if architectures else ""
    model_type = fields.text("model_type") or outer.text("model_type")
    family = find_family(architecture, outer.text("model_type"), model_type, fields)
    parts = family.read(fields)
    notes = [*parts.notes]
    if family.guessed:
        shown = architecture or model_type or "no architecture named"
        notes.append(f"unknown family ({shown}): planned as plain attention and gated MLPs from its fields; check the "
                     "layer kinds, and the weights (--weights-memory)")  # fmt: skip
    dtype = fields.text("torch_dtype", "dtype") or outer.text("torch_dtype", "dtype") or "bfloat16"
    dtype = dtype.removeprefix("torch.")
    quant_fields = Fields(hf_quant, f"{where} (hf_quant_config.json)") if hf_quant is not None else None
    declares = (
        outer.has("quantization_config") or outer.has("compression_config") or not fields.has("quantization_config")
    )
    quantization = read_quantization(outer if declares else fields, quant_fields)
    if dtype == "float32" and quantization is None:
        exact_weights = None if exact_weights is None else exact_weights.in_16_bits()
        notes.append("a float32 checkpoint: engines load 16 bits a weight unless told otherwise")
    vision = vision_weights(outer)
    return ModelConfig(
        name=name,
        source=source,
        architecture=architecture or model_type,
        model_type=model_type,
        hidden_size=fields.integer("hidden_size", "n_embd", "d_model"),
        vocab_size=fields.integer("vocab_size", default=262144),
        layers=tuple(parts.layers),
        outer_weights=(*parts.outer_weights, *vision),
        max_context_tokens=_max_context(fields),
        dtype=dtype if dtype in _DTYPES else "bfloat16",
        quantization=quantization,
        mtp_weights=tuple(parts.mtp_weights),
        exact_weights=exact_weights,
        notes=tuple(notes),
        family=family.name,
        extra=parts.extra,
        vision_config=stated_vision(outer),
    )


def _text_fields(outer: Fields) -> Fields:
    """The language model's own fields: nested in multimodal configs, else the file itself."""
    for name in TEXT_CONFIGS:
        if isinstance(outer.data.get(name), dict) and (child := outer.child(name)) is not None:
            inner = _text_fields(child)
            merged = {**inner.data}
            if "tie_word_embeddings" not in merged and "tie_word_embeddings" in outer.data:
                merged["tie_word_embeddings"] = outer.data["tie_word_embeddings"]
            return Fields(merged, inner.where)
    return outer


def _max_context(fields: Fields) -> int | None:
    """The longest context the config claims, YaRN and similar scaling left as the file states it."""
    return fields.optional_integer(
        "max_position_embeddings", "max_sequence_length", "n_positions", "seq_length", "model_max_length", high=2**40
    )
