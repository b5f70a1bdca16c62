"""What ``kvplan calibrate`` refuses, and that it says why: units, columns, another device, a fit that says nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Ran

from kvplan.calibration.calibrate import calibrate_file
from kvplan.errors import InputError
from kvplan.gpu import load_gpu

SHAPE = "batch_size,context_tokens,num_q_heads,num_kv_heads,head_dim,window_tokens,kv_dtype"
LARGE = [(b, c) for b in (1, 8, 64, 256) for c in (1024, 8192, 16384)]
SMALL = [(b, c) for b in (1, 2, 4) for c in (128, 256, 512, 1024)]
Calibrate = Callable[..., Ran]


def seconds(b: int, c: int) -> float:
    """9 µs, and bf16 KV at 85% of an H200's 4.8 TB/s."""
    return 9e-6 + b * c * 8 * 128 * 4 / (0.85 * 4.8e12)


@pytest.fixture
def calibrated(tmp_path: Path, kvplan_cli: Callable[..., Ran]) -> Calibrate:
    """Run ``kvplan calibrate`` on such samples; nothing is written unless it exits 0."""

    def run(factor: float = 1.0, header: str = "latency_s", gpu: str = "h200", points: list[tuple[int, int]] = LARGE,
            dtype: str = "bf16") -> Ran:  # fmt: skip
        lines = [f"{b},{c},64,8,128,0,{dtype},{seconds(b, c) * factor}" for b, c in points]
        path, out = tmp_path / "s.csv", tmp_path / "c.json"
        path.write_text("\n".join([f"{SHAPE},{header}", *lines]))
        ran = kvplan_cli("calibrate", str(path), "--gpu", gpu, "-o", str(out), width=120)
        assert out.exists() == (ran.code == 0)
        return ran

    return run


@pytest.mark.parametrize("points", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("factor", [1e3, 1e6], ids=["milliseconds", "microseconds"])
def test_other_units_than_seconds_are_refused(calibrated: Calibrate, points: list[tuple[int, int]], factor: float):
    ran = calibrated(factor, points=points)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert "no kernel is so slow" in ran.err and "divide milliseconds by 1,000" in ran.err


def test_cases_in_other_units_are_not_passed_over(tmp_path: Path, kvplan_cli: Callable[..., Ran]):
    """Predictions of 1/1000 of what the cases say are 99.9% off."""
    for name, factor in (("samples.csv", 1.0), ("cases.csv", 1e3)):
        lines = [f"{b},{c},64,8,128,0,bf16,{seconds(b, c) * factor}" for b, c in LARGE]
        (tmp_path / name).write_text("\n".join([f"{SHAPE},latency_s", *lines]))
    words = [str(tmp_path / "samples.csv"), "--gpu", "h200", "-o", str(tmp_path / "c.json")]
    ran = kvplan_cli("calibrate", *words, "--evaluate", str(tmp_path / "cases.csv"))
    assert ran.code == 0 and "off by 99.9% or more: other kernels, or other units?" in ran.out
    assert "other units" not in kvplan_cli("calibrate", *words, "--force", "--evaluate", words[0]).out


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_slow_kernels_are_calibrated(calibrated: Calibrate, factor: float):
    """10 times as slow is 0.85 / 10 = 8.5% of the bandwidth, above the 2% that is refused."""
    assert calibrated(factor).code == 0


def test_a_fit_that_misses_its_own_samples_is_refused(tmp_path: Path):
    lines = [f"{b},{c},64,8,128,0,bf16,{seconds(b, c) * (1, 300)[i % 2]}" for i, (b, c) in enumerate(LARGE)]
    (tmp_path / "s.csv").write_text("\n".join([f"{SHAPE},latency_s", *lines]))
    with pytest.raises(InputError, match=r"half of them are more than .*% away"):
        calibrate_file(tmp_path / "s.csv", load_gpu("h200"), name="x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"header": "latency_ms", "factor": 1e3}, "no column latency_s (divide latency_ms by 1,000 and call it"),
        ({"header": "time_us", "factor": 1e6}, "no column latency_s (divide time_us by 1,000,000"),
        ({"header": "seconds"}, "no column latency_s (columns: batch_size"),
        ({"factor": -1.0}, "refused: 12 latency_s must be a positive number of seconds (line 2: latency_s"),
        ({"gpu": "a100"}, "faster than a100-80gb-sxm can be"),
        ({"factor": 1e-3}, "faster than h200 can be"),
        ({"dtype": "fp9"}, "refused: 12 unknown"),
    ],
    ids=["ms", "us", "no column", "negative", "other GPU", "too fast", "dtype"],
)  # fmt: skip
def test_a_file_without_usable_samples_says_why(calibrated: Calibrate, words: dict, said: str):
    ran = calibrated(**words)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert said in ran.err and "measure next" not in ran.err


def test_jsonl_without_latency_s_is_missing_a_column_too(tmp_path: Path):
    record = dict(zip(SHAPE.split(","), (8, 8192, 64, 8, 128, 0, "bf16"), strict=True)) | {"latency_ms": 0.1}
    (tmp_path / "s.jsonl").write_text("\n".join([json.dumps(record)] * 9))
    with pytest.raises(InputError, match="no column latency_s") as refused:
        calibrate_file(tmp_path / "s.jsonl", load_gpu("h200"), name="x")
    assert refused.value.hint is not None and "divide latency_ms by 1,000" in refused.value.hint


def test_one_sample_is_one_sample(calibrated: Calibrate):
    assert "error: 1 usable sample of bfloat16" in calibrated(points=LARGE[:1]).err


def test_samples_of_a_device_without_a_profile_are_not_sent_to_one(tmp_path: Path):
    """``--gpu cpu-amd-epyc`` would be an unknown GPU."""
    record = dict(zip(SHAPE.split(","), (8, 8192, 64, 8, 128, 0, "bf16"), strict=True))
    record |= {"latency_s": 1e-3, "environment": {"gpu": "cpu-amd-epyc"}}
    (tmp_path / "s.jsonl").write_text("\n".join([json.dumps(record)] * 9))
    with pytest.raises(InputError, match="taken on cpu-amd-epyc, not on h200") as refused:
        calibrate_file(tmp_path / "s.jsonl", load_gpu("h200"), name="x")
    assert refused.value.hint == "no profile is of it; samples of h200 come from `kvplan measure` there"


def test_a_kernel_without_samples_is_explained(tmp_path: Path, kvplan_cli: Callable[..., Ran]):
    """A prior of an engine with two kernels gives a row to the one that was not measured."""
    ran = kvplan_cli("profiles", "show", "attention-h100-sxm-tensorrt-llm", width=120)
    assert "(2) is the engine's other kernel" in ran.out and "without samples" not in ran.out
    document = json.loads(kvplan_cli("profiles", "show", "attention-h100-sxm-tensorrt-llm", "--json").out)
    for entry in document["kv_dtypes"].values():
        entry["other_kernel"] |= {"num_samples": 0, "residuals": None}
    (tmp_path / "mine.json").write_text(json.dumps(document))
    shown = " ".join(kvplan_cli("profiles", "show", str(tmp_path / "mine.json"), width=120).out.split())
    assert "without samples its figures are the prior's" in shown
