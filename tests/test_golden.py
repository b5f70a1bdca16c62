"""What each attention family stores, with every number derived by hand in a comment. Needs no data and no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import model_folder

import kvplan
from kvplan import profiles
from kvplan.errors import InputError, UnsupportedError
from kvplan.units import GIB, MIB, TIB

K32 = 32768


def plan(**options: Any) -> kvplan.SizePlan:
    options.setdefault("context_tokens", K32)
    return kvplan.size(compare=False, **options)


def kinds(answer: kvplan.SizePlan) -> list[tuple[str, int, int, int]]:
    """(kind, layers, page bytes, block) of each run of layers, in the engine's order."""
    return [(g.kind, g.num_layers, g.page_bytes, g.block_size_tokens) for g in answer.kv_cache.groups]


def num_groups(answer: kvplan.SizePlan) -> int:
    return len({group.group for group in answer.kv_cache.groups})


# ------------------------------------------------------------------------------------- one page, format by format


@pytest.mark.parametrize(
    ("dtype", "bytes_per_token", "scale_bytes_per_token"),
    [
        # 80 layers × 8 KV heads × (K 128 + V 128) = 163,840 elements a token
        ("bfloat16", 163_840 * 2, 0),
        ("fp8", 163_840, 0),  # static scales live on the layer
        ("fp8_e5m2", 163_840, 0),
        # + FP32 for K and for V per token and head: 80 × 8 × 8 = 5,120
        ("fp8_per_token_head", 163_840 + 5_120, 5_120),
        ("int8_per_token_head", 163_840 + 5_120, 5_120),
        ("int4_per_token_head", 81_920 + 5_120, 5_120),
    ],
)
def test_llama_70b_stores_these_bytes_per_token(dtype: str, bytes_per_token: int, scale_bytes_per_token: int) -> None:
    cache = plan(model="70b", gpu="h100", tp_size=1, kv_cache_dtype=dtype).kv_cache
    assert (cache.bytes_per_token, cache.scale_bytes_per_token) == (bytes_per_token, scale_bytes_per_token)
    assert cache.bytes_per_block == 16 * bytes_per_token
    assert cache.bytes_per_request == K32 * bytes_per_token  # 32,768 is a multiple of 16: no rounding


def test_auto_is_the_checkpoints_own_16_bits_when_it_names_no_kv_format() -> None:
    # 80 × 8 × 256 × 2 B × 32 tokens = 10,485,760 B a block of 32
    cache = plan(model="70b", gpu="h100", block_size_tokens=32).kv_cache
    assert (cache.bytes_per_block, cache.block_size_tokens) == (10_485_760, 32)


def test_nvfp4_stores_half_a_byte_and_an_fp8_scale_per_16_values_on_blackwell_only() -> None:
    # 80 × 8 × 256 × (1/2 + 1/16) = 92,160, of which 163,840 / 16 = 10,240 are scales
    cache = plan(model="70b", gpu="b200", kv_cache_dtype="nvfp4").kv_cache
    assert (cache.bytes_per_token, cache.scale_bytes_per_token) == (92_160, 10_240)
    with pytest.raises(UnsupportedError, match="Blackwell"):
        plan(model="70b", gpu="h100", kv_cache_dtype="nvfp4")


def test_per_token_head_scales_cost_twice_as_much_at_head_dim_64() -> None:
    # head_dim 128: 8 / 256 = 3.125%; head_dim 64: 8 / 128 = 6.25%
    wide = plan(num_layers=1, num_kv_heads=1, head_dim=128, kv_cache_dtype="fp8_per_token_head").kv_cache
    narrow = plan(num_layers=1, num_kv_heads=1, head_dim=64, kv_cache_dtype="fp8_per_token_head").kv_cache
    assert wide.scale_bytes_per_token / (wide.bytes_per_token - wide.scale_bytes_per_token) == 0.03125
    assert narrow.scale_bytes_per_token / (narrow.bytes_per_token - narrow.scale_bytes_per_token) == 0.0625


def test_turboquant_keeps_the_first_and_last_two_layers_in_16_bits_and_doubles_the_block() -> None:
    # 8B: 32 layers × 8 heads; 16-bit page of a block of 32: 8 × 32 × 512 = 131,072;
    # 4bit_nc: 128·4/8 + 2 + 128·4/8 + 4 = 134 B a (head, token): 8 × 32 × 134 = 34,304
    answer = plan(model="llama-3.1-8b", gpu="h100", kv_cache_dtype="turboquant_4bit_nc")
    assert kinds(answer) == [("full", 4, 131_072, 32), ("full", 28, 34_304, 32)]
    # 32 × 131,072 / (4 × 131,072 + 28 × 34,304) = 2.82, not 512 / 134 = 3.82
    assert 32 * 131_072 / answer.kv_cache.bytes_per_block == pytest.approx(2.8248, abs=1e-4)


# ------------------------------------------------------------------------------------------------- the seed case


def test_70b_at_batch_128_and_32k_needs_1_25_tib_more_than_nine_times_its_weights() -> None:
    answer = plan(model="70b", batch_size=128)
    # 327,680 B × 32,768 tokens × 128 requests = 1.25 TiB to the byte
    assert answer.answers.kv_needed_bytes == 327_680 * 32_768 * 128 == 1.25 * TIB
    # 70,553,706,496 parameters × 2 B
    assert answer.memory.weights_bytes == 70_553_706_496 * 2
    assert answer.answers.kv_needed_bytes > 9 * answer.memory.weights_bytes


