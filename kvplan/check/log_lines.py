"""The start-up lines of vLLM, SGLang and TensorRT-LLM that say something about memory, as patterns.

Group names are fact names. A ``…_bytes`` group is in GiB as engines print it (SGLang and older vLLM write "GB" and
mean 2³⁰), or in bytes when it is a whole number. Wordings: vLLM 0.6 to 0.33 (``worker/worker.py``,
``v1/worker/gpu_worker.py``, ``v1/core/kv_cache_utils.py``, ``v1/engine/core.py``), SGLang 0.4 to 0.5
(``model_runner.py``, ``memory_pool.py``, ``scheduler.py``), TensorRT-LLM 0.16 to 1.x (``kvCacheManager.cpp``,
``_util.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBER = r"-?[\d.]+"
COUNT = r"[\d,]+"

# A line that holds none of these is skipped before anything is decoded. Few and common to many lines: each costs one
# pass over the file.
NEEDLES = (
    b"GiB", b"weights took", b"mem usage", b"KV cache size:", b"Maximum concurrency", b"engine (v",
    b"API server version", b"args: ", b"server_args=", b"max_total_num_tokens=", b" blocks: ", b"primary pool: ",
    b"okens per block", b" block size to ", b"arallelism is enabled", b"padding layers", b"out of memory",
    b"for the cache blocks", b"device_name=", b"prefill is enabled with", b"to store kv cache", b"max seq len",
    b"KvCacheConfig(", b"LLM version: ", b"#tokens: ", b"startup complete", b"is fired up",
    b"ssm_state size",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One wording.

    Attributes:
        engine: whose line it is; None when several engines print it.
        event: code of the event the line stands for, besides its facts; None when it has facts only.
        is_failure: the event keeps the server from starting.

    """

    engine: str | None
    pattern: re.Pattern[str]
    event: str | None = None
    is_failure: bool = False


def _line(engine: str | None, pattern: str, event: str | None = None, is_failure: bool = False) -> Line:
    pattern = pattern.replace("<N>", NUMBER).replace("<C>", COUNT).replace("<GiB>", r"\s?(?:GiB|GB)")
    return Line(engine, re.compile(pattern), event, is_failure)


VLLM, SGLANG, TRTLLM = "vllm", "sglang", "tensorrt-llm"

