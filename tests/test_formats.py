"""What is said of each KV format follows from the rule sets, the calibrations and the measurements that ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kvplan
from kvplan.calibration import store
from kvplan.errors import UnsupportedError
from kvplan.formats import FormatFacts, format_facts
from kvplan.gpu import gpu_names
from kvplan.measure.shipped import measured_slopes


@pytest.fixture(scope="module")
def facts() -> dict[str, FormatFacts]:
    return {fact.name: fact for fact in format_facts()}


def test_a_gpu_is_named_exactly_where_a_plan_on_it_is_not_refused(facts: dict[str, FormatFacts]) -> None:
    for name in ("fp8_per_token_head", "nvfp4", "int8_per_token_head"):
        taken = facts[name].engines["vllm"]
        assert taken is not None
        for gpu in gpu_names():
            try:
                kvplan.size(model="llama-3.1-8b", gpu=gpu, context_tokens=4096, kv_cache_dtype=name, compare=False)
                planned = True
            except UnsupportedError:
                planned = False
            assert planned == (gpu in taken), (name, gpu)


def test_engines_whose_rules_do_not_tell_gpus_apart_say_none(facts: dict[str, FormatFacts]) -> None:
    assert facts["fp8"].engines["sglang"] is None
    assert "sglang" not in facts["fp8_per_token_head"].engines
    assert set(facts["fp32"].engines) == {"generic"}
    assert facts["nvfp4"].engines["vllm"] == ("b200", "b300", "gb200", "gb300")


def test_bytes_scales_and_gain_are_those_of_one_token_and_head(facts: dict[str, FormatFacts]) -> None:
    """2 × 128 values of one byte and two FP32 scales: 264 bytes against 512."""
    fact = facts["fp8_per_token_head"]
    assert (fact.bytes_per_element, fact.bytes_per_token_head, fact.scale_bytes) == (1.0, 264, 8)
    assert fact.gain == 512 / 264
    assert facts["nvfp4_ds_mla"].gain is None


def test_measured_slopes_are_those_of_the_records_and_at_or_above_their_floor_but_for_noise() -> None:
    slopes = measured_slopes()
    assert slopes["bfloat16"].ratio == 1
    assert slopes["fp8"].ratio == pytest.approx(0.505, abs=0.001)  # docs/measured.md, batch 32
    assert all(slope.ratio > 0.98 * slope.floor and slope.device == "NVIDIA H200" for slope in slopes.values())


def test_what_a_cpu_measured_is_no_slope_of_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipped = next(found.data for found in store.every() if found.name == "attention-h200-vllm")
    folder = tmp_path / "kvplan" / "calibrations"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for gpu in ("cpu-amd-epyc", "h200"):
        (folder / f"{gpu}-here.json").write_text(json.dumps({**shipped, "gpu": gpu}))
    listed = {s.source for fact in format_facts() for s in fact.engine_slopes if "measured here" in s.source}
    assert listed == {"calibration h200-here (measured here)"}


def test_engine_slopes_come_from_calibrations_and_name_them(facts: dict[str, FormatFacts]) -> None:
    """FlashAttention-3 in vLLM on an H200 saves less than half: 2.96 TB/s against 4.26 in 16 bits."""
    slope = next(s for s in facts["fp8_e4m3"].engine_slopes if (s.gpu, s.engine) == ("h200", "vllm"))
    assert slope.ratio == pytest.approx(0.72, abs=0.02)
    assert slope.source.startswith("calibration attention-h200-vllm")
