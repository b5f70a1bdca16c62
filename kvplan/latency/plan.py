"""The answer to a latency request: typed, what the command line prints and ``--json`` serialises."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from kvplan.latency.request import POINT_NAMES, Point
from kvplan.memory.request import Source
from kvplan.model_config.types import beyond_claim

SCHEMA_VERSION = 1
DEFINITIONS = {
    "itl_s": "inter-token latency: one gap between tokens of a request, which is one decode step",
    "tpot_s": "mean time per output token of a request under load: (end − first token) / (output tokens − 1); the "
    "interference of other requests' prefill is in it",
    "ttft_s": "time from sending a request to its first token, under steady load; where requests of equal lengths "
    "start at once, the first of them wait several times as long",
    "slope_s_per_token": "growth of itl_s for each token that every request's context grows by, the whole batch",
    "breakdown": "seconds of itl_s by what takes them: weights read, KV read, products that weights do not hide, "
    "collectives, overhead",
    "length_spread": "how far below nominal the lengths of requests are drawn; where unstated they average 0.95 of "
    "nominal, as in public benchmarks",
    "interval_s": "80% interval: from residuals of deployments that were left out of the fit",
}


class Breakdown(NamedTuple):
    """Seconds of the parts of one decode step; they add up to ``itl_s``."""

    weights_s: float
    kv_s: float
    compute_s: float
    collectives_s: float
    overhead_s: float

    def as_dict(self) -> dict[str, float]:
        """The contract's keys, seconds."""
        return {"weights": self.weights_s, "kv": self.kv_s, "compute": self.compute_s,
                "collectives": self.collectives_s, "overhead": self.overhead_s}  # fmt: skip


class Load(NamedTuple):
    """Requests under a closed loop of clients.

    Attributes:
        running_requests: requests that decode at once over all ranks; fewer than the clients when KV runs out
            or the scheduler runs no more.
        wait_note: why fewer than the clients run, in words; None when all do.
        prefill_wait_s: the part of ``tpot_s`` that is other requests' prefill.

    """

    tpot_s: float
    tpot_interval_s: tuple[float, float]
    ttft_s: float
    ttft_interval_s: tuple[float, float]
    prefill_wait_s: float
    running_requests: float
    wait_note: str | None = None


class DeploymentFacts(NamedTuple):
    """What all points of one deployment share: the resolved request, sources, notes, the checkpoint's own limit."""

    request: dict[str, Any]
    num_gpus: int
    describe: str
    source: Source
    source_detail: str
    notes: tuple[str, ...]
    claimed_context_tokens: int | None = None


class ItlPlan(NamedTuple):
    """One point of one deployment.

    Attributes:
        itl_s: a decode step at the context (under load: at the mean context of the running requests).
        intercept_s, slope_s_per_token: ``itl_s = intercept_s + slope_s_per_token × context``, exact at this point and
            along the linear piece it lies on.
        fits: whether the KV of the batch fits at once, and a stated ``max_num_seqs`` lets it run; None when memory is
            unknown.
        roofline_s: weights and KV at peak bandwidth, experts as skewed routing touches them.
        interval_s: [low, high] of ``itl_s``, 80%.
        interval_note: what the interval comes from, in words.
        load: TPOT, TTFT and running requests where a load was asked about (``plan.load.tpot_s``); None for one step.
        facts: what all points of the deployment share; ``facts.request`` is the request as resolved.
        point: what was asked at this point.

    """

    facts: DeploymentFacts
    point: Point
    context_tokens: float
    itl_s: float
    intercept_s: float
    slope_s_per_token: float
    breakdown: Breakdown
    interval_s: tuple[float, float]
    interval_note: str
    roofline_s: float
    fits: bool | None
    load: Load | None = None
    detail: Mapping[str, Any] | None = None

    @property
    def source(self) -> Source:
        """``calibrated`` or ``assumed``."""
        return self.facts.source

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken for granted of the deployment, and that a request is longer than its checkpoint claims."""
        beyond = beyond_claim(self.point.longest_tokens, self.facts.claimed_context_tokens)
        return self.facts.notes if beyond is None else (*self.facts.notes, beyond)

    @property
    def tokens_per_s_per_user(self) -> float:
        """Tokens a second one request receives."""
        return 1 / (self.load.tpot_s if self.load is not None else self.itl_s)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Output tokens a second each GPU yields."""
        requests = self.load.running_requests if self.load is not None else float(self.point.batch_size or 1)
        return requests * self.tokens_per_s_per_user / self.facts.num_gpus

    def as_dict(self) -> dict[str, Any]:
        """The JSON contract, and more."""
        point = {name: value for name in POINT_NAMES if (value := getattr(self.point, name)) is not None}
        found: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "request": {**self.facts.request, **point},
            "num_gpus": self.facts.num_gpus,
            "itl_s": self.itl_s,
            "intercept_s": self.intercept_s,
            "slope_s_per_token": self.slope_s_per_token,
            "breakdown": self.breakdown.as_dict(),
            "source": self.facts.source,
            "source_detail": self.facts.source_detail,
            "interval_s": list(self.interval_s),
            "interval_note": self.interval_note,
            "roofline_s": self.roofline_s,
            "fits": self.fits,
            "tokens_per_s_per_user": self.tokens_per_s_per_user,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "notes": list(self.notes),
        }
        if self.load is not None:
            load = self.load
            found["notes"] += [load.wait_note] if load.wait_note is not None else []
            found |= {
                "tpot_s": load.tpot_s, "tpot_interval_s": list(load.tpot_interval_s),
                "ttft_s": load.ttft_s, "ttft_interval_s": list(load.ttft_interval_s),
                "prefill_wait_s": load.prefill_wait_s, "running_requests": load.running_requests,
                "mean_context_tokens": self.context_tokens,
            }  # fmt: skip
        return found | dict(self.detail or {})

    def to_json(self, indent: int | None = None) -> str:
        """``as_dict`` as JSON."""
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)
