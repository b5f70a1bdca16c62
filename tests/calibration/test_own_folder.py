"""The user's folder of calibrations: a file without an engine is named where it is used, and no file is passed over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Ran

from kvplan import profiles
from kvplan.calibration import store
from kvplan.calibration.schema import KIND, OTHER_KINDS
from kvplan.latency.kv import attention_calibration, kv_speed
from kvplan.latency.parameters import PROFILE
from kvplan.latency.serve import serve

ITL = ("itl", "--model", "8b", "--gpu", "h200", "--ctx", "8k", "--batch", "32", "--kv-cache-dtype", "fp8", "--json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, empty, and nothing remembered from before or for after."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    found = store.user_folder()
    found.mkdir(parents=True)
    remembered = (attention_calibration, kv_speed, serve)
    for function in remembered:
        function.cache_clear()
    yield found
    for function in remembered:
        function.cache_clear()


def without_engine(path: Path) -> Path:
    """H200 samples of TensorRT-LLM's kernels would do as well: the file does not say whose they are."""
    document = dict(profiles.load("calibrations", "attention-h200-vllm")) | {"name": path.stem, "engine": None}
    path.write_text(json.dumps(document))
    return path


def test_a_file_without_an_engine_says_what_it_stands_in_place_of(folder: Path, kvplan_cli: Callable[..., Ran]):
    without_engine(folder / "mine.json")
    found = kvplan_cli(*ITL).json
    assert found["notes"] == [
        "calibration mine of your own folder names no engine: it is taken for vllm's in place of attention-h200-vllm, "
        "which ships"
    ]
    assert "calibration mine (an unnamed engine" in found["slope_ratio_detail"]
    other = kvplan_cli(*ITL, "--engine", "trtllm").json
    assert "it is taken for tensorrt-llm's though it may be of other kernels" in " ".join(other["notes"])


def test_a_given_file_without_an_engine_is_named_in_the_source(tmp_path: Path, kvplan_cli: Callable[..., Ran]):
    found = kvplan_cli(*ITL, "--calibration", str(without_engine(tmp_path / "mine.json"))).json
    assert "KV as calibration mine (an unnamed engine" in found["source_detail"]
    assert found["notes"] == [
        "the calibration given names no engine: it is taken for vllm's in place of attention-h200-vllm, which ships"
    ]


def of_day(folder: Path, name: str, date: str, **fields: object) -> None:
    document = dict(profiles.load("calibrations", "attention-h200-vllm")) | {"name": name, "date": date} | fields
    (folder / f"{name}.json").write_text(json.dumps(document))


def test_of_two_files_the_newest_is_used_and_named(folder: Path, kvplan_cli: Callable[..., Ran]):
    of_day(folder, "a-spring", "2026-03")
    of_day(folder, "b-autumn", "2026-10-30")
    found = kvplan_cli(*ITL).json
    assert found["notes"] == [
        "calibration b-autumn of your own folder is used (the newest, 2026-10-30), not a-spring: --calibration FILE "
        "takes another"
    ]
    assert "calibration b-autumn (" in found["slope_ratio_detail"]
    given = kvplan_cli(*ITL, "--calibration", str(folder / "a-spring.json")).json
    assert given["notes"] == [] and "calibration a-spring (" in given["slope_ratio_detail"]


def test_a_file_that_names_the_engine_comes_before_a_newer_one_that_does_not(folder: Path, kvplan_cli):
    of_day(folder, "a", "2026-10-30", engine=None)
    of_day(folder, "b", "2026-03-01")
    (note,) = kvplan_cli(*ITL).json["notes"]
    assert note.startswith("calibration b of your own folder is used (it names the engine), not a:")


@pytest.mark.parametrize("dates", [("2026-10-30", "2026-10-30"), ("lately", "lately")])
def test_of_one_date_the_first_by_name_is_used_and_named(folder: Path, kvplan_cli, dates: tuple[str, str]):
    of_day(folder, "a", dates[0])
    of_day(folder, "b", dates[1])
    (note,) = kvplan_cli(*ITL).json["notes"]
    assert note.startswith(
        "calibration a of your own folder is used (the first by name: their dates are alike), not b:"
    )


def test_the_report_rests_on_the_file_that_is_used(folder: Path, kvplan_cli: Callable[..., Ran], tmp_path: Path):
    of_day(folder, "a-spring", "2026-03-01")
    of_day(folder, "b-autumn", "2026-10-30")
    words = ("report", "--model", "8b", "--gpu", "h200", "--ctx", "8k", "-o", str(tmp_path / "report.json"))
    assert kvplan_cli(*words).code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [f["name"] for f in report["fingerprints"] if f["kind"] == "calibration"] == ["serving", "b-autumn"]


def test_the_shipped_calibration_needs_no_note(folder: Path, kvplan_cli: Callable[..., Ran]):
    assert kvplan_cli(*ITL).json["notes"] == []


@pytest.mark.parametrize("content", ['{"x": 1}', '{"kind": "attention"', '{"kind": "attention", "gpu": 3}', "[]"])
def test_a_file_that_is_no_calibration_is_reported(folder: Path, kvplan_cli: Callable[..., Ran], content: str):
    (folder / "x.json").write_text(content)
    for words in (ITL, ("profiles",)):
        ran = kvplan_cli(*words)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert str(folder / "x.json") in ran.err


def test_serving_is_explained_as_the_others_are(kvplan_cli: Callable[..., Ran]):
    out = kvplan_cli("profiles", "show", "serving").out
    data = kvplan_cli("profiles", "show", "serving", "--json").json
    assert not out.startswith("{") and f"fitted on {data['num_rows']:,} measurements" in out
    for word in ("h200 tensorrt-llm", "collective_s", "unseen_moe", "valid for"):
        assert word in " ".join(out.split())
    (row,) = (row for row in kvplan_cli("profiles", "--json").json["calibrations"] if row["name"] == "serving")
    assert row["num_samples"] == data["num_rows"]


@pytest.mark.parametrize(
    "broken", [{"offsets": {"gpu": 3}}, {"offsets": {"gpu": {"h200": 3}}}, {"gpu_engines": {"h200|vllm": "many"}}]
)
def test_a_broken_file_of_serving_is_one_line(tmp_path: Path, kvplan_cli: Callable[..., Ran], broken: dict):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dict(profiles.load("calibrations", "serving")) | broken))
    ran = kvplan_cli("profiles", "show", str(path))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1) and str(path) in ran.err


def test_every_kind_of_calibration_is_known_to_the_folder():
    assert set(store.KINDS) == {KIND, *OTHER_KINDS, PROFILE}
    assert {found.data["kind"] for found in store.every()} == set(store.KINDS)
