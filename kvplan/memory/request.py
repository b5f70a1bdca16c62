"""A sizing request, as the CLI, the JSON interface and the Python API all state it.

Plain dataclasses, checked by hand: building validators for them at every start would cost more than planning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from kvplan.errors import InputError, closest, shorten
from kvplan.units import parse_bytes, parse_tokens, text_or_integer

Source = Literal["exact", "assumed", "calibrated", "given", "reported", "planned", "roofline"]
"""Where a number comes from: an engine's rule, an estimate, a fit, the user, a server, a server otherwise configured, a
physical bound."""


@dataclass(frozen=True, slots=True)
class SizeRequest:
    """What to size. Everything but the model has a default, and the plan echoes what it became.

    Attributes:
        model: name, alias, hub id, folder or config.json.
        gpu: GPU name or alias, or ``local``.
        gpu_memory_bytes: total memory of one GPU; overrides the profile's.
        engine: ``vllm``, ``sglang``, ``tensorrt-llm`` or ``generic``.
        engine_version: picks an engine's formulas and defaults, e.g. ``0.33``.
        tp_size, pp_size, dp_size, dcp_size: tensor, pipeline, data and decode-context parallel ranks; data
            parallel ones are replicas, of which vLLM's share a model's experts.
        ep: experts are dealt whole to ``tp_size × dp_size`` ranks.
        enable_prefix_caching: hybrids keep state copies for it.
        kv_cache_dtype: a format of the engine, or ``ELEMENT:GRANULARITY[:SCALE]``.
        weight_dtype: how weights are stored; None follows the checkpoint.
        block_size_tokens: tokens a block covers; None is the backend's default.
        max_model_len_tokens: longest request; None is ``context_tokens``, else the model's.
        max_num_seqs, max_num_batched_tokens: the engine's limits of a step, of one replica; None is its default.
        gpu_memory_utilization: the engine's memory fraction; None is its default.
        swa_full_tokens_ratio, mamba_full_memory_ratio: SGLang's tokens of windows over tokens, and bytes of states over
            bytes of tokens; None is its default.
        kv_cache_memory_bytes: KV bytes per GPU; skips the memory budget.
        weights_bytes, activation_bytes, graph_bytes, overhead_bytes: budget terms per GPU; None is estimated.
        context_tokens: context of each request.
        batch_size: requests at once, over all replicas.
        num_layers, num_kv_heads, head_dim, num_parameters, window_tokens: a model without a config.
        id: echoed, for matching results to requests.

    """

    model: str | None = None
    gpu: str | None = None
    gpu_memory_bytes: int | None = None
    engine: str = "vllm"
    engine_version: str | None = None
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    dcp_size: int = 1
    ep: bool = False
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"
    weight_dtype: str | None = None
    block_size_tokens: int | None = None
    max_model_len_tokens: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    swa_full_tokens_ratio: float | None = None
    mamba_full_memory_ratio: float | None = None
    kv_cache_memory_bytes: int | None = None
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    graph_bytes: int | None = None
    overhead_bytes: int | None = None
    context_tokens: int | None = None
    batch_size: int | None = None
    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_parameters: int | None = None
    window_tokens: int | None = None
    id: str | int | None = None

    @property
    def layout(self) -> str:
        """``TP 4, DP 2, EP``; empty for one GPU."""
        sizes = {"TP": self.tp_size, "PP": self.pp_size, "DP": self.dp_size, "DCP": self.dcp_size}
        return ", ".join([f"{name} {count}" for name, count in sizes.items() if count > 1] + ["EP"] * self.ep)


_TOKENS = ("context_tokens", "max_model_len_tokens", "max_num_batched_tokens", "window_tokens")
_BYTES = ("gpu_memory_bytes", "kv_cache_memory_bytes", "weights_bytes")
_BYTES_OR_ZERO = ("activation_bytes", "graph_bytes", "overhead_bytes")
_COUNTS = {
    "tp_size": 4096, "pp_size": 4096, "dp_size": 4096, "dcp_size": 4096, "block_size_tokens": 2**20,
    "max_num_seqs": 2**20, "batch_size": 2**30, "num_layers": 4096, "num_kv_heads": 2**20, "head_dim": 65536,
    "num_parameters": 2**60,
}  # fmt: skip
_TEXTS = ("model", "gpu", "engine", "engine_version", "kv_cache_dtype", "weight_dtype")
_RATIOS = {"gpu_memory_utilization": 1, "swa_full_tokens_ratio": 1, "mamba_full_memory_ratio": 1000}
_FLAGS = ("ep", "enable_prefix_caching")
FIELDS = tuple(field.name for field in fields(SizeRequest))
OPTION_NAMES = {
    "tp": "tp_size", "tensor_parallel_size": "tp_size", "pp": "pp_size", "pipeline_parallel_size": "pp_size",
    "dp": "dp_size", "data_parallel_size": "dp_size", "dcp": "dcp_size", "decode_context_parallel_size": "dcp_size",
    "enable_expert_parallel": "ep", "attention_dp": "attention_dp_size", "ctx": "context_tokens",
    "context": "context_tokens", "batch": "batch_size", "concurrency": "batch_size", "users": "batch_size",
    "isl": "input_tokens", "osl": "output_tokens", "block_size": "block_size_tokens", "page_size": "block_size_tokens",
    "max_model_len": "max_model_len_tokens",
    "mem_fraction_static": "gpu_memory_utilization", "free_gpu_memory_fraction": "gpu_memory_utilization",
    "gpu_memory": "gpu_memory_bytes", "weights_memory": "weights_bytes", "activation_memory": "activation_bytes",
    "graph_memory": "graph_bytes", "overhead_memory": "overhead_bytes", "layers": "num_layers",
    "kv_heads": "num_kv_heads", "params": "num_parameters", "window": "window_tokens",
}  # fmt: skip
"""Options of the command line that are called otherwise than the request fields they set, without their dashes."""


def make_request(options: Mapping[str, Any]) -> SizeRequest:
    """A ``SizeRequest`` from plain values, each checked; None leaves the default.

    Token counts and bytes may be text (``"32k"``, ``"80GiB"``).

    Raises:
        InputError: an unknown or impossible field; the message names it.

    """
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name not in FIELDS:
            raise unknown_field(str(name), FIELDS)
        if value is not None:
            checked[name] = _check(name, value)
    return SizeRequest(**checked)


def unknown_field(name: str, known: Sequence[str]) -> InputError:
    """The error of a field that a request does not have: the field meant, or the closest ones."""
    meant = OPTION_NAMES.get(name.replace("-", "_"))
    close = closest(name, known)
    hint = f"write {meant}" if meant in known else f"closest: {', '.join(close)}" if close else None
    return InputError(f"unknown request field {shorten(name, 60)!r}", hint=hint)


def _check(name: str, value: Any) -> Any:
    if name in _TOKENS:
        return parse_tokens(value, name)
    if name in _BYTES:
        return parse_bytes(value, name)
    if name in _BYTES_OR_ZERO:
        return 0 if text_or_integer(value, name) in (0, "0") else parse_bytes(value, name)
    if name in _COUNTS:
        return _count(name, value, _COUNTS[name])
    if name in _TEXTS:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{name} must be text, not {shorten(repr(value), 40)}")
        return value
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise InputError(f"{name} must be true or false, not {shorten(repr(value), 40)}")
        return value
    if name in _RATIOS:
        high = _RATIOS[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
            raise InputError(f"{name} must be above 0 and at most {high}, not {shorten(repr(value), 40)}")
        return float(value)
    return case_id(value)


def case_id(value: Any) -> str | int | None:
    """What a request calls itself, to be found again in its result.

    Raises:
        InputError: it is neither text nor a whole number.

    """
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise InputError(f"id must be text or a whole number, not {shorten(repr(value), 40)}")
    return value


def _count(name: str, value: Any, high: int) -> int:
    number = text_or_integer(value, name)
    if not isinstance(number, int):
        raise InputError(f"{name} must be a whole number, not {shorten(repr(value), 40)}")
    if not 1 <= number <= high:
        raise InputError(f"{name} must be between 1 and {high:,}, not {shorten(str(number), 40)}")
    return number