def test_without_a_gpu_every_gpu_gets_its_smallest_tp() -> None:
    answer = kvplan.size(model="70b", context_tokens=K32)
    rows = {row.gpu: row for row in answer.gpus}
    # 141.1 GB of weights: no single 80 GB GPU; 4 × 24 GB = 96 GB do not hold them, 8 × 24 GB do
    assert rows["h100-sxm"].smallest_tp_size in (2, 4)
    assert rows["a10"].smallest_tp_size in (8, 16)
    assert rows["b200"].smallest_tp_size == 1
    assert answer.fits is None


@pytest.mark.parametrize(
    ("asked", "least"),
    [({"batch_size": 400}, 8), ({"dp_size": 8}, 8), ({"dp_size": 3}, 8), ({"dp_size": 3, "ep": True}, 6)],
)
def test_the_fewest_gpus_of_a_model_whose_replicas_share_experts_are_what_a_plan_of_that_layout_says(
    asked: dict[str, int], least: int
) -> None:
    # 671 GB of FP8 weights, nearly all experts: one replica takes 5 GPUs of 150 GB, eight that share them hold 1/8
    # each; six do not split the 2,048 columns of an expert, but can be dealt 256 experts
    request = {"model": "deepseek-v3", "context_tokens": 8192, **asked}
    row = next(row for row in kvplan.size(**request).gpus if row.gpu == "h200")
    assert row.num_gpus == least
    assert row.dp_size == row.num_replicas == row.num_gpus // row.smallest_tp_size
    plan = kvplan.size(**request | {"gpu": "h200", "tp_size": row.smallest_tp_size, "dp_size": row.dp_size})
    assert plan.fits
    assert plan.answers.max_batch_at_context == row.max_batch_at_context
    assert plan.memory.kv_cache_bytes == row.kv_cache_bytes


def test_replicas_that_share_experts_are_as_many_as_split_these_evenly() -> None:
    # experts are 2,048 wide: on 80 GB no 12 or 13 GPUs, though their memory would do
    rows = kvplan.size(model="deepseek-v3", context_tokens=8192, dp_size=4).gpus
    row = next(row for row in rows if row.gpu == "h100-sxm")
    assert row.layout == "TP 4, DP 4"


# ------------------------------------------------------------------------------------------------ parallelism


@pytest.mark.parametrize("layout", [{"tp_size": 2}, {"pp_size": 2}, {"dp_size": 2}, {"dp_size": 2, "ep": True}])
def test_a_server_of_several_gpus_has_nccl_buffers_however_they_share_the_model(layout: dict[str, Any]) -> None:
    def overhead(model: str, **layout: Any) -> int | None:
        return kvplan.size(model=model, gpu="h200", context_tokens=8192, **layout).memory.overhead_bytes

    assert overhead("qwen3-30b-a3b", **layout) == (overhead("qwen3-30b-a3b") or 0) + 500 * MIB
    assert overhead("8b", dp_size=2) == overhead("8b")  # servers that do not talk to each other


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"model": "deepseek-v3", "tp_size": 4, "dp_size": 3}, "the 2,048 rows of mlp.experts.gate_proj"),
        ({"model": "llama-2-13b", "tp_size": 5}, "the 13,824 rows of mlp.gate_proj do not divide by 5 ranks"),
        ({"model": "qwen3-32b-fp8", "tp_size": 16}, "25,600 columns of mlp.down_proj are 1,600 on each of 16 ranks"),
        ({"model": "qwen3-235b-a22b-fp8", "tp_size": 8, "engine": "sglang"}, "1,536 rows .* are 192 on each of 8"),
    ],
)
def test_a_split_of_weights_that_the_engine_refuses_is_refused(asked: dict[str, Any], why: str) -> None:
    for plan in (kvplan.size, kvplan.itl):
        with pytest.raises(UnsupportedError, match=why):
            plan(**asked, gpu="h200", context_tokens=8192, **({"batch_size": 1} if plan is kvplan.itl else {}))
    assert kvplan.size(**asked, context_tokens=8192).gpus  # without a GPU it is no layout yet


def test_a_dealt_expert_needs_no_split() -> None:
    """vLLM deals 256 experts to 12 ranks, 22 to the fullest; FP8 blocks of experts that stay whole are whole."""
    asked = {"gpu": "h200", "context_tokens": 8192, "ep": True}
    assert kvplan.size(model="deepseek-v3", tp_size=4, dp_size=3, **asked).fits
    assert kvplan.size(model="qwen3-235b-a22b-fp8", tp_size=8, engine="sglang", **asked).fits


def test_tensor_parallelism_beyond_the_kv_heads_wins_nothing() -> None:
    # 8 KV heads: one a rank at TP 8, and still one at TP 16, on two ranks each
    eight, sixteen = plan(model="70b", tp_size=8).kv_cache, plan(model="70b", tp_size=16).kv_cache
    assert eight.bytes_per_token == sixteen.bytes_per_token == 327_680 // 8


def test_decode_context_parallelism_shards_what_tensor_parallelism_replicates() -> None:
    # 94 layers × 1 head a rank × 512 B = 48,128; a request's tokens are halved over two ranks
    alone = plan(model="qwen3-235b-a22b", gpu="h100", tp_size=8).kv_cache
    halved = plan(model="qwen3-235b-a22b", gpu="h100", tp_size=8, dcp_size=2).kv_cache
    assert (alone.bytes_per_token, halved.bytes_per_token) == (48_128, 24_064)
    assert (alone.blocks_per_request, halved.blocks_per_request) == (2048, 1024)
    with pytest.raises(UnsupportedError, match="--dcp 4"):  # 4 KV heads over 8 ranks: two copies, not four
        plan(model="qwen3-235b-a22b", gpu="h100", tp_size=8, dcp_size=4)


