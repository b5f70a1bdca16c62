"""Latency of one layer's decode attention from its geometry: a physical form with few, named, positive parameters.

For B sequences of N tokens, Hq query heads on Hkv KV heads of width D (values Dv), KV elements of e bytes::

    u = B · Hkv                        work units: one KV head of one sequence;  G = Hq / Hkv
    N' = (N³ + page³)^⅓                short contexts still read whole pages; a window adds the tokens in flight
    item = N'·((D + Dv)·e + scales)    bytes of a unit;  KV = u · item
    bw = peak · bandwidth_fraction · (factors of head_dim, group size, window, MHA)
    hit = 1/(1 + ((KV + q + o) / L2 capacity)^p)        KV left in L2 by the previous step (LRU: nearly all or nothing)
    rate = 1/(hit/max(L2 bandwidth, bw) + (1 − hit)/bw)
    splits = clip(min(pieces_per_sm·SMs/u, N'/tile), 1, 1 + max_splits)     few long sequences are cut into pieces
    t_kv = whole waves of items at ``rate``, and a last wave no faster than one slot can stream
    t_unit = unit_s · (ratios of G and D) · u · splits / SMs                fixed work per piece
    t_flop = 4·B·Hq·N'·D / (FLOPs · fraction)
    t_chain = chain_s · log2(1 + N'/256) + combine_s · clip(log2(N'/tile), 0, 1)     dependent steps, and joining pieces
    t = launch_s + sqrt(t_chain² + ((t_kv^1.5 + t_unit^1.5)^(4/1.5) + t_flop⁴)^½) + sequence_s·B + q,o bytes/bw + ramp

Every term is non-decreasing in context, batch and bytes an element, so the form is too (tests hold it). Kernels cut the
KV of a sequence as FlashDecoding does (Dao et al. 2023) and fall back to slower code above 32 query heads a KV head. An
engine's other kernel (``geometry.Dispatch``) has the same form with parameters of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan.calibration.geometry import WIDE_GROUP, Geometry, Hardware

Array = NDArray[Any]


@dataclass(frozen=True)
class Parameter:
    """One positive parameter: prior median, prior spread of its logarithm, unit and meaning.

    ``shared`` is the correlation the prior expects between KV dtypes of one kernel: 1 the same, 0 unrelated.
    """

    name: str
    prior: float
    spread: float
    unit: str
    meaning: str
    shared: float = 0.9


PARAMETERS = (
    Parameter("launch_s", 8e-6, 0.4, "s", "launch, reduction and everything that does not grow"),
    Parameter("launch_ratio_per_head_dim_doubling", 1.1, 0.2, "ratio", "the same, each doubling of head_dim from 128"),
    Parameter("launch_ratio_mha", 1.0, 0.2, "ratio", "the same with one query head a KV head"),
    Parameter("launch_ratio_single", 0.95, 0.15, "ratio", "the same with one KV head or one sequence, at most 1"),
    Parameter("chain_s", 1.5e-6, 0.6, "s", "dependent steps of one unit, for each doubling of the context beyond 256"),
    Parameter("combine_s", 2e-6, 0.6, "s", "joining the pieces of a sequence longer than one tile"),
    Parameter("tile_tokens", 100.0, 0.4, "tokens", "the longest context that is one piece"),
    Parameter("sequence_s", 5e-9, 1.0, "s", "work for each sequence: its block table, its output"),
    Parameter("bandwidth_fraction", 0.92, 0.18, "of peak", "KV streamed from memory by a full GPU", 0.6),
    Parameter("l2_bandwidth_bytes_per_s", 8e12, 0.6, "B/s", "KV streamed from L2"),
    Parameter("l2_capacity_fraction", 1.0, 0.08, "of L2", "KV that stays in L2 between steps"),
    Parameter("unit_s", 2e-6, 0.6, "s", "fixed work for a piece of one KV head of one sequence, per SM", 0.6),
    Parameter("unit_ratio_per_group_doubling", 1.0, 0.2, "ratio", "the same, each doubling of query heads a KV head"),
    Parameter("unit_ratio_per_head_dim_doubling", 1.1, 0.2, "ratio", "the same, each doubling of head_dim from 128"),
    Parameter("page_tokens", 80.0, 0.6, "tokens", "tokens a short context reads anyway"),
    Parameter("window_extra_tokens", 100.0, 0.4, "tokens", "tokens read beyond a sliding window"),
    Parameter("long_window_leak", 0.01, 3.0, "fraction", "of the context beyond a long window that is read anyway"),
    Parameter("group_bandwidth_ratio", 0.98, 0.02, "ratio", "bandwidth for each doubling of query heads a KV head"),
    Parameter("flops_fraction", 0.25, 0.6, "of peak bf16", "matrix work, up to 32 query heads a KV head", 0.6),
    Parameter("wide_group_flops_fraction", 0.05, 1.5, "of peak bf16", "matrix work, more than 32", 0.6),
    Parameter("slots_per_sm", 1.0, 0.05, "CTAs", "units an SM works on at once", 0.95),
    Parameter("pieces_per_sm", 1.5, 0.5, "pieces", "pieces an SM is given where units are too few and are cut"),
    Parameter("sm_bandwidth_ratio", 1.5, 0.6, "ratio", "what one slot streams alone, against an even share of peak"),
    Parameter("sm_l2_ratio", 2.0, 0.4, "ratio", "the same from L2, against from memory"),
    Parameter("max_splits", 64.0, 0.8, "splits", "pieces one sequence is cut into at most"),
    Parameter("max_splits_ratio_mha", 1.0, 1.2, "ratio", "the same with one query head a KV head"),
    Parameter("ramp_fraction", 0.15, 0.8, "of L2/peak", "time to fill the memory pipes"),
    Parameter("bandwidth_ratio_head_dim_64", 0.94, 0.10, "ratio", "bandwidth at head_dim 64, against 128", 0.7),
    Parameter("bandwidth_ratio_head_dim_192", 1.0, 0.12, "ratio", "bandwidth at head_dim 192", 0.7),
    Parameter("bandwidth_ratio_head_dim_256", 1.0, 0.12, "ratio", "bandwidth at head_dim 256", 0.7),
    Parameter("bandwidth_ratio_head_dim_512", 0.95, 0.15, "ratio", "bandwidth at head_dim 512", 0.7),
    Parameter("bandwidth_ratio_window", 0.9, 0.12, "ratio", "bandwidth where a window cuts the context", 0.7),
    Parameter("bandwidth_ratio_mha", 1.0, 0.08, "ratio", "bandwidth with one query head a KV head", 0.7),
)
NAMES = tuple(p.name for p in PARAMETERS)
INDEX = {name: i for i, name in enumerate(NAMES)}
HEAD_DIM_RATIOS = (64, 192, 256, 512)
LONG_WINDOW_TOKENS = 4096
"""Windows of this size and more are masked, not skipped, by some kernels."""


def latency_s(theta: Array, g: Geometry, hw: Hardware) -> Array:
    """Seconds of one layer's decode attention.

    Args:
        theta: log parameters, ``[..., num_parameters]``.
        g: ``n`` cases.
        hw: the GPU.

    Returns:
        ``[..., n]``.

    """
    p = _Named(theta)
    mha, wide = g.group == 1, g.group > WIDE_GROUP
    tokens = np.cbrt(_tokens_read(p, g) ** 3 + p("page_tokens") ** 3)
    units = g.batch * g.kv_heads
    unit_bytes = tokens * g.token_bytes
    kv = units * unit_bytes

    factor = _bandwidth_factor(p, g, mha)
    bandwidth = hw.peak * p("bandwidth_fraction") * factor
    footprint = kv + 2 * g.batch * g.q_heads * (g.head_dim + g.head_dim_v)
    hit = 1 / (1 + np.minimum(footprint / (hw.l2 * p("l2_capacity_fraction")), 10.0) ** hw.l2_sharpness)
    rate = 1 / (hit / np.maximum(p("l2_bandwidth_bytes_per_s"), bandwidth) + (1 - hit) / bandwidth)

    slots = hw.sms * p("slots_per_sm")
    limit = 1 + p("max_splits") * np.where(mha, p("max_splits_ratio_mha"), 1.0)
    nearer = 1 / (hit / np.maximum(p("sm_l2_ratio"), 1.0) + 1 - hit)
    alone = hw.peak / hw.sms * p("sm_bandwidth_ratio") * nearer
    wanted = hw.sms * p("pieces_per_sm") / units
    splits = np.clip(np.minimum(wanted, tokens / p("tile_tokens")), 1, limit)
    stream = _stream_s(units * splits, unit_bytes / splits, wanted > 1, rate, slots, alone)

    wider = np.log2(g.head_dim / 128)
    unit = p("unit_s") * p("unit_ratio_per_group_doubling") ** np.log2(g.group / 4) * units * splits / hw.sms
    unit = unit * p("unit_ratio_per_head_dim_doubling") ** wider
    narrow = p("flops_fraction")
    fraction = np.where(wide, np.minimum(p("wide_group_flops_fraction"), narrow), narrow)
    flop = 4 * g.batch * g.q_heads * tokens * g.head_dim / (hw.flops * fraction)
    chain = p("chain_s") * np.log2(1 + tokens / 256)
    chain = chain + p("combine_s") * np.clip(np.log2(tokens / p("tile_tokens")), 0, 1)
    body = np.sqrt(chain**2 + np.sqrt((stream**1.5 + unit**1.5) ** (4 / 1.5) + flop**4))
    ramp = p("ramp_fraction") * hw.l2_nominal / hw.peak * -np.expm1(-kv / hw.l2_nominal)
    heads = g.batch * p("sequence_s") + 4 * g.batch * g.q_heads * g.head_dim / bandwidth
    launch = p("launch_s") * p("launch_ratio_per_head_dim_doubling") ** wider
    launch = launch * np.where(mha, p("launch_ratio_mha"), 1.0)
    single = (g.kv_heads == 1) | (g.batch == 1)
    launch = launch * np.where(single & ~mha, np.minimum(p("launch_ratio_single"), 1.0), 1.0)
    return np.asarray(launch + body + heads + ramp)


class _Named:
    """Log parameters by name, ready to broadcast against cases."""

    def __init__(self, theta: Array) -> None:
        self.values = np.exp(theta)[..., None]

    def __call__(self, name: str) -> Array:
        value: Array = self.values[..., INDEX[name], :]
        return value


def _tokens_read(p: _Named, g: Geometry) -> Array:
    """Tokens a unit reads: all, or the window and what kernels read beyond it."""
    beyond = np.maximum(g.context - g.window - p("window_extra_tokens"), 0)
    leak = np.where(g.window >= LONG_WINDOW_TOKENS, np.minimum(p("long_window_leak"), 1.0), 0.0)
    return np.asarray(np.where(g.window > 0, g.context - (1 - leak) * beyond, g.context))


def _bandwidth_factor(p: _Named, g: Geometry, mha: Array) -> Array:
    factor = p("group_bandwidth_ratio") ** np.log2(g.group)
    for width in HEAD_DIM_RATIOS:
        factor = factor * np.where(g.head_dim == width, p(f"bandwidth_ratio_head_dim_{width}"), 1.0)
    cut = (g.window > 0) & (g.context > g.window)
    factor = factor * np.where(cut, np.minimum(p("bandwidth_ratio_window"), 1.0), 1.0)
    return np.asarray(factor * np.where(mha, p("bandwidth_ratio_mha"), 1.0))


def _stream_s(items: Array, item_bytes: Array, cut: Array, rate: Array, slots: Array, slot_rate: Array) -> Array:
    """Work items in slots: units that are ``cut`` fill the GPU, others run as whole waves and a partial one."""
    waves, alone = items / slots, item_bytes / slot_rate
    full = np.maximum(slots * item_bytes / rate, alone)
    count = np.floor(waves + 1e-9)
    rest = waves - count
    last = np.where(rest > 1e-9, np.maximum(rest * slots * item_bytes / rate, alone), 0.0)
    return np.asarray(np.where(cut, np.maximum(items * item_bytes / rate, alone), count * full + last))
