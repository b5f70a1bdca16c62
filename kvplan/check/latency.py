"""Observed inter-token latency against the prediction at the observed batch and context."""

from __future__ import annotations

from typing import Any

from kvplan.check.basis import Basis
from kvplan.check.result import Term, Verdict
from kvplan.check.server import ServerReport
from kvplan.errors import KvplanError

FIELDS = ("model", "gpu", "engine", "engine_version", "tp_size", "pp_size", "dp_size", "ep", "kv_cache_dtype",
          "weight_dtype", "block_size_tokens", "gpu_memory_utilization")  # fmt: skip


def latency_term(report: ServerReport, basis: Basis, tolerance: float) -> Term | None:
    """The term ``itl_s``; None where the server reports no latency.

    The mean over a server's histogram has the prefill of other requests in it: it is held against TPOT under load where
    lengths are known, else against one decode step. It agrees inside the prediction's 80% interval, or within
    ``tolerance``.
    """
    fact = report.facts.get("itl_s")
    if fact is None:
        return None

    def unchecked(why: str) -> Term:
        return Term(
            "itl_s", "inter-token latency", "s", None, fact.value, "unknown", fact.where, "not checked", note=why
        )

    batch, prompt, answer = (report.number(name) for name in ("batch_size", "input_tokens", "output_tokens"))
    if "gpu" not in basis.options:
        return unchecked("no GPU named: add --gpu")
    if batch is None:
        return unchecked("no request was running and no steps were counted: no batch to predict at")
    if prompt is None:
        return unchecked("the server counted no prompt lengths: no context to predict at")
    options: dict[str, Any] = {name: basis.options[name] for name in FIELDS if name in basis.options}
    requests = max(1, round(batch * basis.options.get("dp_size", 1)))
    context = max(1, round(prompt + (answer or 0) / 2))
    from kvplan.latency.planner import plan_one

    try:
        if answer is not None and answer >= 2:
            plan = plan_one({**options, "input_tokens": max(1, round(prompt)), "output_tokens": round(answer),
                             "concurrency": requests})  # fmt: skip
            assert plan.load is not None
            planned, (low, high) = plan.load.tpot_s, plan.load.tpot_interval_s
        else:
            plan = plan_one({**options, "context_tokens": context, "batch_size": requests})
            planned, (low, high) = plan.itl_s, plan.interval_s
    except KvplanError as error:
        return unchecked(error.message)
    note = f"batch {requests:,}, context {context:,}; 80% interval {1e3 * low:.1f} to {1e3 * high:.1f} ms"
    low, high = min(low, planned * (1 - tolerance)), max(high, planned * (1 + tolerance))
    verdict: Verdict = "agrees" if low <= fact.number <= high else "drifted"
    return Term("itl_s", "inter-token latency", "s", planned, fact.value, plan.source, fact.where, verdict, low, high,
                note)  # fmt: skip
