"""Seconds of a decode step, and of requests under a closed loop of clients, from features and named parameters.

A step is a sum of parts::

    weights + compute  (w³ + c³)^⅓   stream of the weights it touches, overlapped with their FLOPs
    kv                 bytes of the context read, over the bandwidth attention reaches
    collectives        2 a layer × (latency + message / link)
    overhead           a time a kernel, a step, and a sequence

Experts are read as skewed routing touches them (``touched_share``). Under load each request's tokens also wait for the
prompts of others: while a request decodes n tokens, every other running one is replaced once, so a token waits for
others/n prompts. A prompt costs its FLOPs, its messages and hidden states, and the experts that decoding had left
alone, or the host's launches of a step without a graph where they take longer; at most every step holds prompts. Those
launches hide the decoding of a step that mixes both; SGLang runs prompts in steps of their own, which hide nothing. A
part of the prompts arrive together and wait for each other before anybody decodes: about half where prompts go first
and lengths are exact, for requests that start together then end together. ``step_times`` and ``load_times`` take
floats or arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kvplan.traffic import Number, touched_share

PREFILL_STEP_TOKENS = 8192
"""Prompt tokens one step takes; the usual chunked-prefill budget."""

OVERLAP = 3.0
CAP_SHARPNESS = 8.0
"""How sharply streams bend at peak bandwidth; 0.85 stays within 3%."""


class StepFeatures(NamedTuple):
    """What a step moves and computes, in seconds at peak (``_s``) and counts. Floats or arrays of one shape.

    Attributes:
        dense_s, expert_s: weight bytes a step always reads, and the bytes of all experts of a GPU.
        expert_chance: chance that a token chooses a given expert.
        flops_s: matrix FLOPs at dense peak, divided by what the precision usually reaches of it against FP8.
        kv_s: KV bytes at peak, a slower format's slowdown included.
        collectives, collective_factor, message_s: how many, latency of one over Hopper's NVLink, data time of one.
        kernels: kernels of all layers, collectives apart.
        is_moe: 0 or 1.
        sequences: sequences, each of one token, of the step over all data parallel ranks.

    """

    dense_s: Number
    expert_s: Number
    expert_chance: Number
    flops_s: Number
    kv_s: Number
    collectives: Number
    collective_factor: Number
    message_s: Number
    kernels: Number
    is_moe: Number
    sequences: Number


class LoadFeatures(NamedTuple):
    """What a load adds: prompt and output lengths (true means), and one prompt's prefill in seconds at peak.

    Attributes:
        prefill_flops_s: matrix FLOPs.
        prefill_attention_s: attention FLOPs, at 16 bits.
        prefill_moved_s: messages between GPUs, and hidden states read and written between matrix products.
        has_spread: whether lengths vary between requests (0 or 1).
        prompts_first: whether prompts run before, and apart from, decoding (0 or 1).

    """

    input_tokens: Number
    output_tokens: Number
    prefill_flops_s: Number
    prefill_attention_s: Number
    prefill_moved_s: Number
    has_spread: Number
    prompts_first: Number


class StepTimes(NamedTuple):
    """Seconds of the parts of one step."""

    weights_s: Number
    compute_s: Number
    kv_s: Number
    collectives_s: Number
    overhead_s: Number

    @property
    def total_s(self) -> Number:
        """The step."""
        return self.weights_s + self.compute_s + self.kv_s + self.collectives_s + self.overhead_s


class LoadTimes(NamedTuple):
    """Seconds under load: one step, TPOT, TTFT, and the part of TPOT that is other requests' prefill.

    ``burst`` is mean TTFT of a short run whose requests, of equal lengths, start at once, over the steady state's.
    """

    step: StepTimes
    tpot_s: Number
    ttft_s: Number
    prefill_wait_s: Number
    burst: Number


def step_times(parameters: Mapping[str, Number], features: StepFeatures) -> StepTimes:
    """The parts of a step; ``parameters`` are logarithms, by the names in ``kvplan.latency.parameters``."""
    p, f = parameters, features
    scale = np.exp(p["residual"] - p["accepted"])
    weights = f.dense_s / stream_share(p["weight_stream"]) + _experts_s(p, f, f.sequences)
    compute = f.flops_s / np.exp(_matrix_efficiency(p, f))
    both = _overlapped(weights, compute)
    collectives = f.collectives * (np.exp(p["collective_s"]) * f.collective_factor + f.message_s)
    a_kernel = np.exp(np.where(f.is_moe, p["kernel_moe_s"], p["kernel_dense_s"]))
    overhead = f.kernels * a_kernel + np.exp(p["step_s"]) + f.sequences * np.exp(p["sequence_s"])
    return StepTimes(weights * scale, (both - weights) * scale, f.kv_s / stream_share(p["kv_stream"]) * scale,
                     collectives * scale, overhead * scale)  # fmt: skip


def _overlapped(one: Number, other: Number) -> Number:
    """Two times that run beside each other: near the longer, at most 26% above it."""
    found: Number = (one**OVERLAP + other**OVERLAP) ** (1 / OVERLAP)
    return found


def _experts_s(p: Mapping[str, Number], f: StepFeatures, num_tokens: Number) -> Number:
    """Seconds to stream the experts that ``num_tokens`` tokens touch."""
    touched = touched_share(num_tokens, f.expert_chance, np.exp(p["routing_evenness"]))
    return f.expert_s * touched / stream_share(p["expert_stream"])


def stream_share(log_share: Number) -> Number:
    """Share of peak bandwidth of a parameter: its ``exp``, bent so that nothing streams faster than the datasheet."""
    share: Number = (1 + np.exp(-CAP_SHARPNESS * np.asarray(log_share))) ** (-1 / CAP_SHARPNESS)
    return share


def log_share_of(share: float) -> float:
    """The parameter whose ``stream_share`` is ``share``, at most 0.99."""
    return float(-np.log(min(share, 0.99) ** -CAP_SHARPNESS - 1) / CAP_SHARPNESS)


def _matrix_efficiency(p: Mapping[str, Number], f: StepFeatures) -> Number:
    return np.where(f.is_moe, p["matrix_moe"], p["matrix_dense"])


def load_times(parameters: Mapping[str, Number], step: StepFeatures, load: LoadFeatures) -> LoadTimes:
    """Steady state of a closed loop in which ``step.sequences`` requests run at once."""
    p = parameters
    times = step_times(p, step)
    scale = np.exp(p["residual"])
    step_s = times.total_s / scale
    chunk = np.minimum(load.input_tokens, PREFILL_STEP_TOKENS)
    prompt_s = _prompt_s(p, step, load, chunk)
    others = np.maximum(step.sequences - 1, 0)
    exact = np.where(load.prompts_first, p["together_first"], p["together_exact"])
    together = 1 / (1 + np.exp(-np.where(load.has_spread, p["together_spread"], exact)))
    prompts_a_token = others * (1 - together) / load.output_tokens
    steps_a_token = others / (1 + together * others) / load.output_tokens * (load.input_tokens / chunk)
    launch_s = step.kernels * np.exp(p["prefill_kernel_s"])
    mixed_steps = steps_a_token / (1 + steps_a_token**4) ** 0.25
    decoding_s = np.where(load.prompts_first, 0.0, mixed_steps * step_s)
    wait_s = _overlapped(decoding_s + prompts_a_token * prompt_s, mixed_steps * launch_s) - decoding_s
    apart = np.maximum(load.has_spread, load.prompts_first)
    burst = np.where(apart, 1.0, np.minimum(np.exp(p["ttft_exact"]), np.maximum(step.sequences, 1)))
    ttft_s = _overlapped(prompt_s, launch_s) + together * others * prompt_s + step_s
    return LoadTimes(times, (step_s + wait_s) * scale, ttft_s, wait_s * scale, burst)


def _prompt_s(p: Mapping[str, Number], step: StepFeatures, load: LoadFeatures, chunk: Number) -> Number:
    """Seconds that one prompt, ``chunk`` tokens a step, adds to the steps it is in; the host's launches apart."""
    more = _experts_s(p, step, step.sequences + chunk) - _experts_s(p, step, step.sequences)
    experts = more * (load.input_tokens / chunk)
    products = load.prefill_flops_s / np.exp(_matrix_efficiency(p, step))
    return products + load.prefill_attention_s / np.exp(p["prefill_attention"]) + load.prefill_moved_s + experts


def slope_s_per_token(parameters: Mapping[str, Number], kv_slope_s: Number) -> Number:
    """d(step)/d(context) given d(``kv_s``)/d(context): nothing else in a step depends on the context."""
    scale = np.exp(parameters["residual"] - parameters["accepted"])
    slope: Number = kv_slope_s / stream_share(parameters["kv_stream"]) * scale
    return slope
