"""Latent attention: a known kernel is found again from samples, and nothing is said of what was not measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Ran

import kvplan
from kvplan import profiles
from kvplan.calibration import store
from kvplan.calibration.geometry import hardware_of
from kvplan.calibration.latent import MLA, LatentCases, find_latent, latent_from_json, mla_s, samples_document
from kvplan.errors import InputError, ProfileError
from kvplan.gpu import load_gpu
from kvplan.samples import Sample, append_record

Cli = Callable[..., Ran]
H200 = load_gpu("h200")
ABOUT = {"name": "test", "aliases": [], "gpu": "h200", "engine": "kvplan", "engine_version": "1", "date": "2026-11-24",
         "sources": []}  # fmt: skip
ROW_BYTES = {"bfloat16": 1152, "fp8": 576, "fp8_ds_mla": 656}
TRUTH = {"launch_s": 9e-6, "chain_s": 5e-7, "bandwidth_fraction": 0.95, "flops_fraction": 0.2, "page_tokens": 100.0,
         "sequence_s": 3e-6}  # fmt: skip
CELLS = list(itertools.product((1, 8, 32), (4096, 16384, 65536)))


def seconds(kv_dtype: str, batch: float, context: float, heads: float = 16) -> float:
    """What a kernel of these parameters takes, its tiles of 16 rows."""
    theta = np.log([TRUTH[p.name] for p in MLA])
    case = LatentCases(*(np.array([float(x)]) for x in (batch, context, heads, ROW_BYTES[kv_dtype])))
    return float(mla_s(theta, case, hardware_of(H200), 16)[0])


def sample(kv_dtype: str, batch: int, context: int) -> Sample:
    taken = seconds(kv_dtype, batch, context)
    return Sample(
        batch_size=batch, context_tokens=context, num_q_heads=16, num_kv_heads=1, head_dim=576, window_tokens=0,
        latent_dim=512, kv_dtype=kv_dtype, scale_granularity="none", latency_s=taken, p10_s=taken, p90_s=taken,
        num_replays=20, read_bytes=batch * context * ROW_BYTES[kv_dtype], layers=2, layout="rows", block_size_tokens=64,
        seed=0, sm_clock_hz=None, kernel_facts={}, environment={"gpu": "h200"}, time="2026-11-24T00:00:00Z",
    )  # fmt: skip


def document(*kv_dtypes: str) -> dict[str, Any]:
    return samples_document([sample(d, *cell) for d in kv_dtypes for cell in CELLS], ABOUT, H200, 16)


def test_a_kernel_is_found_again_from_nine_cells_a_format() -> None:
    found = latent_from_json(document("bfloat16", "fp8"), "here", "measured here")
    for kv_dtype in ("bfloat16", "fp8"):
        for batch, context in [*CELLS, (16, 32768)]:
            said = found.latency_s(kv_dtype, batch, context, 16, ROW_BYTES[kv_dtype])
            assert said == pytest.approx(seconds(kv_dtype, batch, context), rel=0.02)
    assert found.source == "calibration test (kvplan 1, 18 samples, 2026-11-24, measured here)"


def test_a_format_or_number_of_heads_that_was_not_measured_is_not_predicted() -> None:
    found = latent_from_json(document("fp8"), "here", "measured here")
    assert found.latency_s("fp8", 8, 4096, 16, 576) is not None
    assert found.latency_s("fp8_ds_mla", 8, 4096, 16, 656) is None
    assert found.latency_s("fp8", 8, 4096, 128, 576) is None


def test_both_names_of_e4m3_are_one_entry() -> None:
    document_ = samples_document(
        [replace(sample("fp8", *cell), kv_dtype="fp8_e4m3") for cell in CELLS], ABOUT, H200, 16
    )
    found = latent_from_json(document_, "here", "measured here")
    assert list(found.entries) == ["fp8"]
    assert found.latency_s("fp8_e4m3", 8, 4096, 16, 576) == found.latency_s("fp8", 8, 4096, 16, 576) is not None


def test_each_number_of_heads_finds_its_own_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = store.user_folder()
    folder.mkdir(parents=True)
    for heads in (16, 128):
        data = document("fp8") | {"name": f"of-{heads}", "valid_range": {"num_heads": [heads, heads]}}
        (folder / f"of-{heads}.json").write_text(json.dumps(data))
    found = {heads: find_latent("h200", "kvplan", heads) for heads in (16, 64, 128)}
    assert {heads: c and c.name for heads, c in found.items()} == {16: "of-16", 64: None, 128: "of-128"}


def test_few_samples_make_no_calibration() -> None:
    few = [sample("fp8", *cell) for cell in CELLS[:7]]
    with pytest.raises(InputError, match="7 usable samples of fp8: at least 8"):
        samples_document(few, ABOUT, H200, 16)


@pytest.mark.parametrize("name", ["mla-decode-h200-tensorrt-llm", "mla-decode-h100-sxm-sglang"])
def test_what_ships_predicts_with_tiles_of_64_rows(name: str) -> None:
    data = profiles.load("calibrations", name)
    found = find_latent(data["gpu"], data["engine"], 16)
    assert found is not None
    assert found.tile_rows == 64
    one, tile = (found.latency_s("bfloat16", 32, 65536, heads, 1152) for heads in (1, 64))
    assert one == tile


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tile_rows": 0}, "tile_rows must be a number from 1"),
        ({"tile_rows": None}, "tile_rows must be a number from 1"),
        ({"kind": "attention"}, "kind must be 'mla_decode'"),
        ({"valid_range": {}}, r"valid_range.num_heads must be \[smallest, largest\]"),
        ({"hardware": {}}, "hardware.memory_bandwidth_bytes_per_s"),
        ({"entries": {"fp8": {"parameters": {"launch_s": {"value": 1e-5}}}}}, "parameters.chain_s must be an object"),
    ],
)
def test_a_broken_file_is_named_with_its_field(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        latent_from_json({**document("fp8"), **change}, "x.json", "given")


def test_kvplan_calibrate_takes_no_latent_rows_for_plain_ones(kvplan_cli: Cli, tmp_path: Path) -> None:
    for cell in CELLS:
        append_record(tmp_path / "s.jsonl", asdict(sample("fp8", *cell)))
    ran = kvplan_cli("calibrate", str(tmp_path / "s.jsonl"), "--gpu", "h200", "-o", str(tmp_path / "out.json"))
    assert ran.code == 2
    assert "no usable samples" in ran.err
    assert "latent attention" in ran.err


@pytest.fixture
def given(tmp_path: Path) -> str:
    """A file of the calibration of 16 heads in bf16 and fp8."""
    path = tmp_path / "latent.json"
    path.write_text(json.dumps(document("bfloat16", "fp8")))
    return str(path)


ITL = ("itl", "--gpu", "h200", "--ctx", "8k", "--batch", "32", "--kv-cache-dtype", "fp8")


def test_itl_streams_latents_at_what_a_given_calibration_says(given: str) -> None:
    """32 sequences, 61 layers: bytes at 0.95 of 4.8 TB/s beside products of 16 heads at 0.2 of 989.4 TFLOP/s."""
    products = 16 * 2176 / (0.2 * 989.4e12)
    for kv_dtype, row_bytes in (("bf16", 1152), ("fp8", 576)):
        plan = kvplan.itl(model="deepseek-v3", gpu="h200", tp_size=8, context_tokens="8k", batch_size=32,
                          kv_cache_dtype=kv_dtype, calibration=given)  # fmt: skip
        slope = 32 * 61 * np.hypot(row_bytes / (0.95 * 4.8e12), products)
        assert plan.slope_s_per_token == pytest.approx(slope, rel=0.03)
        assert "KV as calibration test (kvplan 1, 18 samples, 2026-11-24, given)" in plan.facts.source_detail
        assert any("of kvplan kernels: vllm reaches it with kernels as good" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("model", "tp", "words"),
    [
        ("8b", "1", "kind must be 'attention', not mla_decode"),
        ("deepseek-v3", "4", "of 16 query heads a rank, here are 32"),
        ("deepseek-v3.2", "8", "no calibration is of sparse or compressed latent attention"),
    ],
)
def test_a_calibration_of_other_attention_is_refused(
    kvplan_cli: Cli, given: str, model: str, tp: str, words: str
) -> None:
    ran = kvplan_cli(*ITL, "--model", model, "--tp", tp, "--calibration", given)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err
    report = kvplan_cli("report", *ITL[1:5], "--model", model, "--tp", tp, "--calibration", given)
    assert report.code == 2
    assert words in report.err


def test_a_calibration_without_16_bits_is_refused(kvplan_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(document("fp8")))
    ran = kvplan_cli(*ITL, "--model", "deepseek-v3", "--tp", "8", "--calibration", str(tmp_path / "x.json"))
    assert ran.code == 2
    assert "no samples in bf16" in ran.err


def test_a_calibration_of_plain_attention_is_not_taken_for_latent(kvplan_cli: Cli) -> None:
    path = profiles.ROOT / "calibrations" / "attention-h200-vllm.json"
    ran = kvplan_cli(*ITL, "--model", "deepseek-v3", "--tp", "8", "--calibration", str(path))
    assert ran.code == 2
    assert "kind must be 'mla_decode', not attention" in ran.err
