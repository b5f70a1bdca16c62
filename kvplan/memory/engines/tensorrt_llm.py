"""TensorRT-LLM 1.3, approximated: blocks of 32 tokens, a pool per window size.

Sources, under ``tensorrt_llm/``: ``llmapi/llm_args.py`` (KvCacheConfig: tokens_per_block 32, free_gpu_memory_fraction
0.9), ``_torch/pyexecutor/resource_manager.py`` (KVCacheManager: bytes per token, pools per window).
What is left out: host offloading, the split of memory between window pools, and the state manager's own budget.
"""

from __future__ import annotations

from kvplan.errors import UnsupportedError
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.engines import approximate
from kvplan.memory.engines.options import EngineOptions
from kvplan.model_config.types import ModelConfig

ELSEWHERE = "it runs on NVIDIA GPUs only"
FORMATS = frozenset({"bfloat16", "float16", "fp8", "fp8_e4m3", "nvfp4"})


def _auto(model: ModelConfig) -> str:
    declared = model.quantization.kv_cache_declared if model.quantization else None
    return declared or ("float16" if model.dtype == "float16" else "bfloat16")


RULES = approximate.Rules("tensorrt-llm", "1.3", 32, "tensorrt_llm/_torch/pyexecutor/resource_manager.py", FORMATS,
                          auto=_auto)  # fmt: skip


def plan_cache(model: ModelConfig, options: EngineOptions) -> CachePlan:
    """The cache of ``model`` in TensorRT-LLM's block pools; an approximation.

    Raises:
        UnsupportedError: the GPU is not NVIDIA's.

    """
    if options.gpu is not None and options.gpu.vendor == "amd":
        raise UnsupportedError(f"TensorRT-LLM: {ELSEWHERE}", hint="--engine vllm or sglang")
    return approximate.plan_cache(RULES, model, options)
