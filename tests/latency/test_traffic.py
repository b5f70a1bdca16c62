"""Bytes and FLOPs of a decode step, against numbers derived by hand from public model geometry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplan.latency.capacity import max_batches
from kvplan.latency.request import make_itl_request
from kvplan.latency.serve import serve
from kvplan.latency.served import Served
from kvplan.traffic import touched_share


def served(**options: Any) -> Served:
    return serve(make_itl_request({"gpu": "h200", "kv_cache_dtype": "bf16", **options}))


def test_full_attention_reads_every_token_of_its_own_heads() -> None:
    # Llama 3.1 8B: 32 layers × 8 KV heads × (128 + 128) × 2 bytes = 131,072 bytes a token; TP 4 keeps 2 heads a rank
    assert float(served(model="8b").traffic.kv_read_bytes(np.array(1000.0))) == 131_072_000
    assert float(served(model="8b", tp_size=4).traffic.kv_read_bytes(np.array(1000.0))) == 32_768_000


def test_tp_divides_kv_down_to_one_head_and_no_further() -> None:
    one_head = 32 * (128 + 128) * 2
    for tp in (8, 16, 32):
        assert float(served(model="8b", tp_size=tp).traffic.kv_slope_bytes_per_token(np.array(1.0))) == one_head


def test_per_token_head_scales_are_read_too() -> None:
    # per token and head: 128 K + 128 V bytes and two FP32 scales
    half = served(model="8b", kv_cache_dtype="fp8_per_token_head").traffic
    assert float(half.kv_read_bytes(np.array(1.0))) == 32 * 8 * (256 + 8)


def test_a_window_stores_the_context_and_reads_itself() -> None:
    # gpt-oss-120b: 18 full and 18 sliding layers (window 128), 8 KV heads of 64: 2,048 bytes a token and layer
    traffic = served(model="gpt-oss-120b").traffic
    layer = 8 * (64 + 64) * 2
    assert float(traffic.kv_read_bytes(np.array(64.0))) == 36 * 64 * layer
    assert float(traffic.kv_read_bytes(np.array(10_000.0))) == 18 * (10_000 + 128) * layer
    assert float(traffic.kv_slope_bytes_per_token(np.array(64.0))) == 36 * layer
    assert float(traffic.kv_slope_bytes_per_token(np.array(10_000.0))) == 18 * layer


def test_latent_attention_reads_one_latent_on_every_rank() -> None:
    # DeepSeek V3: 61 layers × (512 + 64) × 2 bytes, replicated over TP
    for tp in (1, 8):
        assert float(served(model="deepseek-v3", tp_size=tp).traffic.kv_read_bytes(np.array(1.0))) == 61 * 576 * 2


def test_sparse_latent_attention_reads_top_k_latents_and_all_index_keys() -> None:
    # DeepSeek V3.2: top 2,048 of 61 layers' latents, and 61 × (128 FP8 + one FP32 scale) of every token
    traffic = served(model="deepseek-v3.2", tp_size=8, engine="sglang").traffic
    assert float(traffic.kv_read_bytes(np.array(100_000.0))) == 61 * (2048 * 1152 + 100_000 * 132)


def test_index_keys_and_states_cost_the_same_whatever_the_kv_format() -> None:
    # beyond the top 2,048 only index keys grow, FP8 in either case; 3/4 of Qwen3.5's layers keep states
    sparse = [served(model="deepseek-v3.2", tp_size=8, kv_cache_dtype=dtype) for dtype in ("bf16", "fp8")]
    batch, context = np.array([1.0]), np.array([100_000.0])
    bf16, fp8 = (float(one.kv_slope_s(batch, context)[0]) for one in sparse)
    assert fp8 == bf16 == 61 * 132 / 4.8e12
    hybrid = served(model="qwen3.5-27b", kv_cache_dtype="fp8")
    states = float(hybrid.traffic.kv_read_bytes(np.array(0.0)))
    assert states > 0 and hybrid.kv_speed.slowdown > 1
    assert float(hybrid.step_features(batch, np.array([0.0])).kv_s[0]) == pytest.approx(states / 4.8e12)


def test_ranks_that_split_the_context_multiply_all_their_heads_with_their_share() -> None:
    # DeepSeek V3 on 8 GPUs: an eighth of the latents each, with 128 heads in place of 16
    whole, split = (served(model="deepseek-v3", tp_size=8, dcp_size=dcp) for dcp in (1, 8))
    context = np.array([65_536.0])
    assert float(split.traffic.kv_read_bytes(context)[0]) == float(whole.traffic.kv_read_bytes(context)[0]) / 8
    assert float(split.traffic.kv_flops(context)[0]) == pytest.approx(float(whole.traffic.kv_flops(context)[0]))
    assert split.kv_speed == served(model="deepseek-v3").kv_speed
    assert split.kv_speed.slowdown > whole.kv_speed.slowdown == 1


def test_rows_with_scales_cost_their_bytes_of_the_stream_and_the_same_products() -> None:
    """656 bytes of DeepSeek's latent in place of 576: 14% more to stream, and none more to multiply."""
    plain, scaled = (served(model="deepseek-v3", tp_size=8, engine="generic", kv_cache_dtype=dtype)
                     for dtype in ("fp8", "fp8_ds_mla"))  # fmt: skip
    batch, context = np.array([1.0]), np.array([8192.0])
    ratio = float(scaled.kv_slope_s(batch, context)[0] / plain.kv_slope_s(batch, context)[0])
    # H200, 16 heads in tiles of 64: 576 B take 0.133 ns, their products 0.201 ns, together 0.241; 656 B 0.152 ns
    assert ratio == pytest.approx(0.252 / 0.241, abs=2e-3)
    assert 1 < ratio < 656 / 576


