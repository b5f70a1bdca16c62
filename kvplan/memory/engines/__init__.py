"""Rule sets: one module each, from a model and options to a ``CachePlan``, with the engine's own memory defaults.

Adding an engine is one module with ``plan_cache`` and an ``Engine`` entry here, and its golden cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvplan.errors import InputError, UnknownNameError, shorten
from kvplan.gpu import GpuSpec
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.engines.options import EngineOptions, MemoryFraction
from kvplan.model_config.types import ModelConfig

PlanFunction = Callable[[ModelConfig, EngineOptions], CachePlan]


@dataclass(frozen=True)
class Engine:
    """An engine: its rule set and what its memory options mean.

    Attributes:
        name, version: default version of the rules.
        plan_cache: the rule set.
        fraction_of: ``total`` (vLLM: the KV budget is fraction × total less everything else), ``static`` (SGLang:
            weights and KV together get fraction × what is free before weights are loaded) or ``free`` (TensorRT-LLM:
            KV gets fraction × what is free after everything else).
        default_fraction: for a model and options, with its derivation where there is one.
        kept_share: what of the fraction, a given one too, the engine really takes.
        table_bytes: what it allocates for each request that may run, beside KV and the fraction.
        splits_contexts: its decode context parallelism is among the rules that were read, so that it may be advised.
        default_batched_tokens: tokens of a step of one replica unless told, for a GPU, a version and ranks of
            data-parallel attention; None where they are vLLM's.
        fraction_flag: the engine's own option.
        exact: whether the rules reproduce the engine's allocator.
        default_num_seqs: requests a replica runs at once unless told, for a GPU and version; None where the rules do
            not say (SGLang works it out from its pool).
        derived_num_seqs: the same of an engine that works it out from its cache (plan, KV bytes, longest request), with
            the formula and its source.
        experts_span_dp: data-parallel ranks share the experts of a model though no expert parallelism is asked for
            (vLLM's ``docs/serving/data_parallel_deployment.md``); else they are replicas.

    """

    name: str
    version: str
    plan_cache: PlanFunction
    fraction_of: str
    default_fraction: Callable[[ModelConfig, EngineOptions], MemoryFraction]
    fraction_flag: str
    fraction_source: str
    exact: bool
    default_num_seqs: Callable[[GpuSpec | None, tuple[int, ...]], int | None] = lambda gpu, version: None
    experts_span_dp: bool = False
    splits_contexts: bool = False
    default_batched_tokens: Callable[[GpuSpec | None, tuple[int, ...], int], int] | None = None
    derived_num_seqs: Callable[[CachePlan, int, int], tuple[int, str, str]] | None = None
    kept_share: Callable[[ModelConfig, EngineOptions], float] = lambda model, options: 1.0
    table_bytes: Callable[[EngineOptions], int] = lambda options: 0


def _vllm_plan(model: ModelConfig, options: EngineOptions) -> CachePlan:
    from kvplan.memory.engines import vllm

    return vllm.plan_cache(model, options)


def _sglang_plan(model: ModelConfig, options: EngineOptions) -> CachePlan:
    from kvplan.memory.engines import sglang

    return sglang.plan_cache(model, options)


def _tensorrt_llm_plan(model: ModelConfig, options: EngineOptions) -> CachePlan:
    from kvplan.memory.engines import tensorrt_llm

    return tensorrt_llm.plan_cache(model, options)


def _generic_plan(model: ModelConfig, options: EngineOptions) -> CachePlan:
    from kvplan.memory.engines import generic

    return generic.plan_cache(model, options)


def _vllm_fraction(model: ModelConfig, options: EngineOptions) -> MemoryFraction:
    from kvplan.memory.engines.vllm_versions import CURRENT, VersionRules

    return MemoryFraction(VersionRules(options.version or CURRENT).default_fraction)


def _vllm_num_seqs(gpu: GpuSpec | None, version: tuple[int, ...]) -> int:
    from kvplan.memory.engines.vllm_versions import VersionRules

    return VersionRules(version).default_num_seqs(gpu)


def _sglang_fraction(model: ModelConfig, options: EngineOptions) -> MemoryFraction:
    from kvplan.memory.engines import sglang_memory

    return sglang_memory.default_fraction(model, options)


def _sglang_batched(gpu: GpuSpec | None, version: tuple[int, ...], attention_dp: int) -> int:
    from kvplan.memory.engines import sglang_memory

    return sglang_memory.default_batched_tokens(gpu, version, attention_dp)


def _sglang_num_seqs(plan: CachePlan, available_bytes: int, longest_tokens: int) -> tuple[int, str, str]:
    from kvplan.memory.engines import sglang

    return sglang.running_limit(plan, available_bytes, longest_tokens)


def _sglang_share(model: ModelConfig, options: EngineOptions) -> float:
    from kvplan.memory.engines import sglang_memory

    return sglang_memory.aiter_share(model, options)


def _sglang_table(options: EngineOptions) -> int:
    from kvplan.memory.engines import sglang_memory

    return sglang_memory.request_table_bytes(options)


def _constant(value: float) -> Callable[[ModelConfig, EngineOptions], MemoryFraction]:
    return lambda model, options: MemoryFraction(value)


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("vllm", "0.33", _vllm_plan, "total", _vllm_fraction, "--gpu-memory-utilization",
               "vllm/config/cache.py", True, _vllm_num_seqs, experts_span_dp=True,
               splits_contexts=True),
        Engine("sglang", "0.5", _sglang_plan, "static", _sglang_fraction, "--mem-fraction-static",
               "sglang/srt", False, default_batched_tokens=_sglang_batched, derived_num_seqs=_sglang_num_seqs,
               kept_share=_sglang_share, table_bytes=_sglang_table),
        Engine("tensorrt-llm", "1.3", _tensorrt_llm_plan, "free", _constant(0.9), "free_gpu_memory_fraction",
               "tensorrt_llm/llmapi/llm_args.py KvCacheConfig", False),
        Engine("generic", "1", _generic_plan, "total", _constant(0.9), "--gpu-memory-utilization",
               "kvplan's own convention", False, splits_contexts=True),
    )
}  # fmt: skip
ALIASES = {"trtllm": "tensorrt-llm", "trt-llm": "tensorrt-llm", "tensorrt_llm": "tensorrt-llm", "sgl": "sglang"}


def resolve_engine(name: str) -> Engine:
    """The engine called ``name``.

    Raises:
        UnknownNameError: no such engine; carries the closest names.

    """
    key = ALIASES.get(name.strip().lower(), name.strip().lower())
    if key not in ENGINES:
        raise UnknownNameError("engine", name, [*ENGINES, *ALIASES], hint=f"engines: {', '.join(ENGINES)}")
    return ENGINES[key]


def parse_version(text: str | None, default: str) -> tuple[int, ...]:
    """``"0.33.0"`` → ``(0, 33, 0)``; trailing words (``rc1``, ``.dev``) are cut.

    Raises:
        InputError: no leading number.

    """
    parts: list[int] = []
    for piece in (text or default).strip().lstrip("vV").split("."):
        digits = piece[: len(piece) - len(piece.lstrip("0123456789"))]
        if not digits or len(digits) > 6:
            break
        parts.append(int(digits))
    if not parts:
        raise InputError(f"engine version {shorten(text)!r} is not a version", hint="write 0.33 or 0.33.0")
    return tuple(parts[:3])
