"""Decode attention against the float64 reference on the same codes (Triton's interpreter).

The kernels' own error on identical quantised data must stay within 5e-4 for 8-bit and fp16 caches; bf16 weights cost
more. Everything a cache holds that no token uses is NaN (scales too), so a read past a sequence's end shows.
"""

import math
from dataclasses import replace

import pytest
import torch
from decode_check import NAN, attend, check
from triton.runtime import interpreter

from kvplan.kernels.configs import Config
from kvplan.kernels.decode_attention import DecodePlan
from kvplan.kernels.decode_attention.shape import DecodeShape
from kvplan.kernels.formats import kv_format
from kvplan.kernels.paged_cache import cache_from_dense, random_caches
from kvplan.kernels.reference.decode_attention import decode_attention as reference
from kvplan.kernels.reference.decode_attention import gather, relative_error

FORMATS = [
    ("bf16", "none"),
    ("fp16", "none"),
    *[("fp8_e4m3", s) for s in ("none", "tensor", "head", "token_head", "token_head_inline")],
    *[("fp8_e5m2", s) for s in ("none", "token_head", "token_head_inline")],
    *[("int8", s) for s in ("tensor", "head", "token_head", "token_head_inline")],
]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(("kv_dtype", "scales"), FORMATS)
def test_every_format_granularity_and_layout(kv_dtype, scales, layout):
    check([70, 1, 33], kv_dtype=kv_dtype, scales=scales, layout=layout)


@pytest.mark.parametrize("kv_dtype", ["int4", "nvfp4"])
@pytest.mark.parametrize(("dim", "layout", "page"), [(64, "HND", 16), (128, "NHD", 64), (256, "HND", 1)])
def test_four_bit_rows(kv_dtype, dim, layout, page):
    check([70, 1, 33], kv_dtype=kv_dtype, scales="block", dim=dim, layout=layout, page=page, kv_heads=1)


@pytest.mark.parametrize("kv_dtype", ["int4", "nvfp4"])
def test_four_bit_rows_with_window_cap_sinks_and_many_pieces(kv_dtype):
    options = {"window_tokens": 150, "soft_cap": 8.0, "sinks": torch.randn(4)}
    check([300, 20], kv_dtype=kv_dtype, scales="block", kv_heads=1, group=4, num_chunks=10, block_n=16, **options)


@pytest.mark.parametrize("page", [1, 16, 32, 64, 128, 256])
def test_every_block_size_with_scales_of_every_token(page):
    check([page + 1, page, max(1, page - 1)], page=page, scales="token_head", kv_heads=1)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp16"])
def test_every_head_dim(dim, kv_dtype):
    check([40, 65], dim=dim, kv_dtype=kv_dtype, scales="none", kv_heads=1)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16])
def test_every_kind_of_group_from_mha_to_mqa(group):
    check([40, 65], group=group, kv_heads=2, scales="head")


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65])
def test_lengths_around_a_tile(length):
    check([length], kv_heads=1, group=2, scales="token_head")


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7, 16])
def test_any_cut_gives_the_same_answer(num_chunks):
    check([200, 1, 90, 31, 64], kv_heads=1, group=2, num_chunks=num_chunks)


def check_inline(seq_lens, **options):
    check(seq_lens, **{"scales": "token_head_inline", "layout": "NHD", "page": 64, "kv_heads": 4} | options)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])
@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_token_major_rows_with_their_own_scale(kv_dtype, kv_heads):
    check_inline([70, 1, 33], kv_dtype=kv_dtype, kv_heads=kv_heads, group=2)


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_token_major_inline_rows_in_every_kind_of_group(group):
    check_inline([40, 65], group=group)


@pytest.mark.parametrize(("page", "block_n"), [(1, 16), (16, 16), (32, 16), (64, 32), (64, 64)])
def test_token_major_inline_rows_in_every_block_size(page, block_n):
    check_inline([page + 1, page, 2 * page - 1], page=page, block_n=block_n, group=2)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_token_major_inline_rows_of_every_head_dim(dim):
    check_inline([40, 65], dim=dim, kv_heads=2, kv_dtype="int8")


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65])
def test_token_major_inline_rows_around_a_tile(length):
    check_inline([length, 5], group=1)


@pytest.mark.parametrize("num_chunks", [1, 3, 20])
def test_token_major_inline_rows_in_any_cut(num_chunks):
    check_inline([700, 40], num_chunks=num_chunks, block_n=16, group=3)