def test_weights_of_a_dense_model_are_all_read() -> None:
    # Llama 3.1 70B: 70.55e9 parameters less the input embedding (128,256 × 8,192), two bytes, over 4 ranks
    traffic = served(model="70b", tp_size=4).traffic
    expected = (70_553_706_496 - 128_256 * 8_192) * 2 / 4
    assert float(traffic.weight_read_bytes(np.array(1.0))) == pytest.approx(expected, rel=1e-4)


def test_experts_touched_follow_the_number_of_tokens() -> None:
    traffic = served(model="qwen3-235b-a22b", tp_size=8).traffic
    assert (traffic.num_experts, traffic.top_k_experts) == (128, 8)
    assert float(traffic.expert_share_read(np.array(1.0))) == pytest.approx(8 / 128)
    assert float(traffic.expert_share_read(np.array(2.0))) == pytest.approx(1 - (1 - 8 / 128) ** 2)
    assert float(traffic.expert_share_read(np.array(1e4))) == pytest.approx(1)


@given(st.integers(1, 10_000), st.floats(0.01, 0.5), st.floats(0.2, 50))
def test_skewed_routing_touches_fewer_experts_than_uniform(tokens: int, chance: float, evenness: float) -> None:
    found = float(touched_share(tokens, chance, evenness))
    uniform = 1 - (1 - chance) ** tokens
    assert chance - 1e-9 <= found <= uniform + 1e-9  # one token touches its top k, and no more are needed
    assert found <= float(touched_share(tokens + 1, chance, evenness)) + 1e-12
    assert float(touched_share(1, chance, evenness)) == pytest.approx(chance)
    assert float(touched_share(tokens, chance, 1e7)) == pytest.approx(uniform, abs=1e-4)


@pytest.mark.parametrize(
    ("model", "kernels"),
    [
        ("8b", 32 * (6 + 5)),  # attention and MLP
        ("qwen3-32b", 64 * (6 + 2 + 5)),  # norms of q and k
        ("gpt-oss-120b", 36 * (6 + 10)),  # routed experts
        ("deepseek-v3", 3 * (11 + 5) + 58 * (11 + 10 + 3)),  # latent attention; three dense layers, a shared expert
    ],
)
def test_kernels_of_a_step_are_counted_by_what_layers_are(model: str, kernels: int) -> None:
    assert served(model=model, tp_size=8).traffic.num_kernels == kernels


def test_four_bit_requests_quantise_the_experts_only() -> None:
    half, four = (served(model="qwen3-235b-a22b", tp_size=8, weight_dtype=w).traffic.weights for w in ("bf16", "nvfp4"))
    assert half["attention"] == four["attention"]
    # 4 bits and one byte of scale per 16: 0.5625 bytes a parameter against 2
    assert four["expert"].resident_bytes / half["expert"].resident_bytes == pytest.approx(0.5625 / 2, rel=1e-6)


def test_matrix_flops_are_two_a_parameter() -> None:
    traffic = served(model="8b").traffic
    total = sum(traffic.matrix_flops_per_token(part) for part in traffic.weights)
    assert total == pytest.approx(2 * (8_030_261_248 - 128_256 * 4_096), rel=1e-3)


def test_attention_flops_are_four_a_head_element_and_token() -> None:
    # two products of 32 query heads × 128 over the context, in 32 layers
    assert float(served(model="8b").traffic.kv_flops(np.array(1000.0))) == 4 * 32 * 128 * 32 * 1000


def test_partly_filled_blocks_are_read_whole_in_the_traffic_table() -> None:
    part = served(model="8b").traffic.kv[0]
    assert part.block_size_tokens == 16
    assert part.read_bytes_in_blocks(17) == 32 * part.bytes_per_state * 32


@given(
    context=st.integers(1, 2**20), available=st.integers(0, 2**38),
    model=st.sampled_from(["8b", "gpt-oss-120b", "deepseek-v3", "qwen3.5-27b", "llama-4-scout"]),
    engine=st.sampled_from(["vllm", "sglang"]),
)  # fmt: skip
def test_capacity_over_many_contexts_is_the_sizing_answer(
    context: int, available: int, model: str, engine: str
) -> None:
    plan = served(model=model, engine=engine).plan
    assert int(max_batches(plan, available, np.array([context]))[0]) == plan.max_batch(available, context)
