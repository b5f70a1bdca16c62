"""The sample file: one line a sample, nothing lost, nothing silently used."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kvplan.errors import InputError
from kvplan.samples import Sample, append_record, append_sample, read_samples

SAMPLE = Sample(
    batch_size=8, context_tokens=4096, num_q_heads=64, num_kv_heads=8, head_dim=128, window_tokens=0,
    kv_dtype="fp8", scale_granularity="tensor", latency_s=3.1e-5, p10_s=3.0e-5, p90_s=3.3e-5, num_replays=20,
    read_bytes=67_108_864, layers=4, layout="HND", block_size_tokens=64, seed=0, sm_clock_hz=1.98e9,
    kernel_facts={"registers": 96}, environment={"gpu": "h200"}, time="2026-01-01T00:00:00Z",
)  # fmt: skip


def test_a_sample_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    other = replace(SAMPLE, kv_dtype="bfloat16", sm_clock_hz=None)
    append_sample(path, SAMPLE)
    append_sample(path, other)
    assert read_samples(path).samples == [SAMPLE, other]
    assert read_samples(path).corrupt == []


def test_a_line_of_before_latent_attention_is_plain_attention(tmp_path: Path) -> None:
    record = asdict(SAMPLE)
    assert record.pop("latent_dim") == 0
    append_record(tmp_path / "s.jsonl", record)
    latent = replace(SAMPLE, num_kv_heads=1, head_dim=576, latent_dim=512)
    append_sample(tmp_path / "s.jsonl", latent)
    assert read_samples(tmp_path / "s.jsonl").samples == [SAMPLE, latent]


def test_a_line_has_the_keys_that_calibrate_reads(tmp_path: Path) -> None:
    from kvplan.calibration.samples import read_points, read_rows

    append_sample(tmp_path / "s.jsonl", SAMPLE)
    points = read_points(read_rows(tmp_path / "s.jsonl")[1])
    assert points.refused == []
    assert (points.kv_dtype[0], points.latency_s[0], points.columns["context_tokens"][0]) == ("fp8", 3.1e-5, 4096)
    assert points.kernel[0] == ""


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert read_samples(tmp_path / "none.jsonl").samples == []


def test_a_torn_line_is_named_and_the_next_sample_stands_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    append_sample(path, SAMPLE)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])  # killed in the middle of a write
    append_sample(path, SAMPLE)
    found = read_samples(path)
    assert found.samples == [SAMPLE, SAMPLE]
    assert [(line.line_number, line.reason) for line in found.corrupt] == [(2, "not JSON")]
    assert found.corrupt[0].text == whole[:40].decode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latency_s": -1.0}, "latency_s is -1.0"),
        ({"latency_s": None}, "latency_s is None"),
        ({"latency_s": True}, "latency_s is True"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"read_bytes": 0}, "read_bytes is 0"),
        ({"latent_dim": None}, "latent_dim is None"),
        ({"window_tokens": -1}, "window_tokens is -1"),
        ({"kv_dtype": 8}, "kv_dtype is no text"),
        ({"environment": "h200"}, "kernel_facts and environment must be objects"),
    ],
)
def test_a_line_with_an_impossible_field_is_set_aside_and_says_which(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "s.jsonl"
    append_record(path, {**asdict(SAMPLE), **change})
    append_sample(path, SAMPLE)
    found = read_samples(path)
    assert found.samples == [SAMPLE]
    assert [line.reason for line in found.corrupt] == [reason]


def test_lines_of_something_else_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    record = asdict(SAMPLE)
    del record["p90_s"]
    path.write_bytes(b"\xff\xfe\n[1, 2]\n\n{}\nNaN\n" + json.dumps(record).encode() + b"\n")
    reasons = [(line.line_number, line.reason) for line in read_samples(path).corrupt]
    assert reasons == [(1, "not JSON"), (2, "not a JSON object"), (4, "batch_size is missing"),
                       (5, "not a JSON object"), (6, "p90_s is missing")]  # fmt: skip


def test_infinity_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_sample(tmp_path / "s.jsonl", replace(SAMPLE, latency_s=float("inf")))
    assert not (tmp_path / "s.jsonl").exists()


@pytest.mark.parametrize("partly", [False, True])
def test_a_full_disk_is_one_line_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partly: bool
) -> None:
    path = tmp_path / "s.jsonl"
    append_sample(path, SAMPLE)
    really = os.write

    def full(handle: int, data: bytes) -> int:
        if partly:
            return really(handle, data[:25])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(InputError, match="No space left on device") as caught:
            append_sample(path, SAMPLE)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    append_sample(path, SAMPLE)  # room again
    assert read_samples(path).samples == [SAMPLE, SAMPLE]
    assert len(read_samples(path).corrupt) == int(partly)
