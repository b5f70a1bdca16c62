"""Decode attention that copies 8-bit pages in whole runs, against the reference on the same codes.

The kernel is written in Gluon, which Triton's interpreter does not run: `gluon_interpreter` stands in for the hardware.
"""

from dataclasses import replace

import pytest
import torch
from decode_check import attend, check
from gluon_interpreter import interpreted, places
from triton.runtime import interpreter

from kvplan.kernels.configs import Config
from kvplan.kernels.decode_attention import shape as shapes
from kvplan.kernels.decode_attention.runs import join, kernel, layouts, tiles
from kvplan.kernels.decode_attention.shape import DecodeShape
from kvplan.kernels.formats import kv_format
from kvplan.kernels.reference.decode_attention import relative_error


@pytest.fixture(autouse=True)
def _gluon_is_interpreted():
    with interpreted(kernel, tiles, layouts, join, shapes):
        yield


def check_runs(seq_lens, **options):
    check(seq_lens, **{"whole_runs": True, "warps": 2, "stages": 1, "block_n": 64, "page": 64, "group": 3} | options)


@pytest.mark.parametrize("scales", ["tensor", "head", "token_head", "token_head_inline"])
@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_every_format_and_granularity(kv_dtype, scales):
    check_runs([130, 1, 64], kv_dtype=kv_dtype, scales=scales)


@pytest.mark.parametrize(
    ("dim", "scales"), [(64, "tensor"), (80, "token_head"), (96, "tensor"), (128, "token_head"), (256, "head")]
)
def test_every_head_dim(dim, scales):
    check_runs([70, 130], dim=dim, scales=scales, kv_dtype="int8", kv_heads=1)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rows_with_their_scale_inline(dim):
    check_runs([70, 130], dim=dim, scales="token_head_inline", warps=4, kv_heads=1)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("scales", ["tensor", "token_head"])
def test_a_tile_of_rows_without_a_tail_may_lie_in_several_pages(page, scales):
    check_runs([page, page - 1, 200], page=page, scales=scales, kv_heads=1)


@pytest.mark.parametrize(("block_n", "warps"), [(16, 1), (32, 2)])
@pytest.mark.parametrize(("dim", "scales"), [(80, "none"), (128, "token_head_inline")])
def test_rows_with_a_tail_in_small_pages(block_n, warps, dim, scales):
    check_runs([31, 33, 100], page=block_n, block_n=block_n, warps=warps, stages=2, dim=dim, scales=scales, kv_heads=1)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_any_number_of_tiles_in_flight(stages):
    check_runs([700, 1, 64], stages=stages, num_chunks=2, kv_heads=1)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128])
def test_lengths_around_a_tile(length):
    check_runs([length, 5], kv_heads=1)


@pytest.mark.parametrize("group", [1, 8, 9, 16])
def test_every_kind_of_group(group):
    check_runs([700, 90], group=group, kv_heads=1, num_chunks=11)


def test_one_kv_head_is_a_run_in_token_major_pages_as_well():
    check_runs([130, 64, 1], layout="NHD", kv_heads=1, scales="token_head_inline")


@pytest.mark.parametrize("window_tokens", [1, 65, 500])
@pytest.mark.parametrize("page", [16, 64])
def test_window_cap_and_sinks(window_tokens, page):
    check_runs([300, 10, 65], page=page, window_tokens=window_tokens, soft_cap=8.0, sinks=torch.randn(6))


@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("pieces", [9, 17, 66])
def test_pieces_join_over_one_or_two_levels(pieces, dim):
    """More than eight pieces are read in two steps, more than sixteen in two levels."""
    options = {"dim": dim, "kv_heads": 1, "group": 1, "num_chunks": pieces, "block_n": 16, "page": 16, "warps": 1}
    check_runs([pieces * 64 - 9, 40], sinks=torch.randn(1), **options)


def test_programs_may_arrive_in_any_order(monkeypatch):
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: forwards(builder.grid_dim[0] - 1 - x, y, z))
    check_runs([300, 20, 5, 700, 64, 1], num_chunks=6, block_n=16, page=16, warps=1, kv_heads=1, dim=80)


@pytest.mark.parametrize("magnitude", [1e-7, 3e4])
def test_values_of_any_magnitude_with_scales_of_every_token(magnitude):
    v = torch.randn(300, 1, 64) * magnitude
    v[::7] *= 1e-3
    v[5] = 0
    check_runs([300], v=[v], scales="token_head", kv_heads=1)


def test_a_tile_that_is_read_before_its_copy_has_arrived_is_seen(monkeypatch):
    """The stand-in for the hardware is no easier than the hardware: without the wait the result is wrong."""
    monkeypatch.setattr(kernel.async_copy, "wait_group", lambda left: None)
    out, expected = attend([130, 5], whole_runs=True, block_n=64, page=64, stages=1, kv_heads=1)
    assert not relative_error(out, expected) < 0.1


@pytest.mark.parametrize(
    ("width", "tail", "element_bytes"), [(64, 16, 1), (128, 16, 1), (64, 32, 1), (128, 0, 1), (64, 0, 1)]
)
def test_eight_rows_meet_in_no_bank_of_shared_memory(width, tail, element_bytes):
    """Eight tokens' same 16 bytes, as a product reads them; of rows of 96 bytes two share a bank."""
    at = places([64, width], layouts.rows_layout(64, width, tail, element_bytes)) * element_bytes
    for first in range(0, 64, 8):
        banks = [int(at[token, 16]) // 16 % 8 for token in range(first, first + 8)]
        assert len(set(banks)) == (4 if tail == 32 else 8)


SHAPE = DecodeShape(kv_format("fp8_e4m3"), "tensor", "HND", 64, 8, 128, 8)


@pytest.mark.parametrize(
    "changed",
    [
        {"fmt": kv_format("bf16"), "scale_granularity": "none"},
        {"layout": "NHD"},
        {"block_size_tokens": 1},
        {"head_dim": 192},
        {"dense": False},
        {"one_sequence": True},
    ],
)
def test_what_is_no_run_or_reads_as_fast_otherwise_is_read_row_by_row(changed):
    assert SHAPE.configs(90)[0].whole_runs
    assert not any(config.whole_runs for config in replace(SHAPE, **changed).configs(90))


def test_elsewhere_than_on_nvidia_gpus_or_with_an_older_triton_rows_are_read_one_by_one(monkeypatch):
    assert SHAPE.configs(None) == (Config(32, 4, 2),)
    monkeypatch.setattr(shapes, "attend_runs", None)
    assert not any(config.whole_runs for config in SHAPE.configs(90))


def test_one_sequence_with_its_scales_inline_is_read_in_runs_as_well():
    inline = replace(SHAPE, scale_granularity="token_head_inline", one_sequence=True)
    assert inline.configs(90)[0].whole_runs


@pytest.mark.parametrize("block_size_tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("scales", ["tensor", "token_head_inline"])
def test_tiles_of_rows_with_a_tail_lie_within_a_block(block_size_tokens, head_dim, scales):
    shape = replace(SHAPE, scale_granularity=scales, head_dim=head_dim, block_size_tokens=block_size_tokens)
    for config in shape.configs(90):
        if config.whole_runs and (scales == "token_head_inline" or head_dim in (80, 96)):
            assert config.block_n <= block_size_tokens
            assert config.block_n >= 16 * config.num_warps
