"""A decode of random data by the kernels, beside the reference's on the same codes (Triton's interpreter)."""

import torch

from kvplan.kernels.configs import Config
from kvplan.kernels.decode_attention import DecodePlan
from kvplan.kernels.paged_cache import cache_from_dense
from kvplan.kernels.reference.decode_attention import decode_attention as reference
from kvplan.kernels.reference.decode_attention import relative_error

TOLERANCE = {"bf16": 4e-3}
NAN = float("nan")


def attend(
    seq_lens,
    *,
    kv_dtype="fp8_e4m3",
    scales="tensor",
    layout="HND",
    page=16,
    group=8,
    kv_heads=2,
    dim=64,
    block_n=32,
    num_chunks=6,
    stages=2,
    warps=4,
    whole_runs=False,
    k=None,
    v=None,
    q=None,
    **options,
):
    """Kernel output in FP32, and the reference's."""
    k = k or [torch.randn(n, kv_heads, dim) for n in seq_lens]
    v = v or [torch.randn(n, kv_heads, dim) for n in seq_lens]
    cache = cache_from_dense(
        k,
        v,
        kv_dtype=kv_dtype,
        scale_granularity=scales,
        layout=layout,
        block_size_tokens=page,
        spare=99.0 if kv_dtype == "int8" else NAN,
    )
    q_dtype = torch.float16 if kv_dtype == "fp16" else torch.bfloat16
    if q is None:
        q = torch.randn(len(seq_lens), kv_heads * group, dim)
    q = q.to(q_dtype)
    plan = DecodePlan(
        cache,
        num_q_heads=kv_heads * group,
        q_dtype=q_dtype,
        config=Config(block_n, warps, stages, whole_runs=whole_runs),
        num_chunks=num_chunks,
        **options,
    )
    out = torch.full(q.shape, NAN)
    plan.run(q, cache, out)
    if num_chunks >= 10:
        first = out.clone()
        plan.run(q, cache, out.fill_(NAN))
        assert torch.equal(out, first)  # the counters of the join are zero again
    return out, reference(q, cache, **options)


def check(seq_lens, **options):
    out, expected = attend(seq_lens, **options)
    assert relative_error(out, expected) <= TOLERANCE.get(options.get("kv_dtype"), 5e-4)
