"""The H200 records that ship, and the page made of them. No torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvplan import profiles
from kvplan.measure import records_page, shipped
from kvplan.measure.analysis import line_rows
from kvplan.samples import read_samples


def test_every_shipped_sample_is_one_and_was_gated_spill_free() -> None:
    found = read_samples(profiles.ROOT / "measurements" / shipped.SAMPLES)
    assert found.corrupt == []
    assert len(found.samples) == 27 + 27 + 54 + 12
    assert {sample.environment["device_name"] for sample in found.samples} == {"NVIDIA H200"}
    assert {sample.kernel_facts["spills"] for sample in found.samples} == {0}
    runs = shipped.shipped_runs()
    cells = [{(s.kv_dtype, s.batch_size, s.context_tokens, s.num_q_heads) for s in run} for run in vars(runs).values()]
    assert [len(cell) for cell in cells] == [27, 27, 54, 12]
    assert cells[0] == cells[1]


def test_latent_samples_that_ship_are_of_one_gpu_and_of_16_and_128_heads() -> None:
    found = read_samples(profiles.ROOT / "measurements" / shipped.LATENT)
    assert found.corrupt == []
    assert {sample.environment["device_name"] for sample in found.samples} == {"NVIDIA H200"}
    runs = shipped.shipped_latent()
    assert [len(run) for run in vars(runs).values()] == [27, 27, 23]
    assert [{s.num_q_heads for s in run} for run in vars(runs).values()] == [{16}, {16}, {128}]
    assert {sample.latent_dim for sample in found.samples} == {512}


def test_latent_rows_stream_at_the_roofline_in_16_bits_and_cost_two_thirds_in_8() -> None:
    """Half the bytes of a row save a third of the time with 16 heads: what is left are products and unpacking."""
    lines = line_rows(shipped.shipped_latent().quick, shipped.LATENT_ROOFLINE_BYTES_PER_S)
    full = {row.kv_dtype: row for row in lines if row.batch_size == 32}
    assert (full["bfloat16"].roofline_fraction or 0) > 0.97
    assert full["fp8"].slope_ratio == pytest.approx(0.67, abs=0.01)
    assert full["fp8_ds_mla"].slope_ratio == pytest.approx(0.91, abs=0.01)


def test_latent_predictions_meet_the_bars_of_plain_attention() -> None:
    """Median error at most 12% before a calibration and 5% after it, here on samples it has not seen."""
    runs = shipped.shipped_latent()
    sheet = records_page.latent_datasheet_predictor(records_page.load_gpu("h200"))
    assert sheet is not None
    assert records_page.off(runs.quick, sheet).median_error <= 0.12
    assert records_page.off(runs.wide, sheet).median_error <= 0.12
    assert records_page.off(runs.again, records_page.calibrated_on(runs.quick)).median_error <= 0.05


def test_a_calibration_of_one_run_predicts_the_next_and_other_heads() -> None:
    """The bars: median error at most 12% before calibration and 5% after it, here on samples it has not seen."""
    runs = shipped.shipped_runs()
    sheet = records_page.datasheet_predictor(records_page.load_gpu("h200"))
    assert sheet is not None
    assert records_page.off(runs.quick, sheet).median_error <= 0.12
    fitted = records_page.calibrated_on(runs.quick)
    assert records_page.off(runs.again, fitted).median_error <= 0.05
    assert records_page.off(runs.small, fitted).median_error <= 0.05


def test_at_fp8_ours_is_ahead_of_flash_attention_3_by_the_bar_and_of_xqa_from_16k_on() -> None:
    """The bars: 1.3 times ahead of FlashAttention-3 at fp8 (batch 8 and 32, 16k and 64k), level with XQA or better."""
    ratio = {
        (r["name"], r["batch_size"], r["context_tokens"]): r["latency_s"] / r["ours_latency_s"]
        for r in shipped.shipped_peers()
        if r["kv_dtype"] == "fp8"
    }
    long = [(batch, context) for batch in (8, 32) for context in (16384, 65536)]
    assert min(ratio["vLLM FlashAttention-3", *cell] for cell in long) >= 1.3
    assert min(ratio["FlashInfer XQA", *cell] for cell in long) >= 1.0


def test_a_whole_step_is_linear_in_context_and_fp8_halves_its_slope() -> None:
    """The bars: R² at least 0.999 over 2k to 64k, fp8 slope at most 0.53 of bf16's."""
    from kvplan.measure.family import Family, Shape
    from kvplan.measure.step_plan import step_lines, step_rows

    families = [Family(Shape(32, 8, 128), name) for name in ("bfloat16", "fp8")]
    lines = step_lines(step_rows(shipped.shipped_steps(), families, None), families)
    assert all(line.r_squared >= 0.999 and line.num_points > 2 for line in lines)
    assert lines[1].slope_ratio is not None
    assert 0.5 <= lines[1].slope_ratio <= 0.53


def test_the_page_is_what_the_records_say() -> None:
    """Regenerate with: python -m kvplan.measure.records_page > docs/measured.md"""
    assert records_page.page() == (Path(__file__).parents[2] / "docs" / "measured.md").read_text(encoding="utf-8")