LINES = (
    # ---- vLLM: what each term takes
    _line(VLLM, r"[Mm]odel loading took (?P<weights_bytes><N>)<GiB>"),
    _line(VLLM, r"Loading model weights took (?P<weights_bytes><N>)<GiB>"),
    _line(VLLM, r"Available KV cache memory: (?P<kv_cache_bytes><N>)<GiB>"),
    _line(VLLM, r"total_gpu_memory \((?P<total_bytes><N>)<GiB>\) x gpu_memory_utilization "
                r"\((?P<gpu_memory_utilization><N>)\) = (?P<usable_bytes><N>)<GiB>"),
    _line(VLLM, r"model weights take (?P<weights_bytes><N>)<GiB>; non_torch_memory takes (?P<overhead_bytes><N>)<GiB>; "
                r"PyTorch activation peak memory takes (?P<activation_bytes><N>)<GiB>; .*?KV Cache is "
                r"(?P<kv_cache_bytes><N>)<GiB>"),
    _line(VLLM, r"total_gpu_memory=(?P<total_bytes><N>)<GiB>.*?kv_cache_size=(?P<kv_cache_bytes><N>)<GiB>"
                r".*?gpu_memory_utilization=(?P<gpu_memory_utilization><N>)"),
    _line(VLLM, r"Free memory on device(?: \S+)? \((?P<free_bytes><N>)/(?P<total_bytes><N>)<GiB>\) on startup\. "
                r"Desired GPU memory utilization is \((?P<gpu_memory_utilization><N>), (?P<usable_bytes><N>)<GiB>\)"),
    _line(VLLM, r"Actual usage is (?P<weights_bytes><N>)<GiB> for weight"),
    _line(VLLM, r"Actual usage is (?P<weights_and_overhead_bytes><N>)<GiB> for consumed memory"),
    _line(VLLM, r"(?P<activation_bytes><N>)<GiB> for peak activation"),
    _line(VLLM, r"(?P<overhead_bytes><N>)<GiB> for non-torch memory"),
    _line(VLLM, r"(?P<graph_bytes><N>)<GiB> for CUDAGraph memory"),
    _line(VLLM, r"Current kv cache memory in use is (?P<kv_cache_in_use_bytes><N>)"),
    _line(VLLM, r"Graph capturing finished in \S+ secs?, took (?P<graph_bytes><N>)<GiB>"),
    _line(VLLM, r"Estimated CUDA graph memory: (?P<graph_estimate_bytes><N>)<GiB>"),
    _line(VLLM, r"CUDA graph pool memory: (?P<graph_bytes><N>)<GiB> \(actual\), "
                r"(?P<graph_estimate_bytes><N>)<GiB> \(estimated"),
    # ---- vLLM: what the allocator made of it
    _line(VLLM, r"GPU KV cache size: (?P<capacity_tokens><C>) tokens"),
    _line(VLLM, r"Maximum concurrency for (?P<max_model_len_tokens><C>) tokens per request: (?P<max_concurrency><N>)x"),
    _line(VLLM, r"# (?:GPU|CUDA|cuda) blocks: (?P<num_blocks><C>), # CPU blocks"),
    _line(VLLM, r"Setting attention block size to (?P<observed_block_tokens><C>) tokens", "hybrid_block"),
    _line(VLLM, r"Setting kv cache block size to (?P<observed_block_tokens>\d+) for"),
    _line(VLLM, r"Padding mamba page size by (?P<hybrid_padding_percent><N>)%", "hybrid_padding"),
    _line(VLLM, r"Add \d+ padding layers, may waste at most", "padding_layers"),
    # ---- vLLM: how it was configured
    _line(VLLM, r"API server version:? (?P<engine_version>v?\d[\w.+]*)"),
    _line(VLLM, r"LLM engine \(v(?P<engine_version>\d[\w.+]*)\)"),
    _line(VLLM, r"prefill is enabled with max_num_batched_tokens=(?P<max_num_batched_tokens><C>)"),
    _line(VLLM, r"(?P<ep>Expert parallelism is enabled)"),
    _line(VLLM, r"Using (?P<kv_cache_dtype>[a-z]\w+) data type to store kv cache"),
    _line(None, r"device_name=(?P<gpu>[\w.-]+?)(?:,\w+=|\.json)"),
    # ---- vLLM: what kept it from starting
    _line(VLLM, r"Free memory on device(?: \S+)? \((?P<free_bytes><N>)/(?P<total_bytes><N>)<GiB>\) on startup is less "
                r"than desired GPU memory utilization \((?P<gpu_memory_utilization><N>), (?P<usable_bytes><N>)<GiB>\)",
          "gpu_in_use", True),
    _line(VLLM, r"max(?:imum)? seq len \((?P<max_model_len_tokens><C>)\).*?\(?(?P<needed_kv_bytes><N>)<GiB> KV cache "
                r"is needed, which is larger than the available KV cache memory \((?P<kv_cache_bytes><N>)<GiB>\)",
          "context_does_not_fit", True),
    _line(VLLM, r"estimated maximum model length is (?P<max_context_tokens><C>)"),
    _line(VLLM, r"max seq len \((?P<max_model_len_tokens><C>)\) is larger than the maximum number of tokens that "
                r"can be stored in KV cache \((?P<capacity_tokens><C>)\)", "context_does_not_fit", True),
    _line(VLLM, r"No available memory for the cache blocks", "no_kv_memory", True),
    _line(None, r"out of memory\. Tried to allocate \S+ \S+ GPU \d+ has a total capacity of (?P<total_bytes><N>)<GiB>",
          "out_of_memory", True),
    _line(None, r"CUDA out of memory|CUDA error: out of memory|HIP out of memory", "out_of_memory", True),
    # ---- SGLang
    _line(SGLANG, r"Load weight end\..*?mem usage=(?P<weights_bytes><N>)<GiB>"),
    _line(SGLANG, r"KV Cache is allocated\..*?#tokens: (?P<capacity_tokens><C>), K size: (?P<key_bytes><N>)<GiB>, "
                  r"V size: (?P<value_bytes><N>)<GiB>"),
    _line(SGLANG, r"KV Cache is allocated\..*?#tokens: (?P<capacity_tokens><C>), "
                  r"KV size: (?P<kv_cache_bytes><N>)<GiB>"),
    _line(SGLANG, r"SWAKVPool mem usage: (?P<kv_cache_bytes><N>)<GiB>(?:, swa size: <C>, full size: "
                  r"(?P<full_pool_tokens><C>))?"),
    _line(SGLANG, r"Mamba Cache is allocated\..*?conv_state size: (?P<conv_state_bytes><N>)<GiB>, "
                  r"ssm_state size: (?P<ssm_state_bytes><N>)<GiB>"),
    _line(SGLANG, r"KV Cache is allocated\. dtype: torch\.(?P<kv_cache_dtype>\w+)"),
    _line(SGLANG, r"Capture (?:\w+ ){0,2}(?:cuda|CUDA) graph end.*?mem usage=(?P<graph_bytes><N>)<GiB>"),
    _line(SGLANG, r"max_total_num_tokens=(?P<capacity_tokens><C>)\b.*?context_len=(?P<max_model_len_tokens><C>)"),
    _line(SGLANG, r"Not enough memory\. Please try to increase --mem-fraction-static", "no_kv_memory", True),
    # ---- TensorRT-LLM
    _line(TRTLLM, r"TensorRT-LLM version: (?P<engine_version>\d[\w.+]*)"),
    _line(TRTLLM, r"Memory usage when calculating max tokens in paged kv cache: total: (?P<total_bytes><N>)<GiB>, "
                  r"available: (?P<free_for_kv_bytes><N>)<GiB>"),
    _line(TRTLLM, r"KV cache primary pool: (?P<num_blocks><C>)"),
    _line(TRTLLM, r"Number of tokens per block: (?P<observed_block_tokens>\d+)"),
    _line(TRTLLM, r"Allocated (?P<kv_cache_bytes><N>)<GiB> for max tokens in paged KV cache "
                  r"\((?P<capacity_tokens><C>)\)"),
    _line(TRTLLM, r"Memory used after loading model weights \(inside torch\).*?: (?P<weights_bytes><N>)<GiB>"),
    _line(TRTLLM, r"available KV cache memory when calculating max tokens: (?P<free_for_kv_bytes><N>)<GiB>, fraction "
                  r"is set (?P<gpu_memory_utilization><N>),.*?(?:device total memory (?P<total_bytes><N>)<GiB>)?"),
    _line(TRTLLM, r"max_seq_len=(?P<max_model_len_tokens>\d+), max_num_requests=(?P<max_num_seqs>\d+), "
                  r"max_num_tokens=(?P<max_num_batched_tokens>\d+)"),
)  # fmt: skip