@pytest.mark.parametrize("window_tokens", [1, 33, 500])
def test_token_major_inline_rows_with_window_cap_and_sinks(window_tokens):
    check_inline([300, 10, 65], window_tokens=window_tokens, soft_cap=8.0, sinks=torch.randn(32), num_chunks=10)


@pytest.mark.parametrize("magnitude", [1e-7, 3e4])
def test_token_major_inline_values_of_any_magnitude(magnitude):
    v = torch.randn(300, 4, 64) * magnitude
    v[::7] *= 1e-3
    v[5] = 0
    check_inline([300, 300], v=[v, v.flip(0)], group=2)


def test_heads_go_together_where_their_inline_rows_fill_sectors():
    """An even number of rows of 128 + 16 bytes is a multiple of 32 bytes: four heads, or two, side by side."""
    tile = Config(32, 4, 2)
    shape = DecodeShape(kv_format("fp8_e4m3"), "token_head_inline", "NHD", 64, 8, 128, 8)
    for changed, heads in (
        ({}, 4),
        ({"num_kv_heads": 6}, 2),
        ({"num_kv_heads": 3}, 1),
        ({"layout": "HND"}, 1),
        ({"scale_granularity": "token_head"}, 1),
        ({"head_dim": 80}, 1),
        ({"block_size_tokens": 16}, 1),  # smaller than the tile
        ({"group_size": 16}, 1),
        ({"dense": False}, 1),
        ({"one_sequence": True}, 1),
    ):
        assert replace(shape, **changed).heads_a_program(tile) == heads, changed


def test_inline_rows_with_gaps_between_tokens_are_read_as_well():
    k, v = ([torch.randn(n, 4, 64) for n in (70, 33)] for _ in "kv")
    cache = cache_from_dense(
        k, v, kv_dtype="int8", scale_granularity="token_head_inline", layout="NHD", block_size_tokens=64, spare=99.0
    )
    wide = torch.zeros(*cache.k.shape[:2], 5, 80, dtype=torch.uint8)
    wide[:, :, :4] = cache.k
    cache = replace(cache, k=wide[:, :, :4])
    q = torch.randn(2, 8, 64).bfloat16()
    out = DecodePlan(cache, num_q_heads=8, config=Config(32, 4, 2), num_chunks=3).run(q, cache, torch.empty(q.shape))
    assert relative_error(out, reference(q, cache)) <= 5e-4


@pytest.mark.parametrize(("seq_lens", "heads"), [([40, 65], 4), ([65], 1)])
def test_one_sequence_alone_has_its_inline_rows_read_head_by_head(seq_lens, heads):
    (cache,) = random_caches(
        seq_lens, kv_dtype="int8", scale_granularity="token_head_inline", layout="NHD", num_kv_heads=4, device="cpu"
    )
    plan = DecodePlan(cache, num_q_heads=8)
    q = torch.randn(len(seq_lens), 8, 128).bfloat16()
    assert plan.heads_a_program == heads
    assert relative_error(plan.run(q, cache, torch.empty(q.shape)), reference(q, cache)) <= 5e-4


@pytest.mark.parametrize("block_size_tokens", [16, 32, 64])
def test_the_inline_kernels_own_tiles_lie_within_a_block_and_keep_as_many_bytes_in_flight(block_size_tokens):
    shape = DecodeShape(kv_format("fp8_e4m3"), "token_head_inline", "NHD", block_size_tokens, 8, 128, 8)
    (config,) = shape.configs(90)
    assert shape.heads_a_program(config) == config.num_warps == 4
    assert config.block_n <= block_size_tokens
    assert config.block_n * (config.num_stages - 1) == 32


@pytest.mark.parametrize(("pieces", "stages"), [(11, 2), (66, 2), (16, 5), (17, 5), (64, 5), (66, 5), (258, 5)])
def test_pieces_join_over_one_to_three_levels(pieces, stages):
    """In eights where buffers are few (2 stages); else up to 16 at once, up to 64 in eights, more in sixteens."""
    check([pieces * 64 - 9], kv_heads=1, group=1, num_chunks=pieces, block_n=16, stages=stages)


