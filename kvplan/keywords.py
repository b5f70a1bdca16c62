"""Keyword arguments of the public functions, for type checkers and editors; each function checks values itself.

Counts of tokens may be text (``"32k"``), bytes too (``"80GiB"``); None leaves the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date as Date
from os import PathLike
from typing import TypeAlias, TypedDict

Tokens: TypeAlias = int | str | None
Bytes: TypeAlias = int | str | None
Path: TypeAlias = str | PathLike[str] | None


class Served(TypedDict, total=False):
    """What is served, on what, and how: fields of ``SizeRequest`` that every function takes."""

    model: Path
    gpu: str | None
    gpu_memory_bytes: Bytes
    engine: str | None
    engine_version: str | None
    tp_size: int | None
    pp_size: int | None
    dp_size: int | None
    dcp_size: int | None
    ep: bool | None
    enable_prefix_caching: bool | None
    kv_cache_dtype: str | None
    weight_dtype: str | None
    block_size_tokens: int | None
    max_model_len_tokens: Tokens
    max_num_seqs: int | None
    max_num_batched_tokens: Tokens
    gpu_memory_utilization: float | None
    swa_full_tokens_ratio: float | None
    mamba_full_memory_ratio: float | None
    kv_cache_memory_bytes: Bytes
    weights_bytes: Bytes
    activation_bytes: Bytes
    graph_bytes: Bytes
    overhead_bytes: Bytes
    context_tokens: Tokens
    batch_size: int | None


class SizeKeywords(Served, total=False):
    """Keyword arguments of ``size``, ``size_from_log``, ``check_log`` and ``check_url``."""

    num_layers: int | None
    num_kv_heads: int | None
    head_dim: int | None
    num_parameters: int | None
    window_tokens: Tokens
    id: str | int | None


class LoadKeywords(Served, total=False):
    """A load, and what times are predicted from."""

    input_tokens: Tokens
    output_tokens: Tokens
    concurrency: int | None
    calibration: Path


class ItlKeywords(LoadKeywords, total=False):
    """Keyword arguments of ``itl``."""

    attention_dp_size: int | None
    moe_tp_size: int | None
    moe_ep_size: int | None
    length_spread: float | None
    id: str | int | None


class ReportKeywords(LoadKeywords, total=False):
    """Keyword arguments of ``report``."""

    compare: str | Sequence[str] | None
    measured: Path
    name: str | None
    date: str | Date | None
