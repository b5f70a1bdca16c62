"""``kvplan itl --explain``: one step with its numbers, term by term, and the traffic behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvplan.latency.lines import traffic_of
from kvplan.latency.plan import ItlPlan
from kvplan.latency.planner import collective_latency_s, kernel_kv_stream, parameters_of
from kvplan.latency.step import stream_share
from kvplan.terminal.plain import Page
from kvplan.units import format_bytes, format_bytes_per_s, format_seconds, format_tokens

if TYPE_CHECKING:
    from kvplan.latency.served import Served

LINK_NAMES = {"nvlink": "NVLink", "xgmi": "xGMI", "pcie": "PCIe"}


def show_step(page: Page, served: Served, plan: ItlPlan, label: str) -> None:
    """The formula with the numbers in it, and the traffic behind them."""
    parts, traffic = plan.breakdown, traffic_of(served, plan)
    page.line(f"{label} at {plan.context_tokens:,.0f} tokens: {format_seconds(plan.itl_s)} =", "bold")
    peak = served.peaks.bandwidth_bytes_per_s
    read, kv = traffic["weights_read_bytes"], traffic["kv_read_bytes"]
    total = sum(read.values())
    rows = [
        (
            "weights",
            parts.weights_s,
            f"{format_bytes(total)} read a step and GPU; {format_seconds(total / peak)} at {format_bytes_per_s(peak)}",
        ),
        (
            "compute",
            parts.compute_s,
            f"{traffic['matrix_flops'] / 1e9:,.1f} GFLOP of matrix products, where weights do not hide them",
        ),
        (
            "kv",
            parts.kv_s,
            f"{format_bytes(kv)} read, {format_bytes(traffic['kv_stored_bytes'])} stored; "
            f"{format_seconds(kv / peak)} at peak",
        ),
        (
            "collectives",
            parts.collectives_s,
            _collectives(served, plan, traffic["collectives"]),
        ),
        ("overhead", parts.overhead_s, f"{served.traffic.num_kernels:,} kernels, the step, and its sequences"),
    ]
    for name, seconds, how in rows:
        page.line(f"  {name:<12}{format_seconds(seconds):>10}  {how}")
    experts = traffic["expert_share_read"]
    shown = ", ".join(f"{name} {format_bytes(size)}" for name, size in read.items() if size)
    page.line(f"  weights: {shown}", "dim")
    if experts is not None:
        page.line(
            f"  experts touched: {experts:.1%} of {served.traffic.num_experts}, skewed routing; uniform: "
            f"1 − (1 − {served.traffic.top_k_experts}/{served.traffic.num_experts})^tokens = "
            f"{traffic['expert_share_uniform']:.1%}",
            "dim",
        )
    for part in traffic["kv_layers"]:
        limit = "" if part["limit_tokens"] is None else f", at most {format_tokens(part['limit_tokens'])} tokens"
        page.line(
            f"  kv: {part['num_layers']} {part['kind']} layers read {format_bytes(part['read_bytes'])}{limit}",
            "dim",
        )
    for text in _parameters(served, plan):
        page.line(f"  {text}", "dim")
    page.line(f"  roofline (bytes at peak, nothing else): {format_seconds(plan.roofline_s)}", "dim")
    page.line(f"  KV format: {served.kv_speed.detail}", "dim")


def _collectives(served: Served, plan: ItlPlan, counts: Mapping[str, int]) -> str:
    """How many messages of each kind, through what, and what one takes: its latency, and the data it moves."""
    kinds = {"all_reduce_count": "all-reduces", "all_to_all_count": "all-to-alls", "p2p_count": "sends"}
    found = {name: counts[key] for key, name in kinds.items() if counts[key]}
    if not found:
        return "one GPU: none"
    link = LINK_NAMES[served.gpu.link_kind or "pcie"]
    each, start = plan.breakdown.collectives_s / sum(found.values()), collective_latency_s(served)
    named = ", ".join(f"{count} {name}" for name, count in found.items())
    return f"{named} over {link}: {format_seconds(start)} each and {format_seconds(max(each - start, 0))} of data"


def _parameters(served: Served, plan: ItlPlan) -> list[str]:
    """What the parameters of this deployment are, in words."""
    p = parameters_of(served)
    is_moe = served.traffic.num_experts > 0
    kernel_s = format_seconds(math.exp(p["kernel_moe_s"] if is_moe else p["kernel_dense_s"]))
    experts = f", experts at {float(stream_share(p['expert_stream'])):.0%}" if is_moe else ""
    weights, kv = (float(stream_share(p[name])) for name in ("weight_stream", "kv_stream"))
    step, sequence = (format_seconds(math.exp(p[n])) for n in ("step_s", "sequence_s"))
    found = [
        f"{plan.source}: weights at {weights:.0%} of peak bandwidth{experts}, KV at {kv:.0%}; "
        f"{kernel_s} a kernel, {step} a step, {sequence} a sequence"
    ]
    kernel = kernel_kv_stream(served)
    if kernel is not None:
        found.append(f"the attention kernel alone, as calibrated, reads 16-bit KV at {kernel:.0%} of peak bandwidth")
    return found