def test_pieces_join_beside_a_sequence_that_shares_their_last_chunk():
    check([1300, 40], kv_heads=1, group=3, num_chunks=20, block_n=16)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_dtype": "int8", "scales": "token_head", "dim": 80},
        {"kv_dtype": "bf16", "scales": "none"},
        {"kv_dtype": "int4", "scales": "block"},
        {"scales": "token_head_inline", "layout": "NHD", "kv_heads": 4},
    ],
)
def test_programs_may_arrive_in_any_order(options, monkeypatch):
    """Backwards here: the rest of a sequence arrives before the chunk that it starts in, after other sequences."""
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: forwards(builder.grid_dim[0] - 1 - x, y, z))
    check([300, 20, 5, 700, 64, 1], num_chunks=6, block_n=16, **{"kv_heads": 1, **options})


def test_a_batch_of_more_than_sixty_four():
    check([3] * 70 + [40], kv_heads=1, group=1, num_chunks=5)


@pytest.mark.parametrize("window_tokens", [1, 20, 33, 500])
def test_a_sliding_window_reads_the_last_tokens_only(window_tokens):
    check([100, 10, 65], window_tokens=window_tokens, scales="token_head", kv_heads=1)


def test_soft_cap_and_sinks():
    check([100, 10], soft_cap=5.0, sinks=torch.randn(16) * 3, scales="head")


def test_sinks_count_once_in_a_sequence_of_many_pieces():
    check([700], sinks=torch.full((8,), 6.0), kv_heads=1, num_chunks=10)


def test_a_window_with_cap_and_sinks_in_fp16():
    check([100, 10, 65], kv_dtype="fp16", scales="none", window_tokens=40, soft_cap=8.0, sinks=torch.randn(16))


def test_an_all_overpowering_sink_of_tiny_values_hides_no_small_weight():
    """One token takes nearly all weight but has values near zero: the output comes from weights of 2**-20."""
    k, v = torch.randn(96, 1, 64) * 0.1, torch.randn(96, 1, 64)
    q = torch.ones(1, 8, 64)
    k[0] = 14 / 8
    v[0] = 1e-9
    check([96], scales="token_head", kv_heads=1, k=[k], v=[v], q=q)


@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 3e4])
def test_values_of_any_magnitude_with_scales_of_every_token(magnitude):
    k, v = torch.randn(300, 1, 64), torch.randn(300, 1, 64) * magnitude
    v[::7] *= 1e-3
    check([300], scales="token_head", kv_heads=1, k=[k], v=[v])


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 800.0])
def test_int4_values_of_magnitudes_up_to_3500(magnitude):
    k, v = torch.randn(300, 1, 128), (torch.randn(300, 1, 128) * magnitude).clamp(-3500, 3500)
    v[::7] *= 1e-2
    check([300], kv_dtype="int4", scales="block", dim=128, kv_heads=1, k=[k], v=[v])


def test_int4_sums_of_many_tokens_keep_their_digits():
    """Codes are stored 8 too large; what that adds over a long context is a hundred times the result."""
    k, v = torch.zeros(5000, 1, 64), torch.randn(5000, 1, 64)
    check([5000], kv_dtype="int4", scales="block", kv_heads=1, group=1, k=[k], v=[v], block_n=128, page=256)


def test_flat_weights_over_a_long_context_do_not_underflow():
    k, v = torch.zeros(5000, 1, 64), torch.rand(5000, 1, 64) + 0.5
    check([5000], scales="token_head", kv_heads=1, group=1, k=[k], v=[v], block_n=128, page=256)


def test_a_row_of_zeros_is_no_division_by_zero():
    k, v = torch.randn(40, 1, 64), torch.randn(40, 1, 64)
    k[3], v[5], v[6] = 0, 0, 0
    check([40], scales="token_head", kv_heads=1, k=[k], v=[v])


def test_a_nan_that_a_token_really_holds_is_seen():
    k, v = torch.randn(40, 1, 64), torch.randn(40, 1, 64)
    v[7, 0, 3] = NAN
    out, _ = attend([40], kv_dtype="bf16", scales="none", kv_heads=1, k=[k], v=[v])
    assert out[..., 3].isnan().all()
    assert math.isfinite(float(out[..., :3].sum()))


def test_the_reference_is_plain_attention_on_dequantised_rows():
    """By hand: softmax(q K^T / 8) V over the gathered rows, in float64."""
    k, v = [torch.randn(37, 1, 64)], [torch.randn(37, 1, 64)]
    cache = cache_from_dense(k, v, kv_dtype="bf16", block_size_tokens=16, spare=NAN)
    q = torch.randn(1, 2, 64).bfloat16()
    keys, values = k[0][:, 0].bfloat16().double(), v[0][:, 0].bfloat16().double()
    assert torch.equal(gather(cache, "k", 0, torch.float64)[:, 0], keys)
    expected = torch.softmax(q[0].double() @ keys.T / 8.0, -1) @ values
    assert torch.allclose(reference(q, cache)[0], expected, rtol=1e-12)