ARGUMENT_LINES = {
    "LLM engine (v": VLLM,
    "non-default args: ": VLLM,
    "args: Namespace(": VLLM,
    "server_args=": SGLANG,
    "KvCacheConfig(": TRTLLM,
}
"""Lines that list settings as ``name=value`` or ``'name': value``, by what they hold."""

NEW_START = ("API server version", "server_args=", "TensorRT-LLM version: ")
"""What a server prints once, first, each time it starts: a log of several starts is read from the last one on."""

READY = ("Application startup complete", "The server is fired up and ready")
"""What it prints last: lines after it are of requests, whose text may say anything."""

REQUESTS = ("Received request", "details: prompt: ", "obj=GenerateReqInput(", "obj=EmbeddingReqInput(")
"""Lines that quote a request: nothing in them is the server's own word."""

SETTINGS = {
    VLLM: {
        "model": "model", "model_tag": "model", "tensor_parallel_size": "tp_size", "pipeline_parallel_size": "pp_size",
        "data_parallel_size": "dp_size", "decode_context_parallel_size": "dcp_size",
        "max_seq_len": "max_model_len_tokens", "max_model_len": "max_model_len_tokens",
        "kv_cache_dtype": "kv_cache_dtype", "block_size": "block_size_tokens",
        "gpu_memory_utilization": "gpu_memory_utilization", "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens", "enable_prefix_caching": "enable_prefix_caching",
        "enable_expert_parallel": "ep", "quantization": "quantization", "dtype": "dtype",
        "speculative_config": "speculative", "num_gpu_blocks_override": "num_blocks_override",
        "kv_cache_memory_bytes": "kv_cache_memory_bytes",
    },
    SGLANG: {
        "model_path": "model", "tp_size": "tp_size", "dp_size": "dp_size", "pp_size": "pp_size",
        "dcp_size": "dcp_size", "attn_dp_size": "attention_dp_size",
        "kv_cache_dtype": "kv_cache_dtype", "page_size": "block_size_tokens", "context_length": "max_model_len_tokens",
        "mem_fraction_static": "gpu_memory_utilization", "max_running_requests": "max_num_seqs",
        "quantization": "quantization", "dtype": "dtype", "speculative_algorithm": "speculative",
        "chunked_prefill_size": "max_num_batched_tokens", "disable_radix_cache": "prefix_caching_off",
        "enable_dp_attention": "attention_dp", "ep_size": "ep_size", "swa_full_tokens_ratio": "swa_full_tokens_ratio",
        "mamba_full_memory_ratio": "mamba_full_memory_ratio",
    },
    TRTLLM: {
        "free_gpu_memory_fraction": "gpu_memory_utilization", "tokens_per_block": "block_size_tokens",
    },
}  # fmt: skip
"""Engine's name of a setting → the field of a sizing request (or a fact of its own) that it is."""

ARGUMENT = re.compile(
    r"""(?:(?<![\w.])(?P<bare>[a-z_]+)=|['"](?P<quoted>[a-z_]+)['"]:\s*)(?P<value>'[^']*'|"[^"]*"|[\w.+/-]+)"""
)
"""``name=value`` or ``'name': value``."""
