"""From samples to a calibration: refusals, robustness, files, the command line, and the schema of what is written."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from kvplan import profiles
from kvplan.calibration import calibrate, priors, store
from kvplan.calibration.attention import find_attention
from kvplan.calibration.attention_fit import learn_dispatch
from kvplan.calibration.attention_model import NAMES
from kvplan.calibration.geometry import Dispatch
from kvplan.calibration.schema import OTHER_KINDS, attention_from_json, check_other
from kvplan.errors import InputError, ProfileError
from kvplan.gpu import load_gpu
from kvplan.units import format_bytes_per_s

COLUMNS = ["batch_size", "context_tokens", "num_q_heads", "num_kv_heads", "head_dim", "window_tokens", "kv_dtype",
           "latency_s"]  # fmt: skip
GRID = [(b, c) for b in (1, 4, 16, 64, 128, 256) for c in (1024, 4096, 16384, 32768, 65536) if b * c <= 2**22]


def truth(b: int, c: int, dtype: str = "bf16") -> float:
    """A kernel kvplan does not know: 9 µs, and KV at 85% of an H200's 4.8 TB/s."""
    kv = b * c * 8 * 256 * (2 if dtype == "bf16" else 1)
    return 9e-6 + kv / (0.85 * 4.8e12)


def row(b: int, c: int, dtype: str = "bf16", factor: float = 1.0) -> list[object]:
    return [b, c, 64, 8, 128, 0, dtype, truth(b, c, dtype) * factor]


def write(path: Path, rows: list[list[object]], header: list[str] | None = None) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header or COLUMNS, *rows])
    return path


def fit(path: Path):
    return calibrate.calibrate_file(path, load_gpu("h200"), name="here")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_straight_line_is_found_again(tmp_path):
    document, _ = fit(write(tmp_path / "s.csv", [row(b, c) for b, c in GRID]))
    entry = document["kv_dtypes"]["bfloat16"]
    assert entry["effective_bandwidth_bytes_per_s"] == pytest.approx(0.85 * 4.8e12, rel=0.05)
    calibration = attention_from_json(document, "test")
    for b, c in ((32, 32768), (8, 131072), (96, 10000)):
        assert calibration.latency_s(b, c, 64, 8, 128) == pytest.approx(truth(b, c), rel=0.03)


def test_wrong_samples_hardly_move_large_predictions(tmp_path):
    """10% of samples multiplied by 0.3 to 3: predictions of large KV move by at most 3%."""
    clean, _ = fit(write(tmp_path / "clean.csv", [row(b, c) for b, c in GRID]))
    factors = {3: 3.0, 10: 0.6, 20: 1.9}
    wrong, _ = fit(
        write(tmp_path / "wrong.csv", [row(b, c, factor=factors.get(i, 1)) for i, (b, c) in enumerate(GRID)])
    )
    contexts = np.array([8192, 32768, 131072])
    before, after = (attention_from_json(d, "test").latency_s(64, contexts, 64, 8, 128) for d in (clean, wrong))
    assert np.abs(after / before - 1).max() < 0.03


def test_samples_faster_than_peak_are_refused_by_line(tmp_path):
    # 256 × 16,384 tokens × 4 KiB = 17 GB: at 4.8 TB/s no less than 3.6 ms
    rows = [row(b, c) for b, c in GRID] + [[256, 16384, 64, 8, 128, 0, "bf16", 1e-3]]
    document, points = fit(write(tmp_path / "s.csv", rows))
    (refused,) = points.refused
    assert refused.line == len(rows) + 1
    assert "17.18 TB/s against a peak of 4.80" in refused.reason
    assert document["refused"] == [{"line": refused.line, "reason": refused.reason}]


def test_values_of_192_wide_heads_count_as_128(tmp_path):
    """192-wide keys with 128-wide values at 0.9 of peak; counted as 2 × 192 they would be 8% above it."""
    kv = 64 * 32768 * 8 * 640
    rows = [[64, 32768, 64, 8, 192, 0, "bf16", kv / (0.9 * 4.8e12)]] + [row(b, c) for b, c in GRID]
    assert fit(write(tmp_path / "s.csv", rows))[1].refused == []


