"""TensorRT-LLM 1.3, approximated: blocks of 32 tokens, a pool per window size.

Sources, under ``tensorrt_llm/``: ``llmapi/llm_args.py`` (KvCacheConfig: tokens_per_block 32, free_gpu_memory_fraction
0.9), ``_torch/pyexecutor/resource_manager.py`` (KVCacheManager: bytes per token, pools per window).
What is left out: host offloading, the split of memory between window pools, and the state manager's own budget.
DeepSeek-V4: ``examples/models/core/deepseek_v4/README.md`` (blocks of 128 tokens, tokenizer, GPUs). 1.3.0rc24 loads it,
and stops on an RTX PRO 6000 (NVIDIA/TensorRT-LLM#18039); the newest stable release, 1.2.1, has no such model. The
bytes of its rows were not read: they are taken as vLLM's.
"""

from __future__ import annotations

from dataclasses import replace

from kvplan.errors import UnsupportedError
from kvplan.gpu import GpuSpec
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.engines import approximate
from kvplan.memory.engines.options import EngineOptions
from kvplan.model_config.types import ModelConfig

COMPRESSED_SINCE = "1.3.0rc24"
COMPRESSED_BLOCK_TOKENS = 128
FORMATS = frozenset({"bfloat16", "float16", "fp8", "fp8_e4m3", "nvfp4"})


def _auto(model: ModelConfig) -> str:
    declared = model.quantization.kv_cache_declared if model.quantization else None
    return declared or ("float16" if model.dtype == "float16" else "bfloat16")


RULES = approximate.Rules("tensorrt-llm", "1.3", 32, "tensorrt_llm/_torch/pyexecutor/resource_manager.py", FORMATS,
                          auto=_auto)  # fmt: skip


def elsewhere(model: ModelConfig, gpu: GpuSpec | None) -> str | None:
    """Why the engine does not run the model on the GPU; None where it does, or the GPU is not known."""
    if gpu is not None and gpu.vendor == "amd":
        return "it runs on NVIDIA GPUs only"
    sm = None if gpu is None else gpu.sm
    if "compressed" in model.cache_kinds and sm is not None and not 100 <= sm < 120:
        return f"it runs DeepSeek-V4 on B200, B300 and their GB200 and GB300 only ({COMPRESSED_SINCE})"
    return None


def plan_cache(model: ModelConfig, options: EngineOptions) -> CachePlan:
    """The cache of ``model`` in TensorRT-LLM's block pools; an approximation.

    Raises:
        UnsupportedError: the GPU is not NVIDIA's, or it or the version does not run the model.

    """
    reason = elsewhere(model, options.gpu)
    if reason is not None:
        raise UnsupportedError(f"TensorRT-LLM: {reason}", hint="--engine vllm or sglang")
    compressed = "compressed" in model.cache_kinds
    if compressed and options.version is not None and options.version < (1, 3):
        raise UnsupportedError(
            f"TensorRT-LLM {'.'.join(map(str, options.version))} has no DeepSeek-V4",
            hint=f"--engine-version {COMPRESSED_SINCE} or later",
        )
    rules = replace(RULES, default_block_tokens=COMPRESSED_BLOCK_TOKENS) if compressed else RULES
    return approximate.plan_cache(rules, model, options)
