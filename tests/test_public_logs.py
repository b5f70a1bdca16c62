"""What servers printed when they started, beside what is planned from the same facts.

Each row is one public log: where it is from, the plan's options, the printed GiB for KV, the tokens and, where it is
printed, the concurrency. The GiB are rounded to hundredths: a plan is held to the tokens of half of one more and less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import model_folder

import kvplan
from kvplan.units import GIB

GDN = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
       "linear_conv_kernel_dim": 4, "head_dim": 256, "vocab_size": 248_320, "dtype": "bfloat16"}  # fmt: skip
QWEN25 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "vocab_size": 151_936,
          "max_position_embeddings": 32_768, "tie_word_embeddings": True}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3.5-9b": {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
                   "text_config": {**GDN, "model_type": "qwen3_5_text", "hidden_size": 4096, "num_hidden_layers": 32,
                                   "intermediate_size": 12_288, "num_attention_heads": 16, "num_key_value_heads": 4,
                                   "full_attention_interval": 4, "linear_num_value_heads": 32,
                                   "mamba_ssm_dtype": "float32", "max_position_embeddings": 262_144},
                   "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                                     "out_hidden_size": 4096, "patch_size": 16, "temporal_patch_size": 2,
                                     "in_channels": 3, "spatial_merge_size": 2, "num_position_embeddings": 2304}},
    "gdn-92-layers": {**GDN, "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe_text",
                      "hidden_size": 5120, "num_hidden_layers": 92, "num_attention_heads": 64, "num_key_value_heads": 4,
                      "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 1280,
                      "shared_expert_intermediate_size": 1280, "linear_num_value_heads": 128,
                      "layer_types": [*["linear_attention"] * 3, "full_attention"] * 23,
                      "mamba_ssm_dtype": "bfloat16", "max_position_embeddings": 262_144},
    "qwen2.5-0.5b": {**QWEN25, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
                     "num_key_value_heads": 2, "intermediate_size": 4864},
    "qwen2.5-1.5b": {**QWEN25, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
                     "num_key_value_heads": 2, "intermediate_size": 8960},
}  # fmt: skip


class Log(NamedTuple):
    """One start-up: its source, the options of its plan, and what it printed."""

    source: str
    options: dict[str, Any]
    kv_gib: float
    tokens: int
    concurrency: float | None = None


TOKENS = [
    Log("vLLM 0.9.2, Qwen3-8B, A100 40 GB (notes of a start, 8,505 blocks)",
        {"model": "qwen3-8b", "gpu": "a100-40gb-sxm", "engine_version": "0.9.2", "max_model_len_tokens": 40_960},
        18.69, 136_080, 3.32),
    Log("vLLM 0.20.0, Qwen3.5-9B, RTX 5090: Triton's gated DeltaNet, blocks of 528",
        {"model": "qwen3.5-9b", "gpu": "rtx-5090", "engine_version": "0.20.0", "max_model_len_tokens": 4096},
        6.56, 53_328),
    Log("the same on two",
        {"model": "qwen3.5-9b", "gpu": "rtx-5090", "engine_version": "0.20.0", "max_model_len_tokens": 4096,
         "tp_size": 2}, 15.06, 246_576),
    Log("vLLM 0.19, Qwen3.5-35B-A3B, RTX PRO 6000 (a notebook's log): blocks of 1,056",
        {"model": "qwen3.6-35b-a3b", "gpu": "rtx-pro-6000-server", "engine_version": "0.19",
         "max_model_len_tokens": 4096}, 16.03, 209_088, 113.57),
    Log("vLLM of August 2026, 69 gated DeltaNet and 23 full layers, GB300, DP 16 (tests of srt-slurm)",
        {"model": "gdn-92-layers", "gpu": "gb300", "dp_size": 16, "ep": True, "engine_version": "0.26",
         "max_model_len_tokens": 10_240, "enable_prefix_caching": False, "weight_dtype": "nvfp4"},
        46.50, 394_633, 38.54),
    Log("vLLM 0.30.0, Qwen3.8-27B (geometry of 3.5), GH200: blocks of 1,568, two of state (a reproduction guide)",
        {"model": "qwen3.5-27b", "gpu": "h100", "kv_cache_dtype": "fp8", "engine_version": "0.30.0",
         "max_model_len_tokens": 131_072}, 26.84, 817_015, 6.23),
    Log("vLLM 0.19.1, MiniMax-M2.5, 4 H100 (a capacity report of ten days of service)",
        {"model": "minimax-m2.5", "gpu": "h100", "tp_size": 4, "engine_version": "0.19.1",
         "max_model_len_tokens": 128_000}, 18.16, 307_184, 2.40),
    Log("vLLM, MiniMax-M2.5, 4 RTX PRO 6000",
        {"model": "minimax-m2.5", "gpu": "rtx-pro-6000-server", "tp_size": 4, "engine_version": "0.17",
         "max_model_len_tokens": 196_608}, 23.62, 399_424, 2.03),
    Log("vLLM 0.12, DeepSeek-R1, 8 H200 (log lines of a validation set)",
        {"model": "deepseek-r1", "gpu": "h200", "tp_size": 8, "engine_version": "0.12",
         "max_model_len_tokens": 8192}, 41.60, 635_648, 77.59),
    Log("vLLM 0.21.0, Qwen2.5-14B, H100 (a simulator's calibration)",
        {"model": "qwen2.5-14b", "gpu": "h100", "engine_version": "0.21.0", "max_model_len_tokens": 4096},
        41.43, 226_240, 55.23),
    Log("vLLM 0.19.1, Qwen2.5-1.5B, H200",
        {"model": "qwen2.5-1.5b", "gpu": "h200", "engine_version": "0.19.1", "max_model_len_tokens": 32_768},
        120.53, 4_513_888),
    Log("vLLM, Qwen2.5-1.5B, 46 GB",
        {"model": "qwen2.5-1.5b", "engine_version": "0.19", "max_model_len_tokens": 4096}, 33.42, 1_251_440, 305.53),
    Log("vLLM, Qwen2.5-0.5B without prefix caching",
        {"model": "qwen2.5-0.5b", "engine_version": "0.30", "max_model_len_tokens": 4096,
         "enable_prefix_caching": False}, 4.17, 364_592, 89.01),
    Log("vLLM 0.20.0, Qwen3-8B in AWQ, T4",
        {"model": "qwen3-8b", "engine_version": "0.20.0", "max_model_len_tokens": 4096}, 4.79, 34_848, 8.51),
    Log("vLLM, Qwen3-30B-A3B, GB10",
        {"model": "qwen3-30b-a3b", "engine_version": "0.17", "max_model_len_tokens": 16_384}, 4.85, 52_960, 3.23),
    Log("vLLM, gpt-oss-120b, MI325X at 0.32 (an LMCache example)",
        {"model": "gpt-oss-120b", "gpu": "mi325x", "engine_version": "0.17"}, 10.79, 157_200),
    Log("vLLM, MiMo-V2.6-Flash (geometry of V2-Flash), 8 H100",
        {"model": "mimo-v2-flash", "gpu": "h100", "tp_size": 8, "ep": True, "engine_version": "0.31",
         "max_model_len_tokens": 262_144, "max_num_seqs": 64, "max_num_batched_tokens": 8192,
         "enable_prefix_caching": False}, 49.18, 6_969_972),
    Log("SGLang 0.5.8.post1, Kimi-K2.5, 8 MI355X (a start's log of February 2026)",
        {"model": "kimi-k2.5", "gpu": "mi355x", "tp_size": 8, "engine": "sglang", "engine_version": "0.5.8"},
        160.63, 2_454_421),
    Log("TensorRT-LLM, Llama-3.1-8B with FP8 KV, RTX 5090",
        {"model": "llama-3.1-8b", "engine": "tensorrt-llm", "kv_cache_dtype": "fp8"}, 16.05, 263_008),
    Log("TensorRT-LLM, DeepSeek-R1-Distill-Llama-8B, H100 (ai-dynamo's first examples)",
        {"model": "llama-3.1-8b", "engine": "tensorrt-llm", "block_size_tokens": 64}, 26.91, 220_480),
    Log("TensorRT-LLM, Qwen2.5-1.5B",
        {"model": "qwen2.5-1.5b", "engine": "tensorrt-llm"}, 7.31, 273_792),
]  # fmt: skip


def planned(log: Log, folder: Path, **more: Any) -> kvplan.SizePlan:
    options = {**log.options, **more}
    if options["model"] in CONFIGS:
        options["model"] = model_folder(folder / options["model"], CONFIGS[options["model"]])
    return kvplan.size(compare=False, **options)


@pytest.mark.parametrize("log", TOKENS, ids=[log.source.split(" (")[0] for log in TOKENS])
def test_the_printed_bytes_hold_the_printed_tokens(log: Log, tmp_path: Path) -> None:
    least, most = (
        planned(log, tmp_path, kv_cache_memory_bytes=int((log.kv_gib + off) * GIB)).kv_cache for off in (-0.005, 0.005)
    )
    block = most.block_size_tokens
    assert (least.capacity_tokens or 0) - block <= log.tokens <= (most.capacity_tokens or 0) + block
    if log.concurrency is not None:
        assert (least.max_concurrency or 0) - 0.05 <= log.concurrency <= (most.max_concurrency or 0) + 0.05


BUDGETS = [
    (0, {"gpu_memory_utilization": 0.9, "max_num_batched_tokens": 2048}),
    (1, {"gpu_memory_utilization": 0.85, "max_num_batched_tokens": 8192, "max_num_seqs": 256}),
    (2, {"gpu_memory_utilization": 0.85, "max_num_batched_tokens": 8192, "max_num_seqs": 256}),
    (6, {"gpu_memory_utilization": 0.95, "max_num_batched_tokens": 8192, "max_num_seqs": 10}),
    (10, {"gpu_memory_utilization": 0.9}),
    (15, {"gpu_memory_utilization": 0.32}),
    (17, {}),
]
"""Rows whose every setting is public, with what says how much memory there is for KV."""


def test_the_memory_left_for_kv_is_planned_1_to_18_percent_high_and_4_in_the_median(tmp_path: Path) -> None:
    errors = sorted(
        (planned(TOKENS[row], tmp_path, **settings).memory.kv_cache_bytes or 0) / (TOKENS[row].kv_gib * GIB) - 1
        for row, settings in BUDGETS
    )
    assert errors[0] > 0.005 and errors[-1] < 0.185
    assert errors[len(errors) // 2] == pytest.approx(0.04, abs=0.005)


@pytest.mark.parametrize(
    ("options", "loaded_gib"),
    [
        # 36 layers × 128 experts × 3 × 2,880² × 4.25 bits are 56.73 GiB; Marlin fills 2,880 up to 3,072 × 2,944
        ({"gpu": "a100-80gb-sxm", "engine_version": "0.10.1"}, 65.97),  # vllm-project/vllm#23278
        ({"gpu": "h100", "engine_version": "0.14.1"}, 64.38),  # Triton: vllm-project/vllm#33155
    ],
)
def test_gpt_oss_takes_more_than_its_checkpoint_where_kernels_fill_its_experts_up(
    options: dict[str, Any], loaded_gib: float
) -> None:
    plan = kvplan.size(model="gpt-oss-120b", context_tokens=8192, compare=False, **options)
    assert plan.memory.weights_bytes == pytest.approx(loaded_gib * GIB, rel=0.003)


def test_gpt_oss_is_filled_up_on_blackwell_and_amd_most_where_a_rank_has_little_of_each() -> None:
    def weights(tp_size: int, **options: Any) -> int:
        plan = kvplan.size(model="gpt-oss-120b", context_tokens=8192, compare=False, tp_size=tp_size, **options)
        return plan.memory.weights_bytes or 0

    # a row of n values takes n / 2 bytes and a scale for every 32
    whole, filled = 3 * 2880 * (1440 + 90), 3 * 3072 * (1536 + 96)
    eighth, filled_eighth = 2 * 360 * (1440 + 90) + 2880 * (180 + 12), 2 * 512 * (1536 + 96) + 3072 * (256 + 16)
    older = {"gpu": "b200", "engine_version": "0.26"}
    for served in ({"gpu": "mi300x"}, older):
        assert weights(1, **served) - weights(1) == 36 * 128 * (filled - whole)
        assert weights(8, **served) - weights(8) == 36 * 128 * (filled_eighth - eighth)  # 1.5 times as much
    # since, TensorRT-LLM's kernels take widths of 384 and 2,944
    narrow = 2 * 384 * (1536 + 96) + 3072 * (192 + 12)
    assert weights(8, gpu="b200") - weights(8) == 36 * 128 * (narrow - eighth)
    assert weights(8, gpu="b200", engine="sglang") == weights(8, **older)
    assert weights(8, gpu="h100", engine="sglang") == weights(8)


def test_experts_of_a_gpu_that_is_not_named_are_filled_up_as_on_hopper_and_in_other_formats_not_at_all() -> None:
    asked: dict[str, Any] = {"model": "gpt-oss-120b", "context_tokens": 8192, "compare": False}
    named, unnamed = (kvplan.size(**asked, **gpu).memory for gpu in ({"gpu": "h100"}, {"gpu_memory_bytes": 80 * GIB}))
    assert named.weights_bytes == unnamed.weights_bytes
    assert "filled up" in named.sources["weights_bytes"].detail
    other = kvplan.size(**asked, gpu="h100", tp_size=4, weight_dtype="bf16").memory
    assert "filled up" not in other.sources["weights_bytes"].detail


def test_fp8_of_sparse_latents_stays_576_bytes_on_amd() -> None:
    """FlashMLA's 656-byte rows are NVIDIA's: GLM-5.3, of GLM-5.2's geometry, is told to take 47,700 bytes a token on
    MI355X (ROCm/ATOM, its recipe for LMCache), 78 × 576 + 21 × 132.
    """
    plan = kvplan.size(model="glm-5.2", gpu="mi355x", tp_size=4, kv_cache_dtype="fp8", context_tokens=8192)
    assert plan.kv_cache.bytes_per_token == 47_700
    assert not any("656" in advice.message for advice in plan.advice)


def test_the_fraction_that_sglang_printed_for_kimi_counts_its_vision_tower() -> None:
    """0.8260405859375: 0.908 × 0.95 × (1 − 0.1 × (27 × 1,152² / (24 × 1,024²) − 1)), the tower under ``vt_`` names."""
    plan = kvplan.size(model="kimi-k2.5", gpu="mi355x", tp_size=8, engine="sglang", engine_version="0.5.8",
                       context_tokens=8192, compare=False)  # fmt: skip
    free = (plan.memory.total_bytes or 0) - (plan.memory.overhead_bytes or 0)
    assert plan.memory.usable_bytes == int(free * 0.8260405859375)