def test_fast_samples_from_l2_are_kept(tmp_path):
    rows = [row(b, c) for b, c in GRID] + [[8, 512, 64, 8, 128, 0, "bf16", 3e-6]]  # 16.8 MB of a 63 MB L2
    assert fit(write(tmp_path / "s.csv", rows))[1].refused == []


def test_fewer_than_eight_samples_say_what_to_measure_next(tmp_path):
    with pytest.raises(InputError) as raised:
        fit(write(tmp_path / "s.csv", [row(b, c) for b, c in GRID[:7]]))
    assert "7 usable samples of bfloat16" in raised.value.message
    assert "measure next: batch" in raised.value.hint
    with pytest.raises(InputError, match="3 usable samples of fp8"):
        fit(write(tmp_path / "t.csv", [row(b, c) for b, c in GRID] + [row(b, c, "fp8") for b, c in GRID[:3]]))


def test_what_to_measure_next_is_near_what_was_measured(tmp_path):
    """Of a slow device: up to 4 times the dearest of its samples, 2 × 128 tokens, and none of them again."""
    seen = [(b, c) for b in (1, 2) for c in (32, 64, 128)]
    with pytest.raises(InputError) as raised:
        fit(write(tmp_path / "s.csv", [[b, c, 64, 8, 128, 0, "bf16", 1e-3] for b, c in seen]))
    hint = raised.value.hint
    named = [(int(b), int(c.replace(",", ""))) for b, c in re.findall(r"batch (\d+) × ([\d,]+) tokens", hint)]
    assert hint.startswith("measure next: ") and len(named) == 2 and not set(named) & set(seen)
    assert all(b <= 8 and c <= 512 and b * c <= 4 * 2 * 128 for b, c in named)


def test_a_bandwidth_takes_the_unit_that_shows_its_digits():
    rates = (4.62e12, 1e11, 9.9e10, 1e8, 9.9e7, 1e3)
    assert [format_bytes_per_s(rate) for rate in rates] == [
        "4.62 TB/s", "0.10 TB/s", "99.00 GB/s", "0.10 GB/s", "99.00 MB/s", "0.00 MB/s",
    ]  # fmt: skip


def test_a_slow_device_is_shown_in_gigabytes_a_second(tmp_path, kvplan_cli):
    """A CPU: KV, and what its cache holds, at 20 and 60 GB/s."""
    document, _ = fit(write(tmp_path / "s.csv", [row(b, c) for b, c in GRID]))
    document["kv_dtypes"]["bfloat16"] |= {
        "effective_bandwidth_bytes_per_s": 2e10, "l2_bandwidth_bytes_per_s": 6e10,
    }  # fmt: skip
    (tmp_path / "slow.json").write_text(json.dumps(document))
    shown = kvplan_cli("profiles", "show", str(tmp_path / "slow.json"), width=120).out
    line = next(line for line in shown.splitlines() if line.startswith("bfloat16 "))
    assert "20.00 GB/s" in line and "60.00 GB/s" in line and "TB/s" not in line


def test_corrupt_lines_are_set_aside_and_named(tmp_path):
    path = write(tmp_path / "s.csv", [row(b, c) for b, c in GRID])
    with path.open("a", encoding="utf-8") as file:
        file.write("1,2,3\n64,nan,64,8,128,0,bf16,1e-3\n64,1024,64,8,128,0,bf16,-1\n64,1024,4,8,128,0,bf16,1e-4\n"
                   "64,1024,64,8,128,0,klingon,1e-4\n64,1024,64,8,128,0,bf16,inf\n")  # fmt: skip
    _, points = fit(path)
    assert len(points) == len(GRID)
    reasons = [item.reason for item in points.refused]
    assert [item.line for item in points.refused] == list(range(len(GRID) + 2, len(GRID) + 8))
    for word, reason in zip(("cells", "context_tokens", "latency_s", "query heads", "klingon", "latency_s"), reasons,
                            strict=True):  # fmt: skip
        assert word in reason


