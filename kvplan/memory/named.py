"""The model and the GPU that a request names, or describes by its numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import lcm

from kvplan.errors import InputError
from kvplan.gpu import GpuSpec, custom_gpu, resolve_gpu
from kvplan.memory.request import SizeRequest
from kvplan.model_config import resolve_model
from kvplan.model_config.reader import read_model_config
from kvplan.model_config.types import AttentionCache, ModelConfig

EVERY_TP = lcm(*range(1, 129))
"""A number of query heads that divides by whatever tensor parallelism there is, for models given by flags."""


def model_of(request: SizeRequest) -> tuple[ModelConfig, bool]:
    """The model that is named, and whether one is: without a name it is plain attention of the shape that is given.

    Raises:
        KvplanError: the name is unknown, its files cannot be read, or the model is described twice or in part.

    """
    shape = {"--layers": request.num_layers, "--kv-heads": request.num_kv_heads, "--head-dim": request.head_dim}
    given = [flag for flag, value in shape.items() if value is not None]
    if request.model is not None:
        others = {"--params": request.num_parameters, "--window": request.window_tokens}
        given += [flag for flag, value in others.items() if value is not None]
        if given:
            raise InputError(f"--model and {given[0]} describe the model twice", hint="give one or the other")
        return resolve_model(request.model), True
    missing = [flag for flag, value in shape.items() if value is None]
    if missing:
        what = f"{', '.join(given)} given, {' and '.join(missing)} missing" if given else "no model given"
        raise InputError(
            what, hint="--model 70b, a hub id, a folder or a config.json; or --layers, --kv-heads and --head-dim"
        )
    return _model_from_flags(request.num_layers, request.num_kv_heads, request.head_dim, request.window_tokens), False


@lru_cache(maxsize=64)
def _model_from_flags(
    layers: int | None, kv_heads: int | None, head_dim: int | None, window: int | None
) -> ModelConfig:
    """Plain attention of the stated shape. Query heads are taken as a multiple of everything, so no TP is refused."""
    assert layers is not None and kv_heads is not None and head_dim is not None
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": min(kv_heads * head_dim, 2**24),
        "intermediate_size": 1,
        "vocab_size": 1,
    }
    if window is not None:
        config |= {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": min(window, 2**31),
        }
    model = read_model_config(config, where="flags", name="custom", source="--layers, --kv-heads and --head-dim")
    layers_any_tp = []
    for layer in model.layers:
        caches = tuple(
            replace(c, num_q_heads=EVERY_TP * kv_heads) for c in layer.caches if isinstance(c, AttentionCache)
        )
        layers_any_tp.append(replace(layer, caches=caches))
    return replace(model, layers=tuple(layers_any_tp))


def gpu_of(request: SizeRequest) -> GpuSpec | None:
    """The GPU that is named, with the memory that is given; None without either.

    Raises:
        KvplanError: the name is unknown.

    """
    if request.gpu is None:
        return custom_gpu(request.gpu_memory_bytes) if request.gpu_memory_bytes is not None else None
    gpu = resolve_gpu(request.gpu, instead="; --gpu-memory 80GiB takes any other")
    if request.gpu_memory_bytes is None:
        return gpu
    return replace(
        gpu,
        memory_bytes=request.gpu_memory_bytes,
        smi_memory_bytes=None,
        facts={**gpu.facts, "memory_bytes": {"source": "--gpu-memory"}},
    )
