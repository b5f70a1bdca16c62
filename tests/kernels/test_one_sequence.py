"""A batch of one, whose programs all join its pieces together: each waits for all and adds up a part of the output.

Triton's interpreter runs one program after the other, where nobody can wait. So the wait is left out and the kernel run
twice: the second time every program finds the pieces of the first. What the wait itself is worth, a gate on a GPU says.
"""

import pytest
import torch
from decode_check import NAN, TOLERANCE

from kvplan.kernels.bench import decode_attention as bench
from kvplan.kernels.bench.decode_attention import DecodeCell
from kvplan.kernels.configs import Config, alone_configs
from kvplan.kernels.decode_attention import DecodePlan, join
from kvplan.kernels.decode_attention import plan as plans
from kvplan.kernels.device import KernelFacts, launches_evenly
from kvplan.kernels.paged_cache import cache_from_dense
from kvplan.kernels.reference.decode_attention import decode_attention as reference
from kvplan.kernels.reference.decode_attention import relative_error
from kvplan.kernels.unpack import PTX


def one(tokens, *, kv_dtype="fp8_e4m3", scales="tensor", group=8, kv_heads=2, dim=64, chunks=5, warps=4, **options):
    """(plan, its query, the cache, the reference's output), with everything joined together."""
    k, v = [torch.randn(tokens, kv_heads, dim)], [torch.randn(tokens, kv_heads, dim)]
    cache = cache_from_dense(k, v, kv_dtype=kv_dtype, scale_granularity=scales, spare=NAN)
    q = torch.randn(1, kv_heads * group, dim).bfloat16()
    config = Config(32, warps, 2)
    plan = DecodePlan(cache, num_q_heads=kv_heads * group, config=config, num_chunks=chunks, **options)
    plan._flags["JOIN_TOGETHER"] = warps
    plan._partial.fill_(NAN)
    return plan, q, cache, reference(q, cache, **options)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (640, {}),
        (640, {"group": 3, "dim": 80, "kv_dtype": "bf16", "scales": "none"}),
        (700, {"dim": 96, "group": 5, "warps": 1, "chunks": 11}),
        (500, {"dim": 128, "kv_dtype": "int4", "scales": "block", "warps": 1}),
        (500, {"dim": 64, "kv_dtype": "nvfp4", "scales": "block"}),
        (640, {"scales": "token_head", "sinks": torch.randn(16), "soft_cap": 20.0}),
        (900, {"window_tokens": 300}),
        (8400, {"kv_heads": 1, "chunks": 130}),
        (64, {"group": 16, "dim": 128}),
    ],
)
def test_every_program_adds_up_its_part(tokens, options, monkeypatch):
    monkeypatch.setattr(join, "_arrivals", lambda counter, UNPACK: 1 << 30)
    plan, q, cache, expected = one(tokens, **options)
    plan.run(q, cache)
    out = plan.run(q, cache, torch.full(q.shape, NAN))
    assert relative_error(out, expected) <= TOLERANCE.get(options.get("kv_dtype"), 5e-4)
    assert not plan._arrived.any()


def test_what_is_counted_is_read_with_all_that_was_written_before(monkeypatch):
    """With the counter at the number of pieces, a program goes on; it counts itself twice."""
    plan, q, cache, _ = one(64, chunks=1)
    plan._arrived.fill_(3)
    plan.run(q, cache)
    assert (plan._arrived == 3).all()  # a sequence in one piece has nothing to join
    plan, q, cache, _ = one(640)
    plan._arrived[::8] = 100  # at once above the number of pieces
    plan.run(q, cache)
    assert plan._arrived[0] == plan._arrived[8] == 110


def test_a_cpu_joins_level_by_level():
    plan = DecodePlan(
        cache_from_dense([torch.randn(9, 2, 64)], [torch.randn(9, 2, 64)], kv_dtype="bf16"), num_q_heads=4
    )
    assert plan._flags["JOIN_TOGETHER"] == 0
    assert not plan._flags["DEPENDENT"]


def test_more_programs_than_run_at_once_are_refused(monkeypatch):
    monkeypatch.setattr(plans, "unpack_mode", lambda arch: PTX)
    with pytest.raises(ValueError, match="the GPU runs 6 at once"):
        one(640, chunks=7)


def test_where_fewer_programs_run_at_once_than_reckoned_nobody_waits():
    plan, q, cache, expected = one(640)
    plan._flags["launch_cooperative_grid"] = True
    launched, kernel = [], plan._kernel

    class Refusing:
        def __getitem__(self, grid):
            def launch(*args, launch_cooperative_grid, **flags):
                launched.append(launch_cooperative_grid)
                if launch_cooperative_grid:
                    raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
                kernel[grid](*args, **flags)

            return launch

    plan._kernel = Refusing()
    for _ in range(2):
        out = plan.run(q, cache, torch.full(q.shape, NAN))
        assert relative_error(out, expected) <= 5e-4
    assert launched == [True, False, False]


@pytest.mark.parametrize(
    ("warps", "registers", "limit", "evenly"),
    [
        (4, 191, 2, True),  # two fit
        (4, 156, 2, False),  # three fit, two are wanted: the next launch's come up one, two or three together
        (4, 122, 2, True),  # four fit: the whole next launch comes up beside
        (2, 168, None, True),
        (1, 144, 8, False),
    ],
)
def test_the_next_launch_comes_up_early_where_multiprocessors_hold_whole_launches(warps, registers, limit, evenly):
    facts = KernelFacts("attend", warps, registers, 0, shared_bytes=4096)
    assert launches_evenly(facts, 90, limit) is evenly


def test_a_batch_of_one_tries_larger_programs_first():
    tensor, token_head = (DecodeCell((64,), scale_granularity=s).shape.configs(90) for s in ("tensor", "token_head"))
    assert tensor[:2] == alone_configs(8, 128, 8, scale_per_token=False)
    assert token_head[:2] == tensor[1::-1]
    assert 2 < len(tensor) <= 4
    assert DecodeCell((64, 64)).shape.configs(90)[0].whole_runs


def test_a_gate_of_one_sequence_runs_batches_of_one(monkeypatch):
    seen, build = [], bench.build
    monkeypatch.setattr(
        bench, "build", lambda cell, lengths, *rest: seen.append(lengths) or build(cell, lengths, *rest)
    )
    for lengths in ((1,), (1, 1)):
        cell = DecodeCell(lengths, num_kv_heads=1, head_dim=64)
        assert bench.gate(cell, device="cpu", seq_lens=(40, 7))["passed"]
    assert seen == [(40,), (7,), (40, 7)]