def test_jsonl_with_extra_keys_reads_like_csv(tmp_path):
    table = write(tmp_path / "s.csv", [row(b, c, "fp8") for b, c in GRID])
    lines = [json.dumps(dict(zip(COLUMNS, row(b, c, "fp8"), strict=True)) | {"gpu": "x", "more": [1]}) for b, c in GRID]
    (tmp_path / "s.jsonl").write_text("\n".join([*lines, "{broken", ""]), encoding="utf-8")
    document, points = fit(tmp_path / "s.jsonl")
    assert document["kv_dtypes"] == fit(table)[0]["kv_dtypes"]
    assert str(points.refused[0]) == f"line {len(GRID) + 1}: not a JSON object"


def test_scale_granularity_makes_it_per_token_head(tmp_path):
    rows = [[*row(b, c, "fp8"), "token_head"] for b, c in GRID]
    document, _ = fit(write(tmp_path / "s.csv", rows, [*COLUMNS, "scale_granularity"]))
    assert list(document["kv_dtypes"]) == ["fp8_per_token_head"]


def test_shapes_that_name_another_kernel_get_parameters_of_their_own(tmp_path):
    """Heads of 64 run on a kernel that takes three times as long a byte; the other heads' predictions do not move."""
    slow = [[b, c, 64, 8, 64, 0, "bf16", 9e-6 + 3 * b * c * 8 * 256 / (0.85 * 4.8e12), "slow"] for b, c in GRID]
    rows = [[*row(b, c), "fast"] for b, c in GRID] + slow
    document, points = fit(write(tmp_path / "s.csv", rows, [*COLUMNS, "kernel_source"]))
    assert learn_dispatch(points) == Dispatch(((64, False, None),))
    assert document["other_kernel"]["shapes"][0] == {"head_dim": 64, "windowed": False, "q_heads_per_kv_head": None}
    assert document["kv_dtypes"]["bfloat16"]["other_kernel"]["num_samples"] == len(GRID)
    calibration = attention_from_json(document, "test")
    for b, c in ((32, 32768), (8, 131072)):
        assert calibration.latency_s(b, c, 64, 8, 128) == pytest.approx(truth(b, c), rel=0.05)
        want = 9e-6 + 3 * b * c * 8 * 256 / (0.85 * 4.8e12)
        assert calibration.latency_s(b, c, 64, 8, 64) == pytest.approx(want, rel=0.05)


@pytest.fixture
def samples(tmp_path) -> Path:
    return write(tmp_path / "s.csv", [row(b, c) for b, c in GRID])


def test_the_command_writes_predictions_in_input_order(samples, tmp_path, kvplan_cli):
    cases = write(tmp_path / "cases.csv", [row(b, c, d) for b, c in reversed(GRID) for d in ("bf16", "fp8")])
    out, calibration = tmp_path / "new" / "out.csv", tmp_path / "new" / "er" / "c.json"  # folders are made
    ran = kvplan_cli("calibrate", str(samples), "--gpu", "h200", "-o", str(calibration), "--evaluate", str(cases),
                     "--predictions", str(out), width=120)  # fmt: skip
    assert ran.code == 0, ran.err
    assert "context ≥ 1k and KV ≥ 64 MB" in ran.out
    rows = read(out)
    assert list(rows[0]) == [*COLUMNS, "predicted_s", "low_s", "high_s"]
    assert [(r["batch_size"], r["context_tokens"]) for r in rows[::2]] == [(str(b), str(c)) for b, c in reversed(GRID)]
    for r in rows:
        assert float(r["low_s"]) < float(r["predicted_s"]) < float(r["high_s"])
    wide = [float(r["high_s"]) / float(r["low_s"]) for r in rows]
    assert all(assumed > own for own, assumed in zip(wide[::2], wide[1::2], strict=True))
    assert attention_from_json(json.loads(calibration.read_text()), "file").dtypes.keys() == {"bfloat16"}


def test_cases_without_latency_are_predicted_and_broken_ones_left_empty(samples, tmp_path, kvplan_cli):
    rows = [[64, 1024, 64, 8, 128, 0, "bf16"], [64, "?", 64, 8, 128, 0, "bf16"]]
    cases = write(tmp_path / "cases.csv", rows, COLUMNS[:-1])
    out = tmp_path / "out.csv"
    words = ["--gpu", "h200", "-o", str(tmp_path / "c.json"), "--evaluate", str(cases), "--predictions", str(out)]
    ran = kvplan_cli("calibrate", str(samples), *words)
    assert ran.code == 0, ran.err
    assert "1 cases could not be read" in ran.out
    first, second = read(out)
    assert float(first["predicted_s"]) > 0 and second["predicted_s"] == ""


