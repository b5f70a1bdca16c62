"""Latency of one layer's decode attention from its geometry: a physical form with few, named, positive parameters.

For B sequences of N tokens, Hq query heads on Hkv KV heads of width D (values Dv), KV elements of e bytes::

    u = B · Hkv · max(1, G/unit_q_heads)    work units: query heads of one KV head of one sequence;  G = Hq / Hkv
    N' = (N³ + page³)^⅓                     short contexts still read whole pages; a window adds the tokens in flight
    KV = B · Hkv · N' · ((D + Dv)·e + scales)    bytes;  item = KV / (u · splits)
    bw = peak · bandwidth_fraction · (factors of head_dim and window)
    hit = 1/(1 + ((KV + q + o) / L2 capacity)^p)    KV left in L2 by the previous step (LRU: nearly all or nothing)
    rate = 1/(hit/max(L2 bandwidth, bw) + (1 − hit)/bw)
    most = 1 + max_splits · (N'/32k)^growth
    splits = clip(min(pieces_per_sm·SMs/u, N'/tile), 1, most)    few long sequences are cut into pieces
    alone = N'/splits · (token bytes / slot rate + token_s)      what a piece takes at least
    t_kv = KV/rate and a tail of pieces where units are cut, else whole waves of items; no wave faster than ``alone``
    t_unit = unit_s · (ratios of G and D) · u · splits / SMs     fixed work per piece, empty ones before a window too
    t_flop = 4·B·Hq·N'·D / (FLOPs · fraction)
    t_chain = chain_s · log2(1 + N'/256) + combine_s · clip(log2(N'/tile), 0, 1)    dependent steps, joining pieces
    t = launch_s + |t_chain, t_kv, t_unit, t_flop| + sequence_s·B + q,o bytes/bw + ramp    norm 1 + overlap: 0 adds up

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
    Parameter("bandwidth_fraction", 0.92, 0.18, "of peak", "KV streamed from memory by a full GPU, at most 1", 0.6),
    Parameter("l2_bandwidth_bytes_per_s", 8e12, 0.6, "B/s", "KV streamed from L2"),
    Parameter("l2_capacity_fraction", 1.0, 0.08, "of L2", "KV that stays in L2 between steps"),
    Parameter("unit_s", 2e-6, 0.6, "s", "fixed work for a piece of one KV head of one sequence, per SM", 0.6),
    Parameter("unit_q_heads", 32.0, 1.0, "query heads", "query heads that one unit serves at most"),
    Parameter("unit_ratio_per_group_doubling", 1.0, 0.2, "ratio", "the same, each doubling of query heads a KV head"),
    Parameter("unit_ratio_per_head_dim_doubling", 1.1, 0.2, "ratio", "the same, each doubling of head_dim from 128"),
    Parameter("page_tokens", 80.0, 0.6, "tokens", "tokens a short context reads anyway"),
    Parameter("window_extra_tokens", 100.0, 0.4, "tokens", "tokens read beyond a sliding window"),
    Parameter("long_window_leak", 0.01, 3.0, "fraction", "of the context beyond a long window that is read anyway"),
    Parameter(
        "window_cut_leak", 0.01, 3.0, "fraction", "of the context beyond a window that is cut into pieces anyway"
    ),
    Parameter("flops_fraction", 0.25, 0.6, "of peak bf16", "matrix work, up to 32 query heads a KV head", 0.6),
    Parameter("wide_group_flops_fraction", 0.05, 1.5, "of peak bf16", "matrix work, more than 32", 0.6),
    Parameter("slots_per_sm", 1.0, 0.05, "CTAs", "units an SM works on at once", 0.95),
    Parameter("pieces_per_sm", 1.5, 0.5, "pieces", "pieces an SM is given where units are too few and are cut"),
    Parameter("cut_tail", 0.1, 1.5, "waves", "of pieces left over where units are cut into uneven numbers of them"),
    Parameter("sm_bandwidth_ratio", 1.5, 0.6, "ratio", "what one slot streams alone, against an even share of peak"),
    Parameter("token_s", 5e-9, 1.0, "s", "what a slot needs for a token at least, however few its bytes"),
    Parameter("sm_l2_ratio", 2.0, 0.4, "ratio", "the same from L2, against from memory"),
    Parameter("max_splits", 64.0, 0.8, "splits", "pieces a sequence of 32k tokens is cut into at most"),
    Parameter("max_splits_ratio_mha", 1.0, 1.2, "ratio", "the same with one query head a KV head"),
    Parameter("max_splits_growth", 0.1, 1.5, "power", "of the context, by which both grow around 32k tokens"),
    Parameter("overlap", 0.6, 0.3, "power", "how far chain, stream, fixed and matrix work overlap: 0 adds them up"),
    Parameter("ramp_fraction", 0.15, 0.8, "of L2/peak", "time to fill the memory pipes"),
    Parameter("bandwidth_ratio_head_dim_64", 0.94, 0.10, "ratio", "bandwidth at head_dim 64, against 128", 0.7),
    Parameter("bandwidth_ratio_head_dim_192", 1.0, 0.12, "ratio", "bandwidth at head_dim 192", 0.7),
    Parameter("bandwidth_ratio_head_dim_256", 1.0, 0.12, "ratio", "bandwidth at head_dim 256", 0.7),
    Parameter("bandwidth_ratio_head_dim_512", 0.95, 0.15, "ratio", "bandwidth at head_dim 512", 0.7),
    Parameter("bandwidth_ratio_window", 0.9, 0.12, "ratio", "bandwidth where a window cuts the context", 0.7),
)
NAMES = tuple(p.name for p in PARAMETERS)
INDEX = {name: i for i, name in enumerate(NAMES)}
HEAD_DIM_RATIOS = (64, 192, 256, 512)
MAX_SPLITS_TOKENS = 32_768
"""The context that ``max_splits`` is stated for."""
MAX_OVERLAP = 4.0
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
    tokens = np.cbrt(_tokens_read(p, g) ** 3 + p("page_tokens") ** 3)
    shares = np.maximum(g.group / np.maximum(p("unit_q_heads"), 1.0), 1.0)
    units = g.batch * g.kv_heads * shares
    kv = units / shares * tokens * g.token_bytes
    bandwidth = hw.peak * np.minimum(p("bandwidth_fraction"), 1.0) * _bandwidth_factor(p, g)
    footprint = kv + 2 * g.batch * g.q_heads * (g.head_dim + g.head_dim_v)
    hit = 1 / (1 + np.minimum(footprint / (hw.l2 * p("l2_capacity_fraction")), 10.0) ** hw.l2_sharpness)

    wanted = hw.sms * p("pieces_per_sm") / units
    beyond = np.minimum(p("window_cut_leak"), 1.0) * np.maximum(g.context - tokens, 0)
    limit = p("max_splits") * np.where(g.group == 1, p("max_splits_ratio_mha"), 1.0)
    splits, pieces = _splits(p, wanted, limit, tokens), units * _splits(p, wanted, limit, tokens + beyond)
    rate = 1 / (hit / np.maximum(p("l2_bandwidth_bytes_per_s"), bandwidth) + (1 - hit) / bandwidth)
    nearer = 1 / (hit / np.maximum(p("sm_l2_ratio"), 1.0) + 1 - hit)
    slot_rate = hw.peak / hw.sms * p("sm_bandwidth_ratio") * nearer
    alone = tokens / splits * (g.token_bytes / slot_rate + p("token_s"))
    slots, tail = hw.sms * p("slots_per_sm"), np.minimum(p("cut_tail"), 1.0) * (1 - 1 / splits)
    stream = _stream_s(units * splits, kv / (units * splits) / rate, alone, wanted > 1, slots, tail)

    wider = np.log2(g.head_dim / 128)
    unit = p("unit_s") * p("unit_ratio_per_head_dim_doubling") ** wider * pieces / hw.sms
    unit = unit * p("unit_ratio_per_group_doubling") ** np.log2(g.group / shares / 4)
    fraction = p("flops_fraction")
    fraction = np.where(g.group > WIDE_GROUP, np.minimum(p("wide_group_flops_fraction"), fraction), fraction)
    flop = 4 * g.batch * g.q_heads * tokens * g.head_dim / (hw.flops * fraction)
    chain = p("chain_s") * np.log2(1 + tokens / 256)
    chain = chain + p("combine_s") * np.clip(np.log2(tokens / p("tile_tokens")), 0, 1)
    norm = 1 + np.minimum(p("overlap"), MAX_OVERLAP)
    body = (chain**norm + stream**norm + unit**norm + flop**norm) ** (1 / norm)
    ramp = p("ramp_fraction") * hw.l2_nominal / hw.peak * -np.expm1(-kv / hw.l2_nominal)
    heads = g.batch * p("sequence_s") + 4 * g.batch * g.q_heads * g.head_dim / bandwidth
    return np.asarray(_launch_s(p, g, wider) + body + heads + ramp)


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


def _bandwidth_factor(p: _Named, g: Geometry) -> Array:
    factor = np.ones_like(g.head_dim)
    for width in HEAD_DIM_RATIOS:
        factor = factor * np.where(g.head_dim == width, p(f"bandwidth_ratio_head_dim_{width}"), 1.0)
    cut = (g.window > 0) & (g.context > g.window)
    return np.asarray(factor * np.where(cut, np.minimum(p("bandwidth_ratio_window"), 1.0), 1.0))


def _launch_s(p: _Named, g: Geometry, wider: Array) -> Array:
    mha, single = g.group == 1, (g.kv_heads == 1) | (g.batch == 1)
    launch = p("launch_s") * p("launch_ratio_per_head_dim_doubling") ** wider
    launch = launch * np.where(mha, p("launch_ratio_mha"), 1.0)
    return np.asarray(launch * np.where(single & ~mha, np.minimum(p("launch_ratio_single"), 1.0), 1.0))


def _splits(p: _Named, wanted: Array, limit: Array, tokens: Array) -> Array:
    """Pieces a unit of so many tokens is cut into: ``wanted`` fill the GPU, ``limit`` is the most at 32k tokens."""
    most = 1 + limit * (tokens / MAX_SPLITS_TOKENS) ** np.minimum(p("max_splits_growth"), 1.0)
    return np.asarray(np.clip(np.minimum(wanted, tokens / p("tile_tokens")), 1, most))


def _stream_s(items: Array, item_s: Array, alone: Array, cut: Array, slots: Array, tail: Array) -> Array:
    """Work items in slots; units that are ``cut`` fill the GPU and leave a ``tail``, others run as whole waves.

    ``item_s`` is an item's share of a full GPU's time, ``alone`` what it takes at least.
    """
    full = np.maximum(slots * item_s, alone)
    count = np.floor(items / slots + 1e-9)
    rest = items / slots - count
    last = np.where(rest > 1e-9, np.maximum(rest * slots * item_s, alone), 0.0)
    return np.asarray(np.where(cut, np.maximum(items * item_s, alone) + tail * alone, count * full + last))
