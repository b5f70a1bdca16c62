"""Start-up logs as engines print them, made from numbers."""

from __future__ import annotations

import re
from typing import Any

PREFIX = "(EngineCore_DP0 pid=123) INFO 11-20 10:11:12 "


def version_of(row: dict[str, Any]) -> str | None:
    """``"~0.9/0.10"`` → ``"0.9"``; None where the row names no number."""
    match = re.search(r"\d+\.\d+(?:\.\d+)?", row.get("vllm_version") or "")
    return match[0] if match else None


def vllm_log(row: dict[str, Any], model: str) -> str:
    """A row of reported numbers in the words of its version: V0 up to 0.6, V1 with its changing details after."""
    version = version_of(row)
    length = row["max_model_len"]
    settings = (
        f"model='{model}', speculative_config=None, tokenizer='{model}', dtype=torch.{row['model_dtype']}, "
        f"max_seq_len={length or 4096}, tensor_parallel_size={row['tp']}, pipeline_parallel_size=1, "
        f"quantization=None, kv_cache_dtype={row['kv_cache_dtype']}, device_config=cuda, seed=0"
    )
    if version is not None and version.startswith("0.6"):
        return _v0(row, version, settings)
    comma = "" if version is None else ","
    lines = [f"(APIServer pid=1) INFO 11-20 10:10:59 [api_server.py:1839] vLLM API server version {version or 'dev'}"]
    if row["block_size"] is not None:
        lines.append(f"INFO 11-20 10:11:00 [utils.py:233] non-default args: {{'block_size': {row['block_size']}}}")
    if version is not None:
        lines.append(f"{PREFIX}[core.py:77] Initializing a V1 LLM engine (v{version}) with config: {settings}")
    block = row.get("exact_with_old_constants", {}).get("block")
    if block is not None:
        lines.append(
            f"{PREFIX}[config.py:228] Setting attention block size to {block} tokens to ensure that attention page "
            "size is >= mamba page size."
        )
    lines.append(f"{PREFIX}[gpu_worker.py:298] Available KV cache memory: {row['available_gib']:.2f} GiB")
    lines.append(f"{PREFIX}[kv_cache_utils.py:864] GPU KV cache size: {row['tokens']:{comma}} tokens")
    if row["max_concurrency"] is not None:
        lines.append(
            f"{PREFIX}[kv_cache_utils.py:868] Maximum concurrency for {length:{comma}} tokens per request: "
            f"{row['max_concurrency']:.2f}x"
        )
    return "\n".join(lines) + "\n"


def _v0(row: dict[str, Any], version: str, settings: str) -> str:
    blocks = row["num_gpu_blocks"]
    return (
        f"INFO 11-20 10:11:00 api_server.py:528] vLLM API server version {version}\n"
        f"INFO 11-20 10:11:00 llm_engine.py:237] Initializing an LLM engine (v{version}) with config: {settings}\n"
        "INFO 11-20 10:11:12 model_runner.py:1115] Loading model weights took 14.9888 GB\n"
        "INFO 11-20 10:11:28 worker.py:267] the current vLLM instance can use total_gpu_memory (22.07GiB) x "
        "gpu_memory_utilization (0.85) = 18.76GiB\n"
        "INFO 11-20 10:11:28 worker.py:267] model weights take 14.99GiB; non_torch_memory takes 0.66GiB; PyTorch "
        f"activation peak memory takes 0.22GiB; the rest of the memory reserved for KV Cache is "
        f"{row['available_gib']:.2f}GiB.\n"
        f"INFO 11-20 10:11:28 executor_base.py:110] # CUDA blocks: {blocks}, # CPU blocks: 2048\n"
        f"INFO 11-20 10:11:28 executor_base.py:115] Maximum concurrency for {row['max_model_len']} tokens per request: "
        f"{row['max_concurrency']:.2f}x\n"
    )