def test_an_existing_file_is_overwritten_only_with_force(samples, tmp_path, kvplan_cli):
    target = tmp_path / "c.json"
    target.write_text("mine")
    words = ["calibrate", str(samples), "--gpu", "h200", "-o", str(target)]
    assert (kvplan_cli(*words).code, target.read_text()) == (2, "mine")
    assert kvplan_cli(*words, "--force").code == 0
    assert json.loads(target.read_text())["kind"] == "attention"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "s.csv"]


@pytest.mark.parametrize(("words", "message"), [
    (["--gpu", "h299"], "unknown GPU"),
    (["--gpu", "h200", "--predictions", "p.csv"], "needs cases"),
])  # fmt: skip
def test_bad_requests_are_one_line_and_exit_2(samples, tmp_path, kvplan_cli, words, message):
    ran = kvplan_cli("calibrate", str(samples), "-o", str(tmp_path / "c.json"), *words)
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "\x1f\x8b broken", "{}\n", "batch_size\n"])
def test_files_that_are_not_samples_are_one_line_and_exit_2(tmp_path, kvplan_cli, content):
    path = tmp_path / "s.csv"
    path.write_bytes(content.encode("latin-1"))
    ran = kvplan_cli("calibrate", str(path), "--gpu", "h200", "-o", str(tmp_path / "c.json"))
    assert ran.code == 2 and ran.err.startswith("error: ") and not (tmp_path / "c.json").exists()


def good() -> dict:
    return json.loads((priors.profiles.ROOT / "calibrations" / "attention-h200-vllm.json").read_text(encoding="utf-8"))


def put(path: str, value: object):
    document = good()
    *parents, last = path.split("/")
    place = document
    for key in parents:
        place = place[key]
    place[last] = value
    return document


@pytest.mark.parametrize(("path", "value"), [
    ("schema_version", 1), ("schema_version", True), ("kind", "gemm"), ("gpu", ""), ("date", 3), ("engine", 3),
    ("hardware/memory_bandwidth_bytes_per_s", -1.0), ("hardware/num_sms", "many"), ("kv_dtypes", {}),
    ("kv_dtypes/bfloat16/parameters/launch_s/value", float("nan")),
    ("kv_dtypes/bfloat16/parameters/launch_s/value", -1e-6),
    ("kv_dtypes/bfloat16/parameters/bandwidth_fraction/value", 17.0),
    ("kv_dtypes/bfloat16/parameters/launch_s", None), ("kv_dtypes/bfloat16/intercept_s", -1.0),
    ("kv_dtypes/bfloat16/effective_bandwidth_bytes_per_s", float("inf")), ("kv_dtypes/bfloat16/num_samples", -3),
    ("kv_dtypes/bfloat16/half_width_log/memory", 1e9), ("valid_range/batch_size", [5, 1]),
    ("kv_dtypes/bfloat16/covariance_log", [[1.0]]), ("other_kernel", "none"),
    ("other_kernel/rule", ["x"]), ("other_kernel/shapes", [{"head_dim": "wide"}]), ("other_kernel/shapes", None),
])  # fmt: skip
def test_a_broken_calibration_file_names_the_field(path, value):
    with pytest.raises(ProfileError) as raised:
        attention_from_json(put(path, value), "x.json")
    assert path.split("/")[-1] in raised.value.message and raised.value.exit_code == 2


def test_every_shipped_calibration_is_valid_and_says_where_it_comes_from():
    calibrations = priors.shipped()
    assert len(calibrations) == 8
    for calibration in calibrations:
        load_gpu(calibration.gpu)
        assert calibration.engine_version and calibration.date
        document = store.profiles.load("calibrations", calibration.name)
        assert document["name"] == calibration.name
        assert document["sources"][0]["license"] == "Apache-2.0"
        assert all(list(entry["parameters"]) == list(NAMES) for entry in document["kv_dtypes"].values())