def test_quantised_data_stays_close_to_the_original():
    """Relative L2 of the output against unquantised K and V: e4m3 about 0.03, int8 per token and head about 0.01."""
    k, v = [torch.randn(400, 1, 64)], [torch.randn(400, 1, 64)]
    q = torch.randn(1, 4, 64).bfloat16()
    exact = reference(q, cache_from_dense([x.double() for x in k], v, kv_dtype="fp16"))
    for kv_dtype, limit in (("fp8_e4m3", 0.06), ("fp8_e5m2", 0.12), ("int8", 0.02)):
        got = reference(q, cache_from_dense(k, v, kv_dtype=kv_dtype, scale_granularity="token_head"))
        assert 0 < relative_error(got, exact) < limit


def test_shapes_the_kernel_does_not_read_are_refused_in_one_line():
    cache = cache_from_dense([torch.randn(5, 2, 64)], [torch.randn(5, 2, 64)], kv_dtype="bf16")
    with pytest.raises(ValueError, match="groups of 1 to 16"):
        DecodePlan(cache, num_q_heads=34)
    with pytest.raises(ValueError, match="head_dim 72"):
        cache_from_dense([torch.randn(5, 2, 72)], [torch.randn(5, 2, 72)], kv_dtype="bf16")
    with pytest.raises(ValueError, match="scale_granularity of bf16"):
        cache_from_dense([torch.randn(5, 2, 64)], [torch.randn(5, 2, 64)], kv_dtype="bf16", scale_granularity="head")
    plan = DecodePlan(cache, num_q_heads=4)
    other = cache_from_dense([torch.randn(5, 2, 64)], [torch.randn(5, 2, 64)], kv_dtype="bf16", layout="NHD")
    with pytest.raises(ValueError, match="not of the shape"):
        plan.run(torch.randn(1, 4, 64).bfloat16(), other)


def test_a_layer_that_32_bit_addresses_cannot_span_is_refused():
    cache = random_caches([64], kv_dtype="bf16", num_kv_heads=2, head_dim=64, device="cpu")[0]
    page = cache.k.stride(0)
    far = torch.empty(0, dtype=torch.bfloat16, device="meta")
    long = far.as_strided(((1 << 34) // page + 1, *cache.k.shape[1:]), cache.k.stride())
    with pytest.raises(ValueError, match="32 GiB"):
        DecodePlan(replace(cache, k=long), num_q_heads=4)


def test_a_batch_other_than_the_plans_is_refused():
    two, three = ([torch.randn(5, 2, 64) for _ in range(n)] for n in (2, 3))
    plan = DecodePlan(cache_from_dense(two, two, kv_dtype="bf16"), num_q_heads=4)
    with pytest.raises(ValueError, match="batch of 2"):
        plan.run(torch.randn(3, 4, 64).bfloat16(), cache_from_dense(three, three, kv_dtype="bf16"))


def test_scales_that_do_not_lie_alike_are_refused():
    cache = random_caches([64], kv_dtype="fp8_e4m3", scale_granularity="token_head", head_dim=64, device="cpu")[0]
    wider = torch.zeros(*cache.v_scale.shape[:2], 2 * cache.v_scale.shape[2])[..., ::2]
    with pytest.raises(ValueError, match="lie alike"):
        DecodePlan(replace(cache, v_scale=wider), num_q_heads=8)


def test_a_plan_reads_caches_with_gaps_between_blocks_and_without():
    k, v = [torch.randn(40, 2, 64)], [torch.randn(40, 2, 64)]
    cache = cache_from_dense(k, v, kv_dtype="fp8_e4m3", scale_granularity="tensor")
    apart = replace(cache, k=torch.cat([cache.k, cache.k], 2)[:, :, :16], v=torch.cat([cache.v, cache.v], 2)[:, :, :16])
    q = torch.randn(1, 8, 64).bfloat16()
    plan = DecodePlan(cache, num_q_heads=8, num_chunks=2)
    assert torch.equal(plan.run(q, apart), plan.run(q, cache))


def test_sinks_of_16_bits_keep_their_digits():
    sinks = torch.full((8,), 6.3).bfloat16()
    check([60], kv_heads=1, sinks=sinks)
