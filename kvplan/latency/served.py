"""A deployment with everything looked up: what it moves, what its parameters are, what it can hold.

Made once for all points of a deployment; its methods take arrays of batches and contexts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvplan.deployment import Deployment
from kvplan.gpu import GpuSpec
from kvplan.latency.capacity import Ints, max_batches
from kvplan.latency.kv import KvSpeed
from kvplan.latency.latent import latent_heads
from kvplan.latency.parameters import Traits
from kvplan.latency.request import ItlRequest
from kvplan.latency.step import LoadFeatures, StepFeatures
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.limits import kv_bytes_at, kv_bytes_for
from kvplan.memory.setup import Setup
from kvplan.model_config.types import ModelConfig
from kvplan.roofline import Peaks
from kvplan.traffic import Floats, Number, Traffic, precision_class

PRECISION_REACH = {"bf16": 0.6, "fp8": 0.0, "int8": 0.0, "fp4": -0.4, "int4": -0.4}
"""Logarithm of the share of dense peak that each precision's matrix products reach, over FP8's (assumed)."""

NOMINAL_LENGTH = 0.95
"""True mean length over nominal where the spread is not stated: benchmark lengths average 0.9–1.0 of nominal."""

SPREAD_LENGTHS = (1024, 8192)
"""Nominal lengths of the public benchmark workloads that draw lengths from 0.8–1.0 of nominal."""

PROMPTS_FIRST = frozenset({"sglang"})
"""Engines that run waiting prompts before the next decode step, not beside it (``enable_mixed_chunk`` off)."""

MID_REQUEST = 0.6
"""Share of the output a running request has KV for when the engine decides how many may run."""

RESERVED_OUTPUT = {"tensorrt-llm": 1.0}
"""The same of engines that start a request only when all of its output fits (policy GUARANTEED_NO_EVICT)."""


@dataclass(frozen=True)
class Served:
    """One deployment of one model.

    Attributes:
        request: as resolved; its KV format is what the engine uses.
        slope_dtype: the KV format time goes by (``auto`` resolved to the bits it stores).
        kv_speed: how fast that format is read against 16 bits, and from what.
        max_running: requests the scheduler of one attention rank runs at once, as told or by the engine's default; None
            when neither is known.
        available_bytes: KV budget of one GPU; below 0 what is missing on it, None when unknown.

    """

    request: ItlRequest
    setup: Setup
    plan: CachePlan
    deployment: Deployment
    traffic: Traffic
    peaks: Peaks
    traits: Traits
    kv_speed: KvSpeed
    available_bytes: int | None
    max_running: int | None
    notes: tuple[str, ...]

    @property
    def model(self) -> ModelConfig:
        """The model."""
        return self.setup.model

    @property
    def gpu(self) -> GpuSpec:
        """The GPU."""
        assert self.setup.gpu is not None
        return self.setup.gpu

    @property
    def latent_heads(self) -> int | None:
        """Query heads of a rank where the model's attention is plain latent attention throughout; else None."""
        return latent_heads(self.model, self.deployment.attention_tp_size, self.plan.dcp_size)

    @property
    def told(self) -> bool:
        """Whether ``max_running`` was stated, and is not the engine's default."""
        return self.request.size.max_num_seqs is not None

    @property
    def num_ranks(self) -> int:
        """Attention ranks with requests of their own, over all replicas."""
        return self.deployment.attention_dp_size * self.deployment.num_replicas

    def scheduler_limit(self, requests: float) -> str | None:
        """Which limit keeps so many requests over all ranks from running at once, in words; None when none does."""
        each = math.ceil(requests / self.num_ranks)
        if self.max_running is None or each <= self.max_running:
            return None
        where = "" if self.num_ranks == 1 else f" on each of {self.num_ranks} ranks"
        if self.told:
            return f"--max-num-seqs {self.max_running} runs {self.max_running:,} at once{where}"
        runs = f"{self.setup.engine.name} runs {self.max_running:,} at once{where} unless told"
        return f"{runs} (--max-num-seqs {each})"

    def batch_per_rank(self, batch_size: Any) -> Floats:
        """Requests of the fullest attention rank in one step, for a batch over all ranks and replicas."""
        return np.asarray(np.ceil(np.asarray(batch_size, dtype=float) / self.num_ranks))

    def max_batch(self, context_tokens: Any, batch_per_rank: Floats | None = None) -> Floats | None:
        """Requests of that context all ranks hold, each told to run ``batch_per_rank``; None if memory is unknown.

        None at all where the longest request that was stated is more than KV memory holds: the server does not start.
        """
        if self.available_bytes is None:
            return None
        longest = self.setup.request.max_model_len_tokens
        if longest is not None and not self.plan.fits_one(self.available_bytes, longest):
            return np.zeros_like(np.asarray(context_tokens, dtype=float))
        held = self._held(self.available_bytes, context_tokens, context_tokens)
        if batch_per_rank is not None:
            beyond = batch_per_rank > (self.setup.default_num_seqs or np.inf)
            for count in set(batch_per_rank[beyond].tolist()):
                left, there = kv_bytes_for(self.setup, int(count), self.available_bytes), batch_per_rank == count
                held[there] = max_batches(self.plan, left, context_tokens[there])
        return np.asarray(held * self.num_ranks, dtype=float)

    def _held(self, available_bytes: int, context_tokens: Floats, longest_tokens: Floats) -> Ints:
        """Requests of each context that one rank holds, where the server takes requests up to so long."""
        held = max_batches(self.plan, available_bytes, context_tokens)
        if kv_bytes_at(self.setup, int(np.max(longest_tokens)), available_bytes) != available_bytes:
            for longest in set(longest_tokens.tolist()):
                left, there = kv_bytes_at(self.setup, int(longest), available_bytes), longest_tokens == longest
                held[there] = max_batches(self.plan, left, context_tokens[there])
        return held

    def step_features(self, batch_per_rank: Floats, context_tokens: Number) -> StepFeatures:
        """Features of a step of ``batch_per_rank`` requests at a mean context; both float arrays of one shape."""
        t, d, peak = self.traffic, self.deployment, self.peaks.bandwidth_bytes_per_s
        in_step = np.maximum(batch_per_rank / d.pp_size, 1.0)
        tokens = in_step * d.attention_dp_size
        ones = np.ones_like(in_step)
        kv_bytes = in_step * t.kv_read_bytes(np.asarray(context_tokens, dtype=float), self.kv_speed.slowdown)
        return StepFeatures(
            dense_s=ones * (t.dense_weight_bytes / peak),
            expert_s=ones * (t.weights["expert"].resident_bytes / peak),
            expert_chance=ones * t.expert_chance,
            flops_s=tokens * self._matrix_seconds_per_token(),
            kv_s=kv_bytes / peak,
            collectives=ones * (t.num_collectives + d.pp_size - 1),
            collective_factor=ones * self.collective_factor,
            message_s=t.message_bytes(in_step) / self.peaks.link_bytes_per_s,
            kernels=ones * t.num_kernels,
            is_moe=ones * (t.num_experts > 0),
            sequences=tokens,
        )

    @property
    def collective_factor(self) -> float:
        """Latency of one small collective here over that between two Hopper GPUs on NVLink."""
        return float(self.peaks.collective_factor * (0.95 + 0.05 * np.log2(max(self.deployment.tp_group_size, 2))))

    def kv_slope_s(self, batch_per_rank: Floats, context_tokens: Number) -> Floats:
        """d(``kv_s``)/d(context) of a step."""
        in_step = np.maximum(batch_per_rank / self.deployment.pp_size, 1.0)
        context = np.asarray(context_tokens, dtype=float)
        slope = self.traffic.kv_slope_bytes_per_token(context, self.kv_speed.slowdown)
        return np.asarray(in_step * slope / self.peaks.bandwidth_bytes_per_s)

    def load_features(self, input_tokens: Floats, output_tokens: Floats, has_spread: Floats) -> LoadFeatures:
        """Features of prompts and outputs of these true mean lengths."""
        t, d = self.traffic, self.deployment
        attention = input_tokens**2 / 2 * t.prefill_attention_flops / (d.tp_group_size * self.peaks.flops_per_s["bf16"])
        matrix = input_tokens * self._matrix_seconds_per_token()
        moved = t.num_collectives * t.message_bytes(input_tokens) / self.peaks.link_bytes_per_s
        moved = (moved + t.activation_bytes(input_tokens) / self.peaks.bandwidth_bytes_per_s) / d.attention_dp_size
        first = np.full_like(has_spread, self.setup.engine.name in PROMPTS_FIRST)
        return LoadFeatures(input_tokens, output_tokens, matrix, attention, moved, has_spread, first)

    def _matrix_seconds_per_token(self) -> float:
        """Seconds at peak of one token's matrix FLOPs over the GPUs of a stage, precisions' usual reach divided out."""
        reach = float(np.exp(PRECISION_REACH[precision_class(self._main_format())]))
        total = 0.0
        for name, part in self.traffic.weights.items():
            if name in ("head", "router"):
                continue
            peak = self.peaks.flops_per_s[precision_class(part.format)]
            total += self.traffic.matrix_flops_per_token(name) / (peak * self.deployment.tp_group_size)
        return total / reach

    def _main_format(self) -> str:
        return self.traffic.weights["expert" if self.traffic.num_experts else "mlp"].format

    def running_requests(self, concurrency: Floats, input_tokens: Floats, output_tokens: Floats) -> Floats:
        """Requests one attention rank runs at once: its share of the clients as KV and scheduler let, at least one."""
        share = np.minimum(concurrency / self.num_ranks, np.inf if self.max_running is None else self.max_running)
        if self.available_bytes is None:
            return np.maximum(share, 1.0)
        reserved = RESERVED_OUTPUT.get(self.setup.engine.name, MID_REQUEST)
        decided_at, longest = np.ceil(input_tokens + reserved * output_tokens), np.ceil(input_tokens + output_tokens)
        held = self._held(self.available_bytes, decided_at, longest)
        return np.asarray(np.maximum(np.where(held < 1, share, np.minimum(share, held)), 1.0))
