"""Measured matrix kernels of a decode step: dense products (GEMM) and routed experts (MoE), each with a small form.

A product of ``m`` tokens with an ``n × k`` weight of w bytes an element::

    t = launch_s + (stream⁴ + compute⁴ + chain⁴)^¼          m' = (m³ + tile³)^⅓
    stream  = (n·k·w + 2·m·(n + k)) / (peak · bandwidth_fraction)
    compute = 2·m'·n·k / (peak FLOPs · flops_fraction)      tiles hold rows that nobody asked for
    chain   = chain_s · k/1024                              one output waits for all of k

Experts of one layer: T tokens choose k of E experts, a rank holds E/ep of them, each cut ``tp`` ways. Popularity is
Gamma with shape ``routing_evenness``, so that a = T·k/E choices touch 1 − (1 + a/evenness)^−evenness of the experts::

    stream  = (touched · E/ep · 3·h·i/tp · w + hidden states) / (peak · bandwidth_fraction)
    compute = 6·rows'·h·i/tp / (peak FLOPs · flops_fraction),   rows' = ((T·k/ep)³ + (tile · touched · E/ep)³)^⅓
    chain   = chain_s · (h + i/tp)/1024

``bandwidth_fraction`` and ``flops_fraction`` bend at 1: nothing outruns the datasheet. Where the host's launch takes
longer than the kernel (``launch_s`` of tens of microseconds), the table says little of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan.calibration.attention_model import Parameter
from kvplan.calibration.other_kernels import Table, fitted_document, read_columns
from kvplan.gpu import GpuSpec

Array = NDArray[Any]
CAP_SHARPNESS = 8.0
MIN_ROWS = 100
"""Entries with fewer rows are left out: not enough to tell five parameters apart."""

WEIGHTS = {
    "bfloat16": (2.0, "bf16"), "fp8": (1.0, "fp8"), "fp8_block": (1.0 + 4 / 128**2, "fp8"), "nvfp4": (9 / 16, "fp4"),
    "int4_wo": (0.5 + 2 / 32, "bf16"),
}  # fmt: skip
"""Format of a table → (bytes an element with its scales, the precision its products run in)."""

GEMM = (
    Parameter("launch_s", 5e-6, 1.0, "s", "launch, quantisation of the input, everything that does not grow"),
    Parameter("bandwidth_fraction", 0.75, 0.2, "of peak", "weights and hidden states streamed from memory"),
    Parameter("flops_fraction", 0.6, 0.3, "of dense peak", "matrix work"),
    Parameter("tile_rows", 32.0, 1.0, "rows", "rows a product of few tokens computes anyway"),
    Parameter("chain_s", 5e-7, 1.0, "s", "dependent steps, for each 1,024 of k"),
)
MOE = (
    Parameter("launch_s", 2e-5, 1.0, "s", "launch, permutation, everything that does not grow"),
    Parameter("bandwidth_fraction", 0.7, 0.3, "of peak", "experts and hidden states streamed from memory"),
    Parameter("flops_fraction", 0.4, 0.4, "of dense peak", "matrix work"),
    Parameter("tile_rows", 16.0, 1.0, "rows", "rows an expert with few tokens computes anyway"),
    Parameter("routing_evenness", 2.0, 1.0, "shape", "of experts' popularity: large is uniform"),
    Parameter("chain_s", 1e-6, 1.0, "s", "dependent steps, for each 1,024 of hidden and intermediate width"),
)


def gemm_s(theta: Array, m: Array, n: Array, k: Array, table_dtype: str, gpu: GpuSpec) -> Array:
    """Seconds of products ``[m, k] × [k, n]``; log parameters ``[..., 5]`` and ``cases`` shapes to ``[..., cases]``."""
    launch, bandwidth, flops, tile, chain = _columns(theta)
    width, precision = WEIGHTS[table_dtype]
    stream = (n * k * width + 2 * m * (n + k)) / (_peak(gpu) * _bent(bandwidth))
    compute = 2 * np.cbrt(m**3 + tile**3) * n * k / (_flops(gpu, precision) * _bent(flops))
    return np.asarray(launch + (stream**4 + compute**4 + (chain * k / 1024) ** 4) ** 0.25)


def moe_s(theta: Array, shape: Mapping[str, Array], table_dtype: str, gpu: GpuSpec) -> Array:
    """Seconds of one layer's routed experts on one rank; log parameters ``[..., 6]`` to ``[..., cases]``.

    ``shape`` holds ``num_tokens``, ``hidden_size``, ``inter_size``, ``topk``, ``num_experts``, ``moe_tp_size`` and
    ``moe_ep_size`` of each case.
    """
    launch, bandwidth, flops, tile, evenness, chain = _columns(theta)
    width, precision = WEIGHTS[table_dtype]
    hidden, inter = shape["hidden_size"], shape["inter_size"] / shape["moe_tp_size"]
    touched = 1 - (1 + shape["num_tokens"] * shape["topk"] / shape["num_experts"] / evenness) ** -evenness
    experts = touched * shape["num_experts"] / shape["moe_ep_size"]
    rows = shape["num_tokens"] * shape["topk"] / shape["moe_ep_size"]
    moved = experts * 3 * hidden * inter * width + 2 * rows * (2 * hidden + 3 * inter)
    stream = moved / (_peak(gpu) * _bent(bandwidth))
    compute = 6 * np.cbrt(rows**3 + (tile * experts) ** 3) * hidden * inter / (_flops(gpu, precision) * _bent(flops))
    return np.asarray(launch + (stream**4 + compute**4 + (chain * (hidden + inter) / 1024) ** 4) ** 0.25)


def gemm_document(path: Path, about: Mapping[str, Any], gpu: GpuSpec) -> dict[str, Any]:
    """The calibration of a GEMM table: one entry a weight format."""
    table = read_columns(path)
    labels = table["gemm_dtype"]
    m, n, k = (table[name].astype(float) for name in ("m", "n", "k"))
    cases = Table(table["latency_s"].astype(float), labels, {"m": m, "n": n, "k": k}, shape=n * 1e6 + k)
    return fitted_document(
        about, "gemm", GEMM, cases, lambda theta, rows, label: gemm_s(theta, m[rows], n[rows], k[rows], label, gpu),
        min_rows=MIN_ROWS, reported=BENT,
    )  # fmt: skip


def moe_document(path: Path, about: Mapping[str, Any], gpu: GpuSpec) -> dict[str, Any]:
    """The calibration of a MoE table: one entry a (kernel, weight format, routing) with at least ``MIN_ROWS`` rows."""
    table = read_columns(path)
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    shape = {name: table[name].astype(float) for name in names}
    parts = zip(table["kernel_source"], table["moe_dtype"], table["distribution"], strict=True)
    labels = np.array(["/".join(part) for part in parts])
    geometry = sum(shape[name] * 7.0**power for power, name in enumerate(names[1:]))

    def model(theta: Array, rows: Array, label: str) -> Array:
        return moe_s(theta, {name: values[rows] for name, values in shape.items()}, label.split("/")[1], gpu)

    cases = Table(table["latency_s"].astype(float), labels, shape, shape=np.asarray(geometry))
    return fitted_document(about, "moe", MOE, cases, model, min_rows=MIN_ROWS,
                           reported=BENT)  # fmt: skip


def _columns(theta: Array) -> tuple[Array, ...]:
    values = np.exp(theta)[..., None]
    return tuple(values[..., j, :] for j in range(theta.shape[-1]))


def _bent(share: Any) -> Any:
    return (1 + share**-CAP_SHARPNESS) ** (-1 / CAP_SHARPNESS)


BENT = {"bandwidth_fraction": _bent, "flops_fraction": _bent}
"""Parameters written as the share they bend to."""


def _peak(gpu: GpuSpec) -> float:
    return gpu.memory_bandwidth_bytes_per_s or 0.0


def _flops(gpu: GpuSpec, precision: str) -> float:
    return gpu.dense_flops_per_s.get(precision) or gpu.dense_flops_per_s.get("bf16") or 250 * _peak(gpu)