@pytest.mark.parametrize(
    ("options", "twice"),
    [
        ("-o s.csv", "s.csv"),
        ("-o fit.json --evaluate cases.csv --predictions cases.csv", "cases.csv"),
        ("-o fit.json --evaluate s.csv --predictions fit.json", "fit.json"),
        ("-o link.json", "link.json"),
    ],
)
def test_what_is_written_is_not_what_is_read(tmp_path, monkeypatch, kvplan_cli, options: str, twice: str):
    monkeypatch.chdir(tmp_path)
    for name in ("s.csv", "cases.csv"):
        write(tmp_path / name, [row(b, c) for b, c in GRID])
    (tmp_path / "link.json").symlink_to("s.csv")
    before = (tmp_path / "s.csv").read_bytes()
    ran = kvplan_cli("calibrate", "s.csv", "--gpu", "h200", "--force", *options.split())
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"{twice} is named twice" in ran.err
    assert (tmp_path / "s.csv").read_bytes() == before and not (tmp_path / "fit.json").exists()


def test_a_calibration_measured_here_comes_first(samples, tmp_path, monkeypatch, kvplan_cli):
    home = tmp_path / "config"
    (home / "kvplan" / "calibrations").mkdir(parents=True)
    target = home / "kvplan" / "calibrations" / "mine.json"
    env = {"XDG_CONFIG_HOME": str(home)}
    words = ["calibrate", str(samples), "--gpu", "h200", "--engine", "vllm", "-o", str(target)]
    assert kvplan_cli(*words, env=env).code == 0
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    found = find_attention("H200-SXM", "vllm")
    assert found is not None and found.name == "mine" and "measured here" in found.source
    listed = kvplan_cli("profiles", width=120)
    assert listed.code == 0 and "measured here" in listed.out and "GPUs" in listed.out
    target.write_text("{")
    with pytest.raises(ProfileError):
        find_attention("h200", "vllm")
    assert kvplan_cli("profiles").code == 2


def test_profiles_show_explains_one_and_suggests_names(kvplan_cli):
    ran = kvplan_cli("profiles", "show", "attention-h200-vllm", width=120)
    assert ran.code == 0
    for word in ("vllm 0.22.0", "63,000 samples", "Apache-2.0", "bandwidth_fraction", "valid for"):
        assert word in ran.out
    assert json.loads(kvplan_cli("profiles", "show", "attention-h200-vllm", "--json").out)["gpu"] == "h200"
    ran = kvplan_cli("profiles", "show", "attention-h200-vlm")
    assert ran.code == 2 and "attention-h200-vllm" in ran.err


def test_profiles_lists_whole_names_at_80_columns(kvplan_cli):
    lines = kvplan_cli("profiles").out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines[2:-1]]
    assert listed == [found.name for found in store.every()]


def test_profiles_show_takes_a_file(kvplan_cli, tmp_path):
    path = tmp_path / "mine.json"
    found = next(found for found in store.every() if found.data.get("kind") == "attention")
    path.write_text(json.dumps(found.data))
    ran = kvplan_cli("profiles", "show", str(path))
    assert ran.code == 0 and "(given)" in ran.out
    path.write_text("{}")
    ran = kvplan_cli("profiles", "show", str(path))
    assert (ran.code, ran.out) == (2, "") and str(path) in ran.err


def test_calibrations_of_other_kernels_are_valid_and_explained(kvplan_cli):
    others = [found for found in store.every() if found.data.get("kind") in OTHER_KINDS]
    assert {found.data["kind"] for found in others} == set(OTHER_KINDS)
    for found in others:
        check_other(found.data, found.where)
    ran = kvplan_cli("profiles", "show", "all-reduce-h200-vllm", width=120)
    assert ran.code == 0 and "vLLM_custom_graph/8" in ran.out and "Apache-2.0" in ran.out
    broken = json.loads(json.dumps(others[0].data))
    next(iter(broken["entries"].values()))["parameters"]["launch_s"]["value"] = -1.0
    with pytest.raises(ProfileError, match="launch_s"):
        check_other(broken, "x")


def test_samples_that_name_another_gpu_are_refused() -> None:
    """The H200's own records as those of an H100."""
    records = profiles.ROOT / "measurements" / "h200-measure-2026-11-24.jsonl"
    with pytest.raises(InputError, match="taken on h200, not on h100-sxm") as refused:
        calibrate.calibrate_file(records, load_gpu("h100-sxm"), name="x")
    assert refused.value.hint == "--gpu h200"
