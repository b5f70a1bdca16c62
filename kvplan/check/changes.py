"""What may be otherwise than planned: a few fields of the request each, tried one at a time on what drifted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvplan.check.basis import Basis
from kvplan.check.server import ServerReport
from kvplan.gpu import GpuSpec, gpu_names, load_gpu, resolve_gpu
from kvplan.memory.plan import SizePlan
from kvplan.units import format_gib, format_tokens

SAME_MEMORY = 0.02
"""How much more memory a GPU may have than the smallest of those a cause names together with it."""


@dataclass(frozen=True)
class Change:
    """One thing that may be otherwise than planned: fields of the request, and the words for it."""

    code: str
    fields: Mapping[str, Any]
    message: str
    fix: str


def rule_changes(report: ServerReport, basis: Basis, plan: SizePlan) -> Iterator[Change]:
    """What the allocator may have done differently."""
    current = plan.kv_cache.kv_cache_dtype
    for dtype in ("bfloat16", "fp8", "fp8_per_token_head"):
        if dtype != current:
            yield Change("kv_dtype", {"kv_cache_dtype": dtype}, f"the cache holds {dtype}, not {current}",
                         "look for a fallback of the attention backend in the log; set --kv-cache-dtype")  # fmt: skip
    block = report.value("observed_block_tokens")
    if block is not None and block != plan.kv_cache.block_size_tokens:
        yield Change("hybrid_block", {"block_size_tokens": block},
                     f"this version pads hybrid blocks to {block:,} tokens, not {plan.kv_cache.block_size_tokens:,}",
                     "nothing: plan with --block-size, or with the version the server runs")  # fmt: skip
    if not basis.options.get("gpu"):
        for gpu, name in (("l4", "before Hopper"), ("b200", "of the Blackwell generation")):
            yield Change("gpu_generation", {"gpu": gpu}, f"a GPU {name}, whose kernels store the cache otherwise",
                         "name the GPU with --gpu")  # fmt: skip
    caching = plan.request.enable_prefix_caching
    if "enable_prefix_caching" not in report.facts:
        yield Change("prefix_caching", {"enable_prefix_caching": not caching},
                     f"prefix caching is {'off' if caching else 'on'}, not {'on' if caching else 'off'}",
                     "set --enable-prefix-caching or --no-enable-prefix-caching in both")  # fmt: skip
    yield from _tp_changes(report, plan)
    for version in ("0.19", "0.22", "0.33"):
        if report.engine == "vllm" and "engine_version" not in report.facts:
            yield Change("engine_version", {"engine_version": version},
                         f"the formulas of vLLM {version}, not {plan.request.engine_version}",
                         "give the server's version with --engine-version")  # fmt: skip
    kinds = plan.model.layer_kinds.keys() if plan.model is not None else set()
    windows = kinds & {"sliding", "chunked", "compressed"}
    for tokens in (2048, 8192, 16384) if windows else ():
        if tokens != plan.request.max_num_batched_tokens:
            yield Change("max_num_batched_tokens", {"max_num_batched_tokens": tokens},
                         f"{format_tokens(tokens)} batched tokens in flight for the windows, "
                         f"not {format_tokens(plan.request.max_num_batched_tokens)}",
                         "give the server's --max-num-batched-tokens")  # fmt: skip


def _tp_changes(report: ServerReport, plan: SizePlan) -> Iterator[Change]:
    """Other numbers of ranks, where the server states none."""
    for tp in (1, 2, 4, 8):
        if tp != plan.request.tp_size and "tp_size" not in report.facts:
            yield Change(
                "tp_size", {"tp_size": tp}, f"TP {tp}, not {plan.request.tp_size}", "plan with the server's --tp"
            )


def memory_changes(report: ServerReport, basis: Basis, plan: SizePlan) -> Iterator[Change]:
    """What the budget may have been made of."""
    if report.engine == "vllm" and "gpu_memory_utilization" not in report.facts:
        for fraction, versions in ((0.9, "before 0.20"), (0.92, "from 0.20 on")):
            if fraction != plan.request.gpu_memory_utilization:
                yield Change("default_utilization", {"gpu_memory_utilization": fraction},
                             f"a memory fraction of {fraction:g}, vLLM's default {versions}, "
                             f"not {plan.request.gpu_memory_utilization:g}",
                             "state --gpu-memory-utilization, so that a version change does not move it")  # fmt: skip
    observed = report.number("weights_bytes")
    if observed is not None:
        stored = plan.model.weight_format if plan.model is not None else ""
        for dtype in ("bf16", "fp8", "int4", "nvfp4"):
            if not stored.startswith(dtype):
                yield Change("weight_dtype", {"weight_dtype": dtype}, f"weights stored as {dtype}, not {stored}",
                             "check the checkpoint and --quantization; plan with --weight-dtype")  # fmt: skip
        yield from _tp_changes(report, plan)
        if report.value("ep") is None and not plan.request.ep:
            yield Change("ep", {"ep": True}, "experts are split over all ranks", "plan with --ep")
    if "gpu" in basis.given and not report.facts.keys() & {"gpu", "total_bytes"}:
        yield from _gpu_changes(plan)


def gpus_of(memory_bytes: int) -> list[str]:
    """The bundled GPUs that have so much memory, the closest first."""
    found = [gpu for gpu in map(load_gpu, gpu_names()) if abs(gpu.memory_bytes / memory_bytes - 1) <= SAME_MEMORY]
    return [gpu.name for gpu in sorted(found, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes))]


def _gpu_changes(plan: SizePlan) -> Iterator[Change]:
    """GPUs of another size of memory, those of one size together."""
    planned = resolve_gpu(plan.request.gpu or "")
    sizes: list[list[GpuSpec]] = []
    for gpu in sorted(map(load_gpu, gpu_names()), key=lambda gpu: gpu.memory_bytes):
        if sizes and gpu.memory_bytes <= sizes[-1][0].memory_bytes * (1 + SAME_MEMORY):
            sizes[-1].append(gpu)
        else:
            sizes.append([gpu])
    for gpus in sizes:
        if planned.name not in {gpu.name for gpu in gpus}:
            names = ", ".join(gpu.name for gpu in gpus)
            yield Change("gpu", {"gpu": gpus[0].name},
                         f"a GPU of {format_gib(gpus[0].memory_bytes)} ({names}), not {planned.name}",
                         "look at nvidia-smi on the server, and name its GPU with --gpu")  # fmt: skip
