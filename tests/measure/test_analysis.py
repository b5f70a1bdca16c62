"""Slopes, ratios and errors, by hand. No torch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvplan.measure.analysis import cell_rows, compare, line_rows, peer_rows, robust_line
from kvplan.measure.backend import Environment
from kvplan.measure.family import Family, Shape
from kvplan.measure.plan import Cell
from kvplan.measure.predict import (
    KERNEL_INTERCEPT_S,
    LATENT_EFFICIENCY,
    LATENT_FLOPS,
    LATENT_HEAD_S,
    LATENT_INTERCEPT_S,
    USUAL_EFFICIENCY,
    USUAL_INTERCEPT_S,
    find_predictor,
)
from kvplan.samples import Sample

from .test_samples import SAMPLE

SHAPE = Shape(64, 8, 128)
LATENT = Shape(16, 1, 576, latent_dim=512)


def sample(
    kv_dtype: str, context: int, latency_s: float, batch: int = 8, window: int = 0, shape: Shape = SHAPE
) -> Sample:
    read = batch * context * Family(shape, kv_dtype).bytes_per_token
    return replace(SAMPLE, kv_dtype=kv_dtype, context_tokens=context, latency_s=latency_s, batch_size=batch,
                   read_bytes=read, window_tokens=window, num_q_heads=shape.num_q_heads,
                   num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
                   latent_dim=shape.latent_dim or 0)  # fmt: skip


def environment(gpu: str) -> Environment:
    return Environment("cuda", gpu, True, gpu, "sm90", 2**37, 132, 2**26, None, None, None, None, "2", "3", "0", "3")


def test_a_line_through_points_on_a_line_is_that_line() -> None:
    assert robust_line([(1, 3.0), (2, 5.0), (5, 11.0)]) == pytest.approx((2, 1))


def test_one_outlier_in_five_does_not_bend_the_line() -> None:
    points = [(x, 2.0 * x + 1) for x in (1, 2, 4, 8, 16)]
    points[2] = (4, 90.0)
    slope, intercept = robust_line(points)
    assert slope == pytest.approx(2, rel=0.05)
    assert intercept == pytest.approx(1, abs=0.5)


def test_a_line_needs_two_different_x() -> None:
    with pytest.raises(ValueError, match="two different"):
        robust_line([(1, 3.0), (1, 4.0)])


def test_slope_ratio_and_floor_of_a_kernel_that_streams_at_a_constant_rate() -> None:
    """Time = 10 µs + bytes / 4 TB/s: bf16 4,096 B a token, fp8 2,048, per-token-head 2,112 = 0.515625 of bf16."""
    samples = [
        sample(d, n, 1e-5 + 8 * n * Family(SHAPE, d).bytes_per_token / 4e12)
        for d in ("bfloat16", "fp8", "fp8_per_token_head")
        for n in (4096, 16384, 65536)
    ]
    rows = {row.kv_dtype: row for row in line_rows(samples, 4.5e12)}
    assert rows["fp8"].slope_ratio == pytest.approx(0.5)
    assert rows["fp8"].floor == 0.5
    assert rows["fp8_per_token_head"].slope_ratio == pytest.approx(0.515625)
    assert rows["fp8_per_token_head"].floor == 0.515625
    assert rows["bfloat16"].intercept_s == pytest.approx(1e-5)
    assert rows["bfloat16"].bytes_per_s == pytest.approx(4e12)
    assert rows["bfloat16"].roofline_fraction == pytest.approx(4 / 4.5)
    assert rows["bfloat16"].slope_s_per_token == pytest.approx(8 * 4096 / 4e12)


def test_no_ratio_without_bf16_and_no_line_from_one_context_or_past_a_window() -> None:
    assert [row.slope_ratio for row in line_rows([sample("fp8", 4096, 1e-5), sample("fp8", 8192, 2e-5)], 1e12)] == [
        None
    ]
    assert line_rows([sample("fp8", 4096, 1e-5)], 1e12) == []
    assert line_rows([sample("fp8", n, 1e-5, window=128) for n in (4096, 8192)], 1e12) == []


def test_latent_rows_of_one_byte_a_number_have_half_the_floor_and_those_with_scales_656_of_1152() -> None:
    """Time = 10 µs + bytes / 4 TB/s of rows of 1,152, 576 and 656 bytes."""
    samples = [
        sample(d, n, 1e-5 + 8 * n * Family(LATENT, d).bytes_per_token / 4e12, shape=LATENT)
        for d in ("bfloat16", "fp8", "fp8_ds_mla")
        for n in (4096, 16384, 65536)
    ]
    rows = {row.kv_dtype: row for row in line_rows(samples, 4.5e12)}
    assert (rows["fp8"].floor, rows["fp8_ds_mla"].floor) == (0.5, 656 / 1152)
    assert rows["fp8_ds_mla"].slope_ratio == pytest.approx(656 / 1152)
    assert rows["bfloat16"].bytes_per_s == pytest.approx(4e12)
    assert rows["fp8"].shape == "16 query heads on a latent of 512 + 64"


def test_errors_are_relative_to_what_was_measured() -> None:
    """Predicted 10 µs each: 10/8 − 1 = +25%, 10/10 − 1 = 0, 10/20 − 1 = −50%; the median of sizes is 25%."""
    samples = [sample("fp8", 4096, 8e-6), sample("fp8", 8192, 1e-5), sample("fp8", 16384, 2e-5)]
    rows = cell_rows(samples, 1e12, lambda cell: 1e-5)
    assert [row.prediction_error for row in rows] == pytest.approx([0.25, 0, -0.5])
    found = compare(rows, "assumed", "here")
    assert found is not None
    assert (found.median_error, found.worst_error) == (pytest.approx(0.25), pytest.approx(0.5))
    assert found.worst_cell == "fp8 batch 8 × 16,384"
    assert compare(cell_rows(samples, 1e12, None), "assumed", "here") is None


def test_a_known_gpu_is_predicted_from_its_datasheet_and_says_so(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A100 80GB SXM: 2.039 TB/s, and no calibration of these kernels ships for it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    predictor = find_predictor(environment("a100-80gb-sxm"))
    assert predictor is not None
    assert predictor.kind == "assumed"
    assert "roofline" in predictor.source
    assert "assumed" in predictor.source
    cell = Cell(Family(SHAPE, "fp8"), 8, 65536)
    assert predictor.latency_s(cell) == pytest.approx(USUAL_INTERCEPT_S + 2**30 / (USUAL_EFFICIENCY * 2.039e12))
    unpacked = Cell(Family(SHAPE, "nvfp4"), 8, 65536)
    assert predictor.latency_s(unpacked) == pytest.approx(
        KERNEL_INTERCEPT_S["nvfp4"] + 9 / 16 * 2**30 / (0.70 * 2.039e12)
    )
    windowed = Cell(Family(replace(SHAPE, window_tokens=4096), "fp8"), 8, 65536)
    assert predictor.latency_s(windowed) == pytest.approx(USUAL_INTERCEPT_S + 2**26 / (USUAL_EFFICIENCY * 2.039e12))


def test_latent_attention_of_a_known_gpu_is_predicted_from_bytes_and_products(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H200: 4.8 TB/s and 989.4 TFLOP/s in bf16; 16 heads · 2 · (576 + 512) FLOPs a token, and no fewer for 8 heads."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    predictor = find_predictor(environment("h200"), latent_heads=16)
    assert predictor is not None
    assert predictor.kind == "assumed"
    assert "TFLOP/s" in predictor.source
    tokens = 32 * 65536
    stream = tokens * 576 / (LATENT_EFFICIENCY * 4.8e12)
    products = tokens * 16 * 2 * 1088 / (LATENT_FLOPS["fp8_e4m3"] * 989.4e12)
    call = LATENT_INTERCEPT_S + 16 * LATENT_HEAD_S["fp8_e4m3"]
    expected = pytest.approx(call + (stream**2 + products**2) ** 0.5)
    assert predictor.latency_s(Cell(Family(LATENT, "fp8"), 32, 65536)) == expected
    assert predictor.latency_s(Cell(Family(replace(LATENT, num_q_heads=8), "fp8"), 32, 65536)) == expected


def test_an_unknown_device_is_not_predicted(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert find_predictor(environment("gizmo-9000")) is None


def test_a_peer_stands_beside_the_16_bit_cell_of_its_sizes() -> None:
    record = {"name": "torch", "kv_dtype": "bfloat16", "num_q_heads": 64, "num_kv_heads": 8, "head_dim": 128,
              "batch_size": 8, "context_tokens": 4096, "latency_s": 3e-5, "read_bytes": 2**27}  # fmt: skip
    ours = [sample("bfloat16", 4096, 1e-5), sample("fp8", 4096, 5e-6)]
    assert [row.speed_ratio for row in peer_rows([record], ours)] == pytest.approx([3])
    assert [row.speed_ratio for row in peer_rows([record], ours[1:])] == [None]


def test_a_peer_on_fp8_stands_beside_our_fp8_cell() -> None:
    record = {"name": "vLLM FlashAttention-3", "kv_dtype": "fp8", "num_q_heads": 64, "num_kv_heads": 8, "head_dim": 128,
              "batch_size": 8, "context_tokens": 4096, "latency_s": 7e-6, "read_bytes": 2**26}  # fmt: skip
    (row,) = peer_rows([record], [sample("bfloat16", 4096, 1e-5), sample("fp8", 4096, 5e-6)])
    assert (row.kv_dtype, row.speed_ratio) == ("fp8", pytest.approx(1.4))
