"""Quantise-and-append writes exactly the reference's codes and scales."""

from dataclasses import replace

import pytest
import torch

from kvplan.kernels.append_kv import append_kv
from kvplan.kernels.paged_cache import random_caches
from kvplan.kernels.reference.append_kv import append_kv as reference

CASES = [
    ("bf16", "none", "HND", 128),
    ("fp16", "none", "NHD", 80),
    ("fp8_e4m3", "none", "HND", 64),
    ("fp8_e4m3", "tensor", "NHD", 128),
    ("fp8_e4m3", "head", "HND", 96),
    ("fp8_e4m3", "token_head", "HND", 128),
    ("fp8_e4m3", "token_head_inline", "NHD", 128),
    ("fp8_e5m2", "token_head", "NHD", 80),
    ("fp8_e5m2", "token_head_inline", "HND", 192),
    ("int8", "head", "HND", 64),
    ("int8", "token_head", "NHD", 256),
    ("int4", "block", "HND", 128),
    ("int4", "block", "NHD", 64),
    ("nvfp4", "block", "HND", 64),
    ("nvfp4", "block", "NHD", 256),
]


def both(kv_dtype, scales, layout, head_dim, k, v, slots):
    """The cache after the kernel and after the reference, from the same start."""
    made = []
    for append in (append_kv, reference):
        (cache,) = random_caches(
            [40, 7],
            kv_dtype=kv_dtype,
            scale_granularity=scales,
            layout=layout,
            block_size_tokens=16,
            num_kv_heads=2,
            head_dim=head_dim,
            device="cpu",
        )
        append(k, v, cache, slots)
        made.append(cache)
    return made


@pytest.mark.parametrize(("kv_dtype", "scales", "layout", "head_dim"), CASES)
def test_codes_and_scales_are_the_references_bit_for_bit(kv_dtype, scales, layout, head_dim):
    spread = torch.tensor([1e-6, 1e-3, 1.0, 30.0, 500.0, 0.0]).view(6, 1, 1)  # subnormals, saturation, a row of zeros
    k, v = (torch.randn(6, 2, head_dim) * spread for _ in "kv")
    slots = torch.tensor([3, 17, -1, 40, 63, 0])
    got, expected = both(kv_dtype, scales, layout, head_dim, k.bfloat16(), v.bfloat16(), slots)
    for name in ("k", "v", "k_scale", "v_scale"):
        assert torch.equal(getattr(got, name).view(torch.uint8), getattr(expected, name).view(torch.uint8)), name


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_rounding_is_to_nearest_even_over_every_code_and_midpoint(kv_dtype):
    dtype = torch.float8_e4m3fn if kv_dtype == "fp8_e4m3" else torch.float8_e5m2
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].unique()
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, codes * 1.0001])
    k = torch.nn.functional.pad(points, (0, -len(points) % 128)).view(-1, 1, 64).repeat(1, 2, 1)
    slots = torch.arange(len(k)) % 64
    got, expected = both(kv_dtype, "none", "HND", 64, k, -k, slots)
    assert torch.equal(got.k, expected.k)
    assert torch.equal(got.v, expected.v)


def test_a_skipped_token_changes_nothing():
    k = torch.ones(1, 2, 64)
    got, _ = both("int8", "token_head", "HND", 64, k, k, torch.tensor([-1]))
    (before,) = random_caches(
        [40, 7],
        kv_dtype="int8",
        scale_granularity="token_head",
        block_size_tokens=16,
        num_kv_heads=2,
        head_dim=64,
        device="cpu",
    )
    assert torch.equal(got.k, before.k)
    assert torch.equal(got.k_scale, before.k_scale)


def test_e2m1_rounds_to_nearest_even_at_every_midpoint():
    """A block whose largest is 6 * 448 * 0.7 has the step 448 * 0.7; its other numbers are quarter steps."""
    step = 448 * 0.7
    quarters = torch.arange(-24, 25) * 0.25 * step
    k = torch.full((4, 2, 64), 6 * step)
    k.view(4, 2, 4, 16)[..., 1:14] = torch.nn.functional.pad(quarters, (0, 3))[:52].view(4, 1, 1, 13)
    got, expected = both("nvfp4", "block", "HND", 64, k, k, torch.arange(4))
    assert torch.equal(got.k, expected.k)


def test_a_cache_whose_k_and_v_lie_differently_is_refused():
    (cache,) = random_caches([200], kv_dtype="bf16", num_kv_heads=2, head_dim=64, device="cpu")
    new = torch.randn(1, 2, 64)
    with pytest.raises(ValueError, match="lie alike"):
        append_kv(new, new, replace(cache, v=cache.v.contiguous()), torch.tensor([3]))
