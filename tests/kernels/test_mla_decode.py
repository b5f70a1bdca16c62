"""Latent-attention decode against the float64 reference on the same bytes (Triton's interpreter)."""

import pytest
import torch

from kvplan.kernels.configs import Config
from kvplan.kernels.formats import LATENT_ROW_BYTES
from kvplan.kernels.latent_cache import decode_rows, encode_rows, latent_cache_from_rows, random_latent_caches
from kvplan.kernels.mla_decode import MlaPlan
from kvplan.kernels.reference.decode_attention import relative_error
from kvplan.kernels.reference.mla_decode import mla_decode as reference

TOLERANCE = {"bf16": 4e-3, "fp8_e4m3": 5e-4, "fp8_ds_mla": 5e-4}


def check(kv_dtype, seq_lens, *, heads=16, page=64, num_chunks=3, block_n=32):
    (cache,) = random_latent_caches(
        seq_lens, kv_dtype=kv_dtype, block_size_tokens=page, device="cpu", spare=float("nan")
    )
    q = torch.randn(len(seq_lens), heads, 576).bfloat16()
    plan = MlaPlan(cache, num_heads=heads, softmax_scale=192**-0.5, config=Config(block_n, 4, 2), num_chunks=num_chunks)
    out = torch.full((len(seq_lens), heads, 512), float("nan"))
    plan.run(q, cache, out)
    assert relative_error(out, reference(q, cache, softmax_scale=192**-0.5)) <= TOLERANCE[kv_dtype]


@pytest.mark.parametrize("kv_dtype", list(LATENT_ROW_BYTES))
@pytest.mark.parametrize("page", [1, 64])
def test_every_format(kv_dtype, page):
    check(kv_dtype, [70, 1, 33], page=page)


@pytest.mark.parametrize("heads", [1, 8, 20, 128])
def test_head_counts_of_any_tensor_parallel_rank(heads):
    check("fp8_e4m3", [40], heads=heads)


@pytest.mark.parametrize("length", [31, 32, 33, 64])
def test_lengths_around_a_tile(length):
    check("fp8_ds_mla", [length])


def test_a_sequence_in_many_pieces():
    check("fp8_e4m3", [330], num_chunks=10, block_n=16)


@pytest.mark.parametrize("largest", [4400.0, 1e-3])
def test_block_scales_of_656_byte_rows_may_be_large_and_small(largest):
    rows = torch.randn(70, 576)
    rows *= largest / rows.abs().max()
    cache = latent_cache_from_rows(rows, kv_dtype="fp8_ds_mla")
    q = torch.randn(1, 16, 576).bfloat16() / largest
    plan = MlaPlan(cache, num_heads=16, softmax_scale=192**-0.5, config=Config(32, 4, 2), num_chunks=2)
    out = plan.run(q, cache, torch.empty(1, 16, 512))
    assert relative_error(out, reference(q, cache, softmax_scale=192**-0.5)) <= TOLERANCE["fp8_ds_mla"]


def test_a_batch_or_head_count_other_than_the_plans_is_refused():
    one, two = (random_latent_caches(n * [20], kv_dtype="bf16", device="cpu")[0] for n in (1, 2))
    plan = MlaPlan(one, num_heads=16, softmax_scale=192**-0.5, num_chunks=1)
    with pytest.raises(ValueError, match="1 sequences of 16"):
        plan.run(torch.randn(2, 16, 576).bfloat16(), two)
    with pytest.raises(ValueError, match="1 sequences of 16"):
        plan.run(torch.randn(1, 8, 576).bfloat16(), one)


def test_the_656_byte_row_holds_512_codes_four_scales_and_64_bf16_numbers():
    rows = torch.randn(3, 576) * 5
    stored = encode_rows(rows, "fp8_ds_mla", torch.ones(1))
    assert stored.shape == (3, 656)
    scales = stored[:, 512:528].contiguous().view(torch.float32)
    assert torch.allclose(scales, rows[:, :512].view(3, 4, 128).abs().amax(-1) / 448)
    back = decode_rows(stored, "fp8_ds_mla", torch.ones(1), torch.float32)
    assert torch.equal(back[:, 512:], rows[:, 512:].bfloat16().float())
    assert relative_error(back[:, :512], rows[:, :512]) < 0.05


def test_more_heads_than_split_evenly_are_refused():
    (cache,) = random_latent_caches([5], kv_dtype="bf16", device="cpu")
    with pytest.raises(ValueError, match="do not split evenly"):
        MlaPlan(cache, num_heads=65, softmax_scale=1.0)


@pytest.mark.parametrize("kv_dtype", list(LATENT_ROW_BYTES))
def test_rows_come_back_from_a_cache_as_their_format_keeps_them(kv_dtype):
    rows = torch.randn(70, 576) * 3
    cache = latent_cache_from_rows(rows, kv_dtype=kv_dtype, block_size_tokens=16)
    assert cache.read_bytes() == 70 * LATENT_ROW_BYTES[kv_dtype]
    tokens = torch.arange(70)
    stored = cache.data[cache.block_table[0, tokens // 16].long(), tokens % 16].contiguous()
    back = decode_rows(stored, kv_dtype, cache.scale, torch.float32)
    assert (back - rows).norm() / rows.norm() < (0.004 if kv_dtype == "bf16" else 0.04)