def test_sliding_windows_have_no_decode_context_parallelism() -> None:
    with pytest.raises(UnsupportedError, match="decode context"):
        plan(model="gpt-oss-120b", gpu="h100", tp_size=16, dcp_size=2)


def test_pipeline_ranks_hold_27_27_and_26_of_80_layers() -> None:
    # 80 = 3 × 26 + 2: the two left over go to the ranks before the last; 27 × 4 heads × 16 × 512 B
    cache = plan(model="70b", gpu="h100", tp_size=2, pp_size=3).kv_cache
    assert cache.bytes_per_block == 27 * 4 * 16 * 512


def test_pipeline_stages_keep_one_batch_each_and_one_more_in_flight() -> None:
    # windows of 128: ⌈min(127 + F, 32,768) / 16⌉ + 1 with F = 8,192 × (stages + 1), plus 2,048 full blocks
    def blocks(stages: int) -> int:
        return plan(model="gpt-oss-120b", gpu="h100", pp_size=stages).kv_cache.blocks_per_request

    assert blocks(1) == -(-(127 + 2 * 8192) // 16) + 1 + 2048
    assert blocks(2) == -(-(127 + 3 * 8192) // 16) + 1 + 2048


# --------------------------------------------------------------------------------------------- latent attention


@pytest.mark.parametrize(
    ("gpu", "dtype", "row_bytes", "block"),
    [
        ("h200", "auto", 576 * 2, 16),  # 512 latent + 64 RoPE values, no V, one copy a rank
        ("h200", "fp8", 576, 64),
        ("b200", "auto", 576 * 2, 32),
        ("b200", "fp8", 576, 32),
    ],
)
def test_latent_attention_never_shrinks_with_tp(gpu: str, dtype: str, row_bytes: int, block: int) -> None:
    for tp in (1, 8):
        cache = plan(model="deepseek-r1", gpu=gpu, tp_size=tp, kv_cache_dtype=dtype).kv_cache
        assert cache.bytes_per_token == 61 * row_bytes
        assert cache.block_size_tokens == block


@pytest.mark.parametrize(
    ("gpu", "dtype", "row_bytes"),
    [
        ("h200", "auto", 1152),
        ("h200", "fp8", 656),  # 512 FP8 + 64 bf16 RoPE values (128) + 4 FP32 scales (16): sm90 rewrites fp8
        ("h200", "fp8_ds_mla", 656),
        ("b200", "auto", 1152),
        ("b200", "fp8", 576),
        ("b200", "fp8_ds_mla", 656),
        ("b200", "nvfp4_ds_mla", 352),  # 512/2 + 64 + 512/16
    ],
)
def test_sparse_latent_attention_adds_132_bytes_of_index_keys_and_depends_on_the_gpu(
    gpu: str, dtype: str, row_bytes: int
) -> None:
    cache = plan(model="deepseek-v3.2", gpu=gpu, tp_size=8, kv_cache_dtype=dtype).kv_cache
    assert cache.bytes_per_token == 61 * (row_bytes + 128 + 4)
    assert cache.block_size_tokens == 64


def test_glm_5_2_owns_21_indexers_for_78_layers_and_auto_is_fp8_on_blackwell() -> None:
    assert plan(model="glm-5.2", gpu="h200", tp_size=8).kv_cache.bytes_per_token == 78 * 1152 + 21 * 132
    assert plan(model="glm-5.2", gpu="b200", tp_size=8).kv_cache.bytes_per_token == 78 * 576 + 21 * 132


def test_deepseek_v4_flash_packs_1_002_240_bytes_a_block() -> None:
    # block of 256: 21 layers of ratio 4: 64 rows × 584 → 37,440 (×576) and 64 × 132 → 8,640;
    # 20 layers of ratio 128: 2 × 584 → 1,728: 21 × 46,080 + 20 × 1,728 = 1,002,240
    answer = plan(model="deepseek-v4-flash", gpu="b200", max_model_len_tokens=K32)
    assert answer.kv_cache.bytes_per_block == 1_002_240
    # F = 16,384 × 2: windows ⌈32,768/64⌉+1 twice, ⌈32,768/4⌉+1, ⌈32,768/8⌉+1, and 128 blocks of 256
    assert answer.kv_cache.blocks_per_request == 2 * 513 + 8193 + 4097 + 128
    # 8,192 batched tokens: 518 + 4,099 + 2,065 + 128 = 6,810, as the engine reports
    short = plan(model="deepseek-v4-flash", gpu="b200", max_num_batched_tokens=8192)
    assert short.kv_cache.blocks_per_request == 6810
    assert plan(model="deepseek-v4-pro", gpu="b200").kv_cache.bytes_per_block == 1_435_968


# ------------------------------------------------------------------------------------------ windows and chunks


def test_gemma_3_deals_52_sliding_and_10_full_layers_into_seven_groups() -> None:
    # groups of 10 = the rarer kind; 52 sliding layers make 6 groups (9, 9, 9, 9, 8, 8), 10 full layers one
    answer = plan(model="gemma-3-27b", gpu="h100")
    assert [g.num_layers for g in answer.kv_cache.groups] == [9, 9, 9, 9, 8, 8, 10]
    # 16 heads × 16 tokens × (128 + 128) × 2 B = 131,072 a layer, 10 layers a block
    assert answer.kv_cache.bytes_per_block == 10 * 131_072
    # window 1,024 and F = 2 × 8,192: ⌈(1,023 + 16,384) / 16⌉ + 1 = 1,089 each; 2,048 for the full layers
    assert answer.kv_cache.blocks_per_request == 6 * 1089 + 2048


def test_gemma_2_alternates_and_makes_two_groups_of_21() -> None:
    answer = plan(model="gemma-2-9b", gpu="h100", context_tokens=8192)
    assert [(g.kind, g.num_layers) for g in answer.kv_cache.groups] == [("sliding", 21), ("full", 21)]
    # ⌈min(4,095 + 16,384, 8,192) / 16⌉ + 1 + 512
    assert answer.kv_cache.blocks_per_request == 513 + 512


def test_gemma_4_doubles_the_block_of_full_layers_until_their_pages_match() -> None:
    # sliding: 8 heads × 256; full: 2 heads × 512 (half the page), so their blocks are twice as long
    answer = plan(model="gemma-4-26b-a4b", gpu="h100")
    blocks = {(g.kind, g.block_size_tokens, g.page_bytes) for g in answer.kv_cache.groups}
    assert blocks == {("sliding", 16, 8 * 16 * 1024), ("full", 32, 2 * 32 * 2048)}


def test_mistral_v0_1_slides_on_every_layer_and_pays_a_block_more() -> None:
    # ⌈min(4,095 + 16,384, 8,192) / 64⌉ + 1
    answer = plan(model="mistral-7b-v0.1", gpu="h100", context_tokens=8192, block_size_tokens=64)
    assert answer.kv_cache.blocks_per_request == 129
    assert num_groups(answer) == 1


def test_llama_4_makes_three_chunked_groups_and_a_full_one() -> None:
    answer = plan(model="llama-4-scout", gpu="h100", tp_size=8)
    assert kinds(answer) == [("chunked", 12, 8192, 16)] * 3 + [("full", 12, 8192, 16)]
    # ⌈min(8,192 + 16,384, 32,768) / 16⌉ = 1,536 a chunked group, no block more; 2,048 for full
    assert answer.kv_cache.blocks_per_request == 3 * 1536 + 2048


@pytest.mark.parametrize(("tp", "full_block", "page"), [(4, 32, 20_480), (8, 16, 10_240)])
def test_mimo_v2_has_wider_keys_than_values_and_twice_the_heads_in_windows(tp: int, full_block: int, page: int) -> None:
    # windows: 8 heads; full: 4 heads; K 192 + V 128. TP 4: 2 × 16 × 640 = 20,480 against 1 × 16 × 640, so 32 tokens;
    # TP 8: one head each
    answer = plan(model="mimo-v2-flash", gpu="h100", tp_size=tp)
    assert {(g.kind, g.block_size_tokens, g.page_bytes) for g in answer.kv_cache.groups} == {
        ("full", full_block, page),
        ("sliding", 16, page),
    }


def test_minimax_m3_adds_a_bf16_index_key_to_57_of_60_layers() -> None:
    # 128 × (60 × 4 × 512 + 57 × 128 × 2) = 17,596,416, whatever the KV format does to the index keys
    assert plan(model="minimax-m3", gpu="h100").kv_cache.bytes_per_block == 17_596_416
    fp8 = plan(model="minimax-m3", gpu="h100", kv_cache_dtype="fp8").kv_cache
    assert fp8.bytes_per_block == 128 * (60 * 4 * 256 + 57 * 256)


# ------------------------------------------------------------------------------------------------------ hybrids


@pytest.mark.parametrize(("dtype", "block"), [("auto", 832), ("fp8", 1600)])
def test_qwen3_5_27b_pins_the_block_to_its_state(dtype: str, block: int) -> None:
    # state: conv 3 × 10,240 × 2 + 48 × 128 × 128 × 4 = 3,207,168 B. 4 heads × 512 × 2 = 4,096 B a token (bf16):
    # 64 × ⌈3,207,168 / (64 × 4,096)⌉ = 64 × 13 = 832; fp8: 64 × ⌈3,207,168 / (64 × 2,048)⌉ = 64 × 25 = 1,600
    cache = plan(model="qwen3.5-27b", gpu="h100", kv_cache_dtype=dtype).kv_cache
    assert cache.block_size_tokens == block
    assert [(g.kind, g.num_layers) for g in cache.groups] == [("state", 16)] * 3 + [("full", 16)]
    # three groups of state hold 2 + 1 checkpoint blocks each
    assert cache.blocks_per_request == 3 * 3 + -(-K32 // block)


def test_qwen3_5_in_fp8_wins_1_70_at_32k_because_the_state_pins_the_block() -> None:
    # bf16: 9 state + ⌈32,768/832⌉ = 40 blocks of 54,525,952 B; fp8: 9 + ⌈32,768/1,600⌉ = 21 blocks of 52,428,800 B
    rows = {r.kv_cache_dtype: r for r in kvplan.size(model="qwen3.5-27b", gpu="h100", context_tokens=K32).comparison}
    assert rows["fp8"].effective_gain == 49 * 54_525_952 / (30 * 52_428_800)
    assert rows["fp8"].effective_gain == pytest.approx(1.70, abs=0.005)


def test_hybrids_without_prefix_caching_hold_one_state_a_group() -> None:
    cache = plan(model="qwen3.5-27b", gpu="h100", enable_prefix_caching=False).kv_cache
    state_blocks = cache.blocks_per_request - -(-K32 // cache.block_size_tokens)
    assert state_blocks == 3


def test_nemotron_3_ultra_holds_2_124_800_bytes_of_state_a_layer_at_tp_4() -> None:
    # conv 3 × 4,608 × 2 + 64 × 64 × 128 × 4 = 27,648 + 2,097,152 = 2,124,800;
    # 2 KV heads over TP 4 leave one a rank, 256 B a token in fp8; blocks of 32: 32 × ⌈2,124,800 / 8,192⌉ = 32 × 260
    cache = plan(
        model="nemotron-3-ultra-550b-a55b", gpu="h100", tp_size=4, kv_cache_dtype="fp8", block_size_tokens=32
    ).kv_cache
    assert cache.block_size_tokens == 32 * 260 == 8320
    states = [g for g in cache.groups if g.kind == "state"]
    assert {g.page_bytes - g.padding_bytes_per_page for g in states} == {2_124_800}


def test_jamba_keeps_mamba_1_states_without_checkpoints() -> None:
    # TP 1: conv 3 × 8,192 × 2 + 8,192 × 16 × 2 = 311,296 B; 8 heads × 512 B = 4,096 a token:
    # 16 × ⌈311,296 / 65,536⌉ = 80 tokens; 28 Mamba layers in 7 groups of 4, two blocks each
    cache = plan(model="jamba-mini", gpu="h100").kv_cache
    assert cache.block_size_tokens == 80
    assert {g.page_bytes - g.padding_bytes_per_page for g in cache.groups if g.kind == "state"} == {311_296}
    assert cache.blocks_per_request == 7 * 2 + -(-K32 // 80)


KIMI_LINEAR: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 163840,
    "max_position_embeddings": 1048576,
    "linear_attn_config": {
        "kda_layers": [i for i in range(1, 28) if i % 4 and i != 27],
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
}


def test_kimi_linear_has_blocks_of_1_920_tokens(tmp_path: Path) -> None:
    # conv 3 windows × 3 × 4,096 × 2 + 32 × 128 × 128 × 4 = 2,170,880 B; latent row 1,152 B, aligned to 128 tokens:
    # 128 × ⌈2,170,880 / 147,456⌉ = 128 × 15
    answer = plan(model=model_folder(tmp_path / "kimi", KIMI_LINEAR), gpu="h100")
    assert answer.kv_cache.block_size_tokens == 1920
    assert {g.kind for g in answer.kv_cache.groups} == {"state", "mla"}


DECILM: dict[str, Any] = {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "hidden_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "block_configs": [
        {"attention": {"n_heads_in_group": 8, "no_op": False}, "ffn": {"ffn_mult": 2.625, "no_op": False}},
        {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": 1.0, "no_op": False}},
        {"attention": {"n_heads_in_group": 16, "no_op": False}, "ffn": {"ffn_mult": None, "no_op": True}},
        {"attention": {"n_heads_in_group": 8, "no_op": False}, "ffn": {"ffn_mult": 2.625, "no_op": False}},
    ],
}


def test_decilm_sums_layers_of_different_heads_into_one_group(tmp_path: Path) -> None:
    # heads 64/8 = 8, none, 64/16 = 4, 8; head_dim 128: (8 + 4 + 8) × 16 × 512 B = 163,840, one group
    answer = plan(model=model_folder(tmp_path / "deci", DECILM), gpu="h100")
    assert answer.kv_cache.bytes_per_block == 20 * 16 * 512
    assert num_groups(answer) == 1
    assert answer.model is not None
    assert answer.model.layer_kinds == {"full": 3}


# ------------------------------------------------------------------------------------------- blocks and budgets


def test_num_blocks_count_the_null_block_and_the_fit_check_does_not() -> None:
    # 8B: 32 × 8 × 16 × 512 = 2,097,152 B a block; 2,048 blocks hold 32,768 tokens, the null block is one more
    block = 2_097_152
    exact = plan(model="llama-3.1-8b", gpu="h100", kv_cache_memory_bytes=2048 * block)
    assert (exact.kv_cache.num_blocks, exact.fits) == (2048, False)
    one_more = plan(model="llama-3.1-8b", gpu="h100", kv_cache_memory_bytes=2049 * block)
    assert (one_more.kv_cache.num_blocks, one_more.fits) == (2049, True)


def test_logged_tokens_are_concurrency_times_the_longest_request() -> None:
    # 1,000 blocks of 16 over requests of ⌈1,000 / 16⌉ = 63 blocks: int(1,000 / 63 × 1,000) = 15,873, not 16,000
    answer = plan(model="llama-3.1-8b", gpu="h100", context_tokens=1000, kv_cache_memory_bytes=1000 * 2_097_152)
    assert answer.kv_cache.max_concurrency == 1000 / 63
    assert answer.kv_cache.capacity_tokens == 15_873
    # vLLM 0.19 logs num_blocks × block
    older = plan(
        model="llama-3.1-8b", gpu="h100", context_tokens=1000, kv_cache_memory_bytes=1000 * 2_097_152,
        engine_version="0.19",
    )  # fmt: skip
    assert older.kv_cache.capacity_tokens == 16_000


@pytest.mark.parametrize(("version", "fraction"), [("0.19.0", 0.9), ("0.20.0", 0.92), ("0.33", 0.92)])
def test_the_default_memory_fraction_follows_the_version(version: str, fraction: float) -> None:
    import math

    answer = plan(model="llama-3.1-8b", gpu="h100", engine_version=version)
    assert answer.memory.total_bytes is not None
    assert answer.memory.usable_bytes == math.ceil(answer.memory.total_bytes * fraction)


def test_the_budget_is_a_subtraction_that_flags_override() -> None:
    # 80 GiB × 0.5 = 40 GiB; − 10 − 2 − 1 − 0 = 27 GiB
    answer = plan(
        model="llama-3.1-8b", gpu_memory_bytes=80 * GIB, gpu_memory_utilization=0.5, weights_bytes=10 * GIB,
        activation_bytes=2 * GIB, graph_bytes=GIB, overhead_bytes=0,
    )  # fmt: skip
    assert answer.memory.kv_cache_bytes == 27 * GIB
    assert {term.source for key, term in answer.memory.sources.items() if key in ("weights_bytes",)} == {"given"}


@pytest.mark.parametrize(
    ("gpu", "tokens"),
    [("b200", 16384), ("h100", 8192), ("h200", 8192), ("a100", 2048), ("l4", 2048), ("rtx-4090", 2048)],
)
def test_default_batched_tokens_follow_the_gpus_memory(gpu: str, tokens: int) -> None:
    # ≥ 160 GiB 16,384; ≥ 70 GiB and not an A100 8,192; else 2,048
    assert plan(model="llama-3.1-8b", gpu=gpu, context_tokens=1024).request.max_num_batched_tokens == tokens


def test_engines_mean_different_things_by_their_memory_fraction() -> None:
    # SGLang: 0.5 × (80 − 1) − 10 GiB for KV, the rest outside; TensorRT-LLM: 0.5 × (80 − 10 − 2 − 1 − 1)
    common: dict[str, Any] = {
        "model": "llama-3.1-8b", "gpu_memory_bytes": 80 * GIB, "gpu_memory_utilization": 0.5,
        "weights_bytes": 10 * GIB, "activation_bytes": 2 * GIB, "graph_bytes": GIB, "overhead_bytes": GIB,
    }  # fmt: skip
    assert plan(engine="vllm", **common).memory.kv_cache_bytes == 26 * GIB
    assert plan(engine="sglang", **common).memory.kv_cache_bytes == 29.5 * GIB
    assert plan(engine="tensorrt-llm", **common).memory.kv_cache_bytes == 33 * GIB
    assert {plan(engine=e, **common).kv_cache.rules for e in ("sglang", "tensorrt-llm", "generic")} == {"approximation"}


@pytest.mark.parametrize(
    ("dtype", "scale_bytes"),
    [
        ("int8:none", 0),
        ("int8:tensor", 0),
        ("int8:head", 0),
        ("int8:token", 80 * 2 * 4),  # one FP32 for K and one for V per token and layer
        ("int8:token_head", 80 * 8 * 2 * 4),
        ("int8:token_head:fp16", 80 * 8 * 2 * 2),
        ("fp8:block32", 80 * 8 * 2 * 4 * 4),  # 128 / 32 = 4 blocks for K and for V
    ],
)
def test_generic_formats_pay_for_scales_by_their_granularity(dtype: str, scale_bytes: int) -> None:
    cache = plan(model="70b", engine="generic", kv_cache_dtype=dtype).kv_cache
    assert cache.scale_bytes_per_token == scale_bytes
    assert cache.bytes_per_token == 163_840 + scale_bytes


def test_flags_alone_describe_a_model() -> None:
    # 32 layers × 8 heads × (128 + 128) × 2 B
    answer = plan(num_layers=32, num_kv_heads=8, head_dim=128)
    assert answer.kv_cache.bytes_per_token == 131_072
    with pytest.raises(InputError, match="--head-dim"):
        plan(num_layers=32, num_kv_heads=8)


def test_an_unknown_family_of_plain_fields_is_planned_and_says_so(tmp_path: Path) -> None:
    config = {
        "architectures": ["NobodyKnowsForCausalLM"], "model_type": "nobody", "hidden_size": 1024,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 4096,
        "vocab_size": 1000, "max_position_embeddings": 4096,
    }  # fmt: skip
    answer = plan(model=model_folder(tmp_path / "m", config), context_tokens=4096)
    assert answer.kv_cache.bytes_per_token == 4 * 2 * 256 * 2
    assert answer.model is not None
    assert any("planned as plain attention" in note for note in answer.model.notes)
    with pytest.raises(kvplan.KvplanError, match="kv_lora_rank"):
        plan(model=model_folder(tmp_path / "n", {**config, "kv_lora_rank": 512}), context_tokens=4096)


# ------------------------------------------------------------------------------------ what a plan says of itself


@pytest.mark.parametrize(
    ("model", "engine", "resolved"),
    [("8b", "vllm", "bfloat16"), ("8b", "sglang", "bfloat16"), ("deepseek-v4-flash", "vllm", "fp8_ds_mla")],
)
def test_auto_is_echoed_as_what_it_became(model: str, engine: str, resolved: str) -> None:
    plan = kvplan.size(model=model, engine=engine, context_tokens=8192)
    assert plan.request.kv_cache_dtype == plan.kv_cache.kv_cache_dtype == resolved


def test_size_and_itl_call_one_cache_by_one_name() -> None:
    sized = kvplan.size(model="8b", gpu="h100", context_tokens=8192)
    timed = kvplan.itl(model="8b", gpu="h100", context_tokens=8192)
    assert sized.request.kv_cache_dtype == timed.as_dict()["request"]["kv_cache_dtype"] == "bfloat16"


def test_groups_of_a_pipeline_are_those_of_one_rank() -> None:
    """80 layers over four ranks are 20 a GPU, of 8 heads × 16 tokens × 512 B a page."""
    (group,) = kvplan.size(model="70b", gpu="h100", pp_size=4, context_tokens=8192).kv_cache.groups
    assert (group.num_layers, group.page_bytes) == (20, 8 * 16 * 512)
    hybrid = kvplan.size(model="gemma-3-27b", gpu="h100", pp_size=2, context_tokens=8192)
    assert sum(group.num_layers for group in hybrid.kv_cache.groups) == 31  # of 62


def test_the_blocks_of_a_window_are_derived_with_their_numbers() -> None:
    """Gemma 3: a window of 1,024 and two batches of 8,192 in flight: ⌈17,407 / 16⌉ + 1 = 1,089."""
    rules = {
        rule.name: rule.formula for rule in kvplan.size(model="gemma-3-27b", gpu="h100", context_tokens=32768).rules
    }
    window = next(formula for formula in rules.values() if formula.startswith("sliding: "))
    assert window == "sliding: ⌈min(1,024 + 16,384 in flight − 1, 32,768) / 16⌉ + 1 = 1,089"
    assert "full: ⌈32,768 / 16⌉ = 2,048" in rules.values()


def test_kv_bytes_beyond_the_gpu_and_an_unknown_activation_peak_are_said() -> None:
    """131.4 GiB of weights, 70 of KV and 3.6 of the engine's own are 125.8 more than the 79.19 of an H100."""
    given = kvplan.size(model="70b", gpu="h100", context_tokens=8192, kv_cache_memory_bytes=70 * GIB)
    assert given.advice[0].code == "budget_beyond_gpu" and "by 125." in given.advice[0].message
    memory = given.memory
    own = (memory.activation_bytes or 0) + (memory.graph_bytes or 0) + (memory.overhead_bytes or 0)
    assert memory.excess_bytes == (memory.weights_bytes or 0) + own + 70 * GIB - (memory.total_bytes or 0)
    assert given.fits is False and given.verdict is False
    flags = kvplan.size(num_layers=32, num_kv_heads=8, head_dim=128, num_parameters=8 * 10**9, gpu="h100",
                        context_tokens=8192)  # fmt: skip
    assert flags.advice[0].code == "activation_unknown"


def test_a_longest_request_that_keeps_the_engine_from_starting_is_said_to_be_what_does() -> None:
    """3 requests of 8k fit an L4 (3.92 GiB of KV, 128 KiB a token); one of 128k, which vLLM checks, needs 16 GiB."""
    asked = {"model": "8b", "gpu": "l4", "context_tokens": 8192}
    plan = kvplan.size(**asked, max_model_len_tokens=131072)
    assert plan.fits is False and plan.answers.kv_short_bytes_per_gpu == 0 and plan.too_long_tokens == 131072
    longest = plan.answers.max_context_at_batch_tokens
    assert f"--max-model-len {longest} would do" in plan.advice[0].message
    assert kvplan.size(**asked, max_model_len_tokens=longest).fits
    headline = kvplan.report(**asked, max_model_len_tokens=131072).answers.headline
    assert headline.startswith("No: vllm does not start, for its longest request, 131,072 tokens, does not fit")
    short = kvplan.size(**asked, batch_size=4, max_model_len_tokens=131072)
    assert short.fits is False and short.too_long_tokens is None


@pytest.mark.parametrize("gpu", ["a10", "h100-pcie"])
def test_memory_that_the_driver_counts_and_programs_do_not_see_is_not_called_exact(gpu: str) -> None:
    """Their profiles hold nvidia-smi's total; that of an H100 SXM is what CUDA reports."""
    total = kvplan.size(model="8b", gpu=gpu, context_tokens=8192).memory.sources["total_bytes"]
    assert total.source == "assumed" and "programs see 0.5 to 2% less" in total.detail
    seen = kvplan.size(model="8b", gpu="h100", context_tokens=8192).memory.sources["total_bytes"]
    assert seen.source == "exact" and "as programs see it" in seen.detail


def test_kv_bytes_that_the_gpu_does_not_have_hold_no_load_and_the_allocators_question_stays_its_own() -> None:
    """An H100 has 62.10 GiB left beside 8B; with no load asked about, ``fits`` is what the allocator says."""
    asked: dict[str, Any] = {"model": "8b", "gpu": "h100"}
    assert kvplan.size(**asked, context_tokens=8192, batch_size=4, kv_cache_memory_bytes="62GiB").fits
    assert not kvplan.size(**asked, context_tokens=8192, batch_size=4, kv_cache_memory_bytes="63GiB").fits
    alone = kvplan.size(**asked, kv_cache_memory_bytes="1000GiB")
    assert alone.fits is True and alone.verdict is False
    asked |= {"kv_cache_memory_bytes": "1000GiB"}
    assert kvplan.itl(**asked, context_tokens=8192).fits is False
    assert kvplan.itl(**asked, input_tokens=8192, output_tokens=1024, concurrency=4).fits is False


def test_a_scheduler_told_to_run_fewer_makes_the_rest_wait() -> None:
    """An H200 holds 892 requests of 1k; of 64, each replica that is told 16 runs 16."""
    asked: dict[str, Any] = {"model": "8b", "gpu": "h200", "context_tokens": 1024, "batch_size": 64}
    plan = kvplan.size(**asked, max_num_seqs=16)
    assert plan.fits is False and plan.answers.num_waiting == 48 and plan.answers.max_batch_at_context == 16
    assert plan.answers.kv_short_bytes_per_gpu == 0 and plan.answers.max_context_at_batch_tokens is None
    assert [a.message for a in plan.advice if a.code == "max_num_seqs"] == [
        "--max-num-seqs 16 lets 16 of 64 requests run at once, and the rest wait; "
        "--max-num-seqs 64 would let all of them"
    ]
    assert not [a for a in plan.advice if a.code == "does_not_fit"]
    assert kvplan.size(**asked, max_num_seqs=64).fits
    assert kvplan.size(**asked, max_num_seqs=16, dp_size=4).fits
    assert kvplan.size(**asked).answers.max_running == 1024


def test_what_would_fit_counts_replicas_by_what_each_runs() -> None:
    """64 requests, 16 at once on each replica: four of them."""
    plan = kvplan.size(model="8b", context_tokens=1024, batch_size=64, max_num_seqs=16)
    assert {row.num_replicas for row in plan.gpus} == {4}


def test_a_batch_beyond_the_engines_default_is_planned_with_a_limit_of_its_own_and_said() -> None:
    """vLLM runs 1,024 on an H200 unless told; logits of 1,500 sequences are 476 × 128,256 × 8 B more."""
    asked: dict[str, Any] = {
        "model": "70b",
        "gpu": "h200",
        "tp_size": 4,
        "context_tokens": 1024,
        "kv_cache_dtype": "fp8",
    }
    plan, default = kvplan.size(**asked, batch_size=1500), kvplan.size(**asked)
    assert plan.fits and plan.request.max_num_seqs == 1500
    told = kvplan.size(**asked, batch_size=1500, max_num_seqs=1500)
    assert plan.memory.kv_cache_bytes == told.memory.kv_cache_bytes
    assert plan.advice[0].message == (
        "vllm 0.33 runs 1,024 requests at once unless told: this plan takes --max-num-seqs 1500"
    )
    assert "more, up to the" in next(a.message for a in default.advice if a.code == "max_num_seqs")
    assert not [a for a in told.advice if a.code == "max_num_seqs"]


def test_a_batch_that_kv_does_not_hold_is_short_of_kv_and_not_of_logits() -> None:
    """A limit of its own is for a batch that is held: 100,000 sequences' logits alone would take 96 GiB."""
    plan = kvplan.size(model="8b", gpu="h100", context_tokens=1024, batch_size=100_000)
    assert plan.fits is False and plan.request.max_num_seqs == 1024
    assert plan.memory.kv_cache_bytes == kvplan.size(model="8b", gpu="h100", context_tokens=1024).memory.kv_cache_bytes


def test_vllm_shares_experts_over_data_parallel_ranks_and_other_engines_copy_them() -> None:
    """94 layers × 128 experts × 3 × 4,096 × 1,536 × 2 B: a quarter of it on each of 4 ranks, an eighth on each of 8."""
    experts = 94 * 128 * 3 * 4096 * 1536 * 2

    def weights(**fields: Any) -> int:
        asked = {"model": "qwen3-235b-a22b", "gpu": "h200", "tp_size": 4, "context_tokens": 8192} | fields
        return kvplan.size(compare=False, **asked).memory.weights_bytes or 0

    assert weights() - weights(dp_size=2) == experts // 4 - experts // 8
    assert weights(dp_size=2) == weights(dp_size=2, ep=True)
    assert weights(dp_size=2, engine="sglang") == weights()
    assert weights(model="70b", dp_size=2) == weights(model="70b")
    # 8 experts on 16 ranks: each is in two parts, where dealt whole one a rank would be twice as much
    mixtral = 32 * 8 * 3 * 4096 * 14336 * 2
    assert (
        weights(model="mixtral-8x7b", tp_size=8) - weights(model="mixtral-8x7b", tp_size=8, dp_size=2) == mixtral // 16
    )


def test_a_pipeline_stage_captures_graphs_of_its_own_layers() -> None:
    """80 layers on 3 stages are 27 on the fullest: 27 × 14 MiB + 128 MiB."""
    plan = kvplan.size(model="70b", gpu="h100", tp_size=2, pp_size=3, context_tokens=8192, compare=False)
    assert plan.memory.graph_bytes == (27 * 14 + 128) * 2**20


@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm"])
def test_rules_that_do_not_tell_gpus_apart_say_so_of_nvfp4(engine: str) -> None:
    asked: dict[str, Any] = {"model": "8b", "engine": engine, "context_tokens": 8192, "kv_cache_dtype": "nvfp4"}
    said = {
        gpu: any("is not known to run" in advice.message for advice in kvplan.size(gpu=gpu, **asked).advice)
        for gpu in ("h100", "b200")
    }
    assert said == {"h100": True, "b200": False}


@pytest.mark.parametrize(("engine", "gpu"), [("sglang", "h100"), ("sglang", "mi300x"), ("tensorrt-llm", "h100")])
def test_a_format_that_may_not_run_is_no_remedy_and_its_row_says_why(engine: str, gpu: str) -> None:
    asked: dict[str, Any] = {"model": "8b", "engine": engine, "gpu": gpu, "context_tokens": 8192}
    held = {row.kv_cache_dtype: row.max_batch_at_context or 0 for row in kvplan.size(**asked).comparison}
    plan = kvplan.size(**asked, batch_size=held["fp8"] + 1)
    message = next(advice.message for advice in plan.advice if advice.code == "does_not_fit")
    assert "it would fit with --tp" in message and "nvfp4" not in message
    row = next(row for row in plan.comparison if row.kv_cache_dtype == "nvfp4")
    assert row.forbidden is not None and "not known to run" in row.forbidden
    chosen = kvplan.size(**asked, kv_cache_dtype="nvfp4").comparison
    assert next(row for row in chosen if row.kv_cache_dtype == "nvfp4").forbidden is None


def test_a_format_that_the_checkpoint_asks_for_keeps_its_row(tmp_path: Path) -> None:
    config = profiles.load("models", "llama-3.1-8b")["config"]
    config = {**config, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4",
                                       "kv_cache_quant_algo": "NVFP4"}}  # fmt: skip
    plan = kvplan.size(model=model_folder(tmp_path / "m", config), gpu="h100", engine="tensorrt-llm",
                       context_tokens=8192)  # fmt: skip
    row = next(row for row in plan.comparison if row.kv_cache_dtype == "nvfp4")
    assert plan.kv_cache.kv_cache_dtype == "nvfp4" and row.forbidden is None
    assert any("not known to run" in advice.message for advice in plan.advice)
