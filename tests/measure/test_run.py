"""``kvplan measure --device cpu`` end to end: every step of a run really runs, and nothing that goes wrong is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import Ran, model_folder

pytest.importorskip("torch", reason="torch is not installed (the `measure` extra brings it)")

import torch

from kvplan.calibration.attention import find_attention
from kvplan.errors import UnsupportedError
from kvplan.measure.backend import CellOutOfMemory, KernelFailure
from kvplan.measure.cpu import CpuBackend
from kvplan.measure.options import Options, resolve_request
from kvplan.samples import read_samples

Cli = Callable[..., Ran]
TINY = ("--device", "cpu", "--batch", "1,2", "--ctx", "32,64,128,256", "--num-q-heads", "4", "--num-kv-heads", "2",
        "--head-dim", "64")  # fmt: skip


@pytest.fixture
def run(kvplan_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """``kvplan measure`` in a folder of its own, with a configuration folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for a process of its own; tiny sizes are slower on many threads
    torch.set_num_threads(1)
    return lambda *words, **options: kvplan_cli("measure", *words, **options)


def one_line(ran: Ran) -> str:
    """The error, which is the last line on stderr and the only one that says so."""
    lines = [line for line in ran.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in ran.err
    return lines[0]


def test_a_run_gates_times_reports_and_calibrates(run: Cli, tmp_path: Path) -> None:
    ran = run(*TINY, "-o", "r", "--json")
    assert ran.code == 0, ran.err
    report = ran.json
    assert len(report["cells"]) == 3 * 2 * 4
    assert len(report["gates"]) == 3
    assert all(0 < gate["error"] <= gate["tolerance"] for gate in report["gates"])
    assert all(row["p10_s"] <= row["latency_s"] <= row["p90_s"] for row in report["cells"])
    assert all(row["registers"] is None and row["predicted_s"] is None for row in report["cells"])
    errors = {gate["kv_dtype"]: gate["format_error"] for gate in report["gates"]}
    assert errors["bfloat16"] < 0.01 < errors["fp8_per_token_head"] < errors["fp8"] < 0.06
    floors = {row["kv_dtype"]: row["floor"] for row in report["lines"]}
    assert floors == {"bfloat16": 1.0, "fp8": 0.5, "fp8_per_token_head": (64 + 4) / 128}
    assert {row["slope_ratio"] for row in report["lines"] if row["kv_dtype"] == "bfloat16"} <= {
        1.0,
        None,
    }  # a noisy CPU
    assert "CPU is not a GPU" in report["notes"][0]
    assert report["prediction"] is None
    assert report["within_tolerance"] is None
    assert report == json.loads((tmp_path / "r" / "report.json").read_text())
    samples = read_samples(tmp_path / "r" / "samples.jsonl").samples
    assert len(samples) == 24
    assert {"device_name", "driver", "torch", "triton", "kvplan"} < set(samples[0].environment)
    calibration = find_attention(report["environment"]["gpu"], "kvplan")
    assert calibration is not None
    assert report["calibration"]["path"].startswith(str(tmp_path / "config" / "kvplan" / "calibrations"))
    assert calibration.origin == "measured here"
    keys = {key for part in (report, report["cells"][0], report["lines"][0]) for key in part}
    assert not [key for key in keys if key.endswith(("_ms", "_us", "_gb", "_gib"))]


def test_a_finished_run_that_is_resumed_says_that_it_calibrated_before(run: Cli, tmp_path: Path) -> None:
    note = "this run has written a calibration before"
    first = run(*TINY, "-o", "r", "--json")
    assert first.json["calibration"]["path"] is not None and note not in " ".join(first.json["notes"])
    samples = (tmp_path / "r" / "samples.jsonl").read_text()
    for _ in range(2):  # the second time nothing but the first says that it did
        again = run("--resume", "r", "--no-calibrate", "--json")
        assert again.json["prediction"]["kind"] == "calibrated" and note in " ".join(again.json["notes"])
    assert note in " ".join(run("--resume", "r", "--no-calibrate").out.split())
    assert (tmp_path / "r" / "samples.jsonl").read_text() == samples


def test_a_seed_beyond_what_torch_takes_is_refused(run: Cli, tmp_path: Path) -> None:
    ran = run(*TINY, "-o", "r", "--seed", str(2**63))
    assert (ran.code, ran.out) == (2, "")
    assert one_line(ran).startswith("error: --seed 9223372036854775808 is more than ")
    assert not (tmp_path / "r").exists()
    assert run(*TINY, "--ctx", "32", "-o", "r", "--seed", str(2**63 - 1), "--no-calibrate").code == 0


def test_lines_of_peers_that_hold_no_record_are_passed_over(run: Cli, tmp_path: Path) -> None:
    first = run(*TINY, "--compare", "torch", "-o", "r", "--no-calibrate", "--json")
    assert first.json["peers"]
    with (tmp_path / "r" / "peers.jsonl").open("a", encoding="utf-8") as file:
        file.write('{}\n{"name": "x"}\n[]\n')
        file.write(json.dumps({**first.json["peers"][0], "latency_s": "x"}) + "\n")
    again = run("--resume", "r", "--no-calibrate", "--json")
    assert again.code == 0, again.err
    assert again.json["peers"] == first.json["peers"]


def test_a_calibration_that_cannot_be_noted_in_the_run_is_not_said_to_be_missing(run: Cli, tmp_path: Path) -> None:
    assert run(*TINY, "-o", "r", "--no-calibrate").code == 0
    (tmp_path / "r" / "calibrations.jsonl").mkdir()
    ran = run("--resume", "r")
    assert ran.code == 2 and "calibrations.jsonl: cannot be written" in one_line(ran)
    assert "not calibrated" not in ran.out


def test_a_run_goes_on_with_the_device_it_was_started_on(run: Cli) -> None:
    """It is known from the folder, and stating it beside --resume is refused."""
    assert run(*TINY, "-o", "r", "--no-calibrate").code == 0
    again = run("--resume", "r", "--no-calibrate", "--json")
    assert again.code == 0 and again.json["request"]["device"] == "cpu"
    both = run("--resume", "r", "--device", "cpu")
    assert (both.code, both.out) == (2, "")
    assert "--resume goes on with what the folder says: --device cannot change it (leave out --device)" in both.err


def test_the_next_run_is_held_against_the_calibration_of_the_first(run: Cli) -> None:
    first = run(*TINY, "-o", "first", "--json")
    assert first.code == 0, first.err
    second = run(*TINY, "-o", "second", "--json", "--no-calibrate", "--tolerance", "10000")
    assert second.code == 0, second.err
    assert second.json["prediction"]["kind"] == "calibrated"
    assert "measured here" in second.json["prediction"]["source"]
    assert second.json["calibration"] is None
    third = run(*TINY, "-o", "third", "--no-calibrate", "--tolerance", "0.001")
    assert third.code == 3
    assert "predictions are off by" in one_line(third)
    assert "OUTSIDE the tolerance" in third.out


def test_every_format_that_the_kernels_read_passes_its_gate(run: Cli) -> None:
    formats = "fp16,fp8_e5m2,int8_per_token_head,fp8:head,int8:tensor,fp8:none,nvfp4,int4:block32:fp16"
    ran = run(*TINY, "--kv-cache-dtype", formats, "--ctx", "32", "--batch", "1", "-o", "r", "--json", "--no-calibrate")
    assert ran.code == 0, ran.err
    assert len(ran.json["cells"]) == len(ran.json["gates"]) == 8


def test_on_a_terminal_it_says_plainly_what_a_cpu_is(run: Cli) -> None:
    ran = run(*TINY, "--kv-cache-dtype", "bf16,fp8", "-o", "r", "--compare", "torch", width=80)
    assert ran.code == 0, ran.err
    assert "a CPU is not a GPU" in ran.out
    assert "FP8 will not be" in ran.out
    assert "torch SDPA" in ran.out
    assert "read roofline" in ran.out
    assert "calibrated cpu-" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "…" not in ran.out
    assert "[16/16]" in ran.err


def test_a_peer_that_is_not_here_is_listed_and_the_run_goes_on(run: Cli) -> None:
    ran = run(*TINY, "--kv-cache-dtype", "bf16", "--ctx", "32", "-o", "r", "--compare", "flashinfer,torch", "--json")
    assert ran.code == 0, ran.err
    assert {"cell": "FlashInfer XQA", "reason": "it needs a CUDA GPU"} in ran.json["skipped"]
    assert {row["name"] for row in ran.json["peers"]} == {"torch SDPA"}


def test_a_peer_that_fails_is_listed_and_the_run_goes_on(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, name: str, cell: Any, **options: Any) -> Any:
        raise KernelFailure("ImportError: nvcc was not found")

    monkeypatch.setattr(CpuBackend, "time_peer", fails)
    ran = run(
        *TINY, "--kv-cache-dtype", "bf16", "--ctx", "32", "--batch", "1", "-o", "r", "--compare", "torch", "--json"
    )
    assert ran.code == 0, ran.err
    assert [item["reason"] for item in ran.json["skipped"]] == ["ImportError: nvcc was not found"]
    assert ran.json["peers"] == []


def test_a_broken_kernel_stops_at_its_gate_and_nothing_of_it_is_timed(
    run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Values of fp8 caches come out 1% too large: a hundred times what the gate allows."""
    really = CpuBackend.attend

    def broken(self: Any, q: Any, cache: Any, window: Any) -> Any:
        return really(self, q, cache, window) * (1.01 if cache.fmt.name == "fp8_e4m3" else 1.0)

    monkeypatch.setattr(CpuBackend, "attend", broken)
    ran = run(*TINY, "-o", "r")
    assert ran.code == 1
    line = one_line(ran)
    assert "gate of fp8" in line
    assert "off by 1.0e-02" in line
    assert "1e-04 is allowed" in line
    assert not (tmp_path / "r" / "samples.jsonl").exists()
    gates = [json.loads(text) for text in (tmp_path / "r" / "gates.jsonl").read_text().splitlines()]
    assert [(gate["kv_dtype"], gate["passed"]) for gate in gates] == [("bfloat16", True), ("fp8", False)]


def test_a_kernel_that_answers_nan_fails_its_gate(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    really = CpuBackend.attend
    monkeypatch.setattr(CpuBackend, "attend", lambda *args: really(*args) * float("nan"))
    ran = run(*TINY, "-o", "r")
    assert ran.code == 1
    assert "gate of bfloat16" in one_line(ran)
    assert "not finite" in one_line(ran)


def test_a_cell_out_of_memory_is_skipped_and_listed_and_the_rest_goes_on(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = CpuBackend.time

    def greedy(self: Any, cell: Any, **options: Any) -> Any:
        if (cell.batch_size, cell.context_tokens, cell.family.kv_dtype) == (2, 256, "fp8"):
            raise CellOutOfMemory("tried to allocate 2 TiB")
        return really(self, cell, **options)

    monkeypatch.setattr(CpuBackend, "time", greedy)
    report = run(*TINY, "-o", "r", "--json").json
    assert len(report["cells"]) == 23
    assert report["skipped"] == [{"cell": "fp8 batch 2 × 256", "reason": "out of memory: tried to allocate 2 TiB"}]
    assert "7 usable samples of fp8" in report["calibration"]["problem"]
    monkeypatch.setattr(CpuBackend, "time", really)
    assert len(run("--resume", "r", "--json").json["cells"]) == 24


def test_a_cell_larger_than_free_memory_is_never_tried(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: 400_000)
    ran = run(*TINY, "-o", "r", "--json")
    assert ran.code == 0, ran.err
    assert "fp8 batch 1 × 256" in [
        f"{c['kv_dtype']} batch {c['batch_size']} × {c['context_tokens']}" for c in ran.json["cells"]
    ]
    assert {item["cell"] for item in ran.json["skipped"]} == {"bfloat16 batch 2 × 256"}
    assert "are free" in ran.json["skipped"][0]["reason"]


def test_a_kernel_that_dies_keeps_the_samples_before_it(
    run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    really, count = CpuBackend.time, 0

    def dies(self: Any, cell: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KernelFailure("RuntimeError: an illegal memory access was encountered")
        return really(self, cell, **options)

    monkeypatch.setattr(CpuBackend, "time", dies)
    ran = run(*TINY, "-o", "r")
    assert ran.code == 1
    assert "illegal memory access" in one_line(ran)
    assert len(read_samples(tmp_path / "r" / "samples.jsonl").samples) == 3


def test_an_interruption_keeps_what_was_done_and_says_how_to_go_on(
    run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    really, count = CpuBackend.time, 0

    def interrupted(self: Any, cell: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return really(self, cell, **options)

    monkeypatch.setattr(CpuBackend, "time", interrupted)
    ran = run(*TINY, "-o", "r")
    assert ran.code == 130
    assert "--resume r" in ran.err
    assert len(read_samples(tmp_path / "r" / "samples.jsonl").samples) == 5


def test_a_killed_run_goes_on_where_it_was(run: Cli, tmp_path: Path) -> None:
    """A real process, killed with SIGKILL in the middle; the line it was writing is torn as well."""
    folder, samples = tmp_path / "r", tmp_path / "r" / "samples.jsonl"
    code = "import kvplan.cli, sys; sys.argv = ['kvplan', 'measure', *sys.argv[1:]]; kvplan.cli.main()"
    process = subprocess.Popen([sys.executable, "-c", code, *TINY, "--ctx", "128,256,512,1024", "-o", str(folder)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))  # fmt: skip
    try:
        deadline = time.monotonic() + 50
        while time.monotonic() < deadline and process.poll() is None:
            if samples.exists() and samples.read_bytes().count(b"\n") >= 3:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    before = read_samples(samples).samples
    assert 3 <= len(before) < 24
    with samples.open("ab") as file:
        file.write(b'{"batch_size": 1, "cont')
    ran = run("--resume", str(folder), "--json")
    assert ran.code == 0, ran.err
    after = read_samples(samples)
    assert after.samples[: len(before)] == before
    assert len(after.samples) == 24
    assert len({(s.kv_dtype, s.batch_size, s.context_tokens) for s in after.samples}) == 24
    torn = len(before) + 1
    assert ran.json["corrupt_lines"] == [{"line_number": torn, "reason": "not JSON"}]
    assert (folder / "corrupt.txt").read_text() == f'line {torn}: not JSON: {{"batch_size": 1, "cont\n'


def test_a_run_of_another_gpu_or_version_is_not_gone_on_with(run: Cli, tmp_path: Path) -> None:
    assert run(*TINY, "-o", "r", "--no-calibrate").code == 0
    path = tmp_path / "r" / "environment.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "gpu": "h200", "device_name": "NVIDIA H200"}))
    ran = run("--resume", "r")
    assert ran.code == 2
    assert "was taken with GPU h200, this is cpu-" in one_line(ran)
    path.write_text(json.dumps({**before, "torch": "1.0"}))
    assert "was taken with torch 1.0" in one_line(run("--resume", "r"))


def test_a_full_disk_is_one_line(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    ran = run(*TINY, "-o", "r")
    assert ran.code == 2
    assert "No space left on device" in one_line(ran)


def test_a_budget_that_is_too_small_says_what_would_do(run: Cli) -> None:
    ran = run(*TINY, "-o", "r", "--budget", "0.2s")
    assert ran.code == 2
    assert "is too small" in one_line(ran)
    assert "--budget" in one_line(ran)
    assert not Path("r").exists()


def test_cells_beyond_the_budget_are_skipped_and_listed(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of 256 are said to take an hour."""
    monkeypatch.setattr(
        CpuBackend, "estimate_s", lambda self, cell, replays: 3600.0 if cell.context_tokens == 256 else 0.0
    )
    report = run(*TINY, "-o", "r", "--json").json
    assert len(report["cells"]) == 18
    assert len(report["skipped"]) == 6
    assert {item["reason"] for item in report["skipped"]} == {"the time budget of 60.00 s is spent"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kv-cache-dtype", "turboquant_k8v4"), "do not read it"),
        (("--head-dim", "72"), "--head-dim 72: the bundled kernels read"),
        (("--num-q-heads", "5"), "cannot share"),
        (("--model", "8b"), "name two shapes"),
        (("--tp", "2"), "no --model was given"),
        (("--ctx", "many"), "is not a token count"),
        (("--batch", "0"), "is not a whole number"),
        (("--compare", "magic"), "is not known"),
        (("--tolerance", "-1"), "not a positive percentage"),
        (("--budget", "soon"), "is not a time"),
        (("--device", "tpu"), "is not one of auto, cuda, cpu"),
        (("--resume", "nothing-here"), "cannot change it"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run: Cli, words: tuple[str, ...], message: str) -> None:
    ran = run(*TINY, "-o", "r", *words)
    assert ran.code == 2
    assert message in one_line(ran)
    assert not Path("r").exists()


def test_a_folder_without_a_run_or_with_one_already_is_refused(run: Cli, tmp_path: Path) -> None:
    assert "holds no run" in one_line(run("--resume", "nothing-here"))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "request.json").write_text("{]")
    assert "not JSON" in one_line(run("--resume", "r"))
    ran = run(*TINY, "-o", "r")
    assert ran.code == 2
    assert "holds a run already" in one_line(ran)
    assert "--resume r" in one_line(ran)


def test_without_a_gpu_and_without_a_flag_it_says_what_was_looked_for(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = run()
    assert ran.code == 4
    line = one_line(ran)
    assert "looked for a CUDA device through torch" in line
    assert "--device cpu" in line
    assert "kvplan[measure]" in line
    assert run("--device", "cuda").code == 4


def test_a_window_is_timed_with_the_bytes_it_reads(run: Cli) -> None:
    """gpt-oss at TP 8: a full and a 128-token window shape; at 256 tokens a window reads half of what full does."""
    ran = run("--device", "cpu", "--model", "gpt-oss-120b", "--tp", "8", "--kv-cache-dtype", "bf16", "--batch", "1",
              "--ctx", "64,256", "-o", "r", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    read = {(c["shape"], c["context_tokens"]): c["read_bytes"] for c in ran.json["cells"]}
    assert sorted(read.values()) == [64 * 256, 64 * 256, 128 * 256, 256 * 256]
    assert len(ran.json["lines"]) == 1


def test_the_readme_command_for_a_cpu_runs(run: Cli) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    words = re.search(r"^kvplan measure (--device cpu [^#\n]*)#", readme, re.M)
    assert words is not None
    ran = run(*words[1].split())
    assert ran.code == 0, ran.err
    assert re.search(r"24 samples in kvplan-runs/cpu-", ran.out)


LATENT = ("--device", "cpu", "--model", "deepseek-v3", "--tp", "64", "--batch", "1,2", "--ctx", "32,64,128,256")


def test_latent_attention_is_gated_timed_predicted_and_calibrated(run: Cli, tmp_path: Path) -> None:
    """Two heads a rank on rows of 512 + 64; fp8 halves them, and with scales of 128 and 16-bit rotary they are 656."""
    first = run(*LATENT, "-o", "first", "--json")
    assert first.code == 0, first.err
    report = first.json
    assert {row["shape"] for row in report["cells"]} == {"2 query heads on a latent of 512 + 64"}
    assert len(report["cells"]) == 3 * 2 * 4
    assert all(0 < gate["error"] <= gate["tolerance"] for gate in report["gates"])
    errors = {gate["kv_dtype"]: gate["format_error"] for gate in report["gates"]}
    assert errors["bfloat16"] < 0.01 < errors["fp8_ds_mla"] < errors["fp8"] < 0.06
    floors = {row["kv_dtype"]: row["floor"] for row in report["lines"]}
    assert floors == {"bfloat16": 1.0, "fp8": 0.5, "fp8_ds_mla": 656 / 1152}
    read = {row["kv_dtype"]: row["read_bytes"] for row in report["cells"] if row["batch_size"] == 2}
    assert read == {"bfloat16": 512 * 1152, "fp8": 512 * 576, "fp8_ds_mla": 512 * 656}
    assert any("4 FLOPs a byte in bf16 and 8 in fp8" in note for note in report["notes"])  # 2 · 2 · 1,088 / 1,152
    samples = read_samples(tmp_path / "first" / "samples.jsonl").samples
    assert {(s.num_q_heads, s.num_kv_heads, s.head_dim, s.latent_dim, s.layout) for s in samples} == {
        (2, 1, 576, 512, "rows")
    }
    assert report["calibration"]["path"].endswith("-kvplan-latent-2.json")
    second = run(*LATENT, "-o", "second", "--json", "--no-calibrate", "--tolerance", "10000")
    assert second.code == 0, second.err
    assert second.json["prediction"]["num_cells"] == 24
    assert "measured here" in second.json["prediction"]["source"]
    third = run(*LATENT, "-o", "third", "--no-calibrate", "--tolerance", "0.001")
    assert third.code == 3
    assert "predictions are off by" in one_line(third)


def test_a_latent_run_goes_on_where_it_was_and_names_peers_that_are_not_compared(
    run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    really, count = CpuBackend.time, 0

    def interrupted(self: Any, cell: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return really(self, cell, **options)

    monkeypatch.setattr(CpuBackend, "time", interrupted)
    assert run(*LATENT, "-o", "r", "--compare", "torch").code == 130
    before = read_samples(tmp_path / "r" / "samples.jsonl").samples
    assert len(before) == 5
    monkeypatch.setattr(CpuBackend, "time", really)
    report = run("--resume", "r", "--json").json
    after = read_samples(tmp_path / "r" / "samples.jsonl").samples
    assert after[:5] == before
    assert len(after) == len(report["cells"]) == 24
    assert report["skipped"] == [{"cell": "torch SDPA", "reason": "nothing is compared on latent attention"}]


def test_a_broken_latent_kernel_stops_at_its_gate(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    really = CpuBackend.attend
    monkeypatch.setattr(CpuBackend, "attend", lambda *args: really(*args) * 1.01)
    ran = run(*LATENT, "-o", "r")
    assert ran.code == 1
    assert "gate of bfloat16 (2 query heads on a latent of 512 + 64): the kernel is off by 1.0e-02" in one_line(ran)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kv-cache-dtype", "fp8_per_token_head"), "the bundled kernel of latent attention does not read it"),
        (("--whole-step",), "runs a whole model on one GPU"),
        (("--tp", "3"), "TP 3 does not divide 128 query heads"),
        (("--model", "deepseek-v3.2"), "has sparse latent attention"),
    ],
)
def test_what_latent_attention_cannot_do_is_one_line(run: Cli, words: tuple[str, ...], message: str) -> None:
    ran = run(*LATENT, "-o", "r", *words)
    assert ran.code == 2
    assert message in one_line(ran)
    assert not Path("r").exists()


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 256,
         "vocab_size": 512, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}  # fmt: skip


def test_a_whole_step_of_a_dense_model_is_timed_and_gone_on_with(run: Cli, tmp_path: Path) -> None:
    """By hand: 2 bytes · (3 layers · 128 · ((8 + 4) heads · 64 + 3 · 256) + 512 · 128) = 1,310,720 bytes of weights."""
    model = model_folder(tmp_path / "tiny", LLAMA)
    words = ("--device", "cpu", "--model", model, "--whole-step", "--batch", "1,2", "--ctx", "32,64,128",
             "--kv-cache-dtype", "bf16,fp8", "-o", "r", "--no-calibrate")  # fmt: skip
    ran = run(*words, "--json")
    assert ran.code == 0, ran.err
    steps = ran.json["steps"]
    assert steps["weight_bytes"] == 1_310_720
    assert [(row["kv_dtype"], row["context_tokens"]) for row in steps["rows"]] == [
        (dtype, context) for dtype in ("bfloat16", "fp8") for context in (32, 64, 128)
    ]
    assert all(row["batch_size"] == 2 and row["p10_s"] <= row["itl_s"] <= row["p90_s"] for row in steps["rows"])
    assert {line["kv_dtype"]: line["floor"] for line in steps["lines"]} == {"bfloat16": 1.0, "fp8": 0.5}
    records = (tmp_path / "r" / "steps.jsonl").read_text()
    again = run("--resume", "r", "--no-calibrate")
    assert again.code == 0, again.err
    assert (tmp_path / "r" / "steps.jsonl").read_text() == records
    assert "Whole decode step: " in again.out
    assert again.out.count(", R² ") == 2, "each line goes through three contexts"
    unknown = {**json.loads(records.splitlines()[0]), "kv_dtype": "fp9"}
    (tmp_path / "r" / "steps.jsonl").write_text(f"{records}{{}}\n[]\n{json.dumps(unknown)}\n")
    assert run("--resume", "r", "--no-calibrate", "--json").json["steps"] == steps, "lines that hold no step of it"


def test_a_whole_step_with_fp8_weights_reads_half_the_bytes_of_its_layers(run: Cli, tmp_path: Path) -> None:
    """By hand: 3 layers · 128 · ((8 + 4) heads · 64 + 3 · 256) of one byte, and 512 · 128 of two: 720,896 bytes."""
    model = model_folder(tmp_path / "tiny", LLAMA)
    words = ("--device", "cpu", "--model", model, "--whole-step", "--weight-dtype", "fp8", "--batch", "2",
             "--ctx", "32,64", "--kv-cache-dtype", "bf16", "-o", "r", "--no-calibrate")  # fmt: skip
    ran = run(*words, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["steps"]["weight_dtype"] == "fp8"
    assert ran.json["steps"]["weight_bytes"] == 720_896
    assert [row["context_tokens"] for row in ran.json["steps"]["rows"]] == [32, 64]
    shown = run("--resume", "r", "--no-calibrate").out
    assert "random fp8 weights" in shown
    assert "per 1k tokens of context" in shown and "R²" not in shown, "two points are always on a line"


def test_weights_of_attention_alone_or_of_an_unknown_format_are_refused(run: Cli) -> None:
    alone = run("--device", "cpu", "--weight-dtype", "fp8")
    assert alone.code == 2
    assert "add --whole-step" in one_line(alone)
    unknown = run("--device", "cpu", "--weight-dtype", "int3", "--whole-step", "--model", "8b")
    assert unknown.code == 2
    assert "whole steps run with bf16 or fp8 weights" in one_line(unknown)


@pytest.mark.parametrize(("kind", "architecture"), [("cuda", "sm80"), ("rocm", "gfx942")])
def test_fp8_weights_are_refused_where_no_product_takes_them(kind: str, architecture: str) -> None:
    backend = CpuBackend()
    backend.environment = replace(backend.environment, kind=kind, architecture=architecture)
    with pytest.raises(UnsupportedError, match="fp8 weights"):
        resolve_request(Options(model="8b", whole_step=True, weight_dtype="fp8"), backend)


def test_a_model_larger_than_memory_has_its_steps_skipped(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 on a CPU its weights take twice 1,310,720 bytes: 2.5 MiB."""
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: 2_700_000)
    words = ("--device", "cpu", "--whole-step", "--batch", "1", "--ctx", "32,64", "--kv-cache-dtype", "bf16", "-o", "r")
    report = run(*words, "--model", model_folder(tmp_path / "tiny", LLAMA), "--no-calibrate", "--json").json
    assert report["steps"] is None
    assert report["skipped"][0]["reason"] == "its weights need 2.50 MiB, 2.32 MiB are free"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "8b", "--tp", "2"), "runs a whole model on one GPU"),
        ((), "runs a whole model on one GPU"),
        (("--model", "gpt-oss-20b"), "runs dense models"),
        (("--model", "mixtral-8x7b"), "runs dense models"),
        (("--model", "deepseek-v3"), "runs dense models"),
    ],
)
def test_a_whole_step_of_anything_else_is_refused(run: Cli, words: tuple[str, ...], message: str) -> None:
    ran = run("--device", "cpu", "--whole-step", *words)
    assert ran.code == 2
    assert message in one_line(ran)


def test_the_step_computes_what_a_decoder_layer_computes(tmp_path: Path) -> None:
    """Against the same layer written out for one sequence whose cache holds its last token alone."""
    from torch.nn.functional import rms_norm, silu

    from kvplan.kernels.paged_cache import random_caches
    from kvplan.kernels.reference.append_kv import append_kv
    from kvplan.kernels.reference.decode_attention import decode_attention
    from kvplan.measure.dense_step import DenseStep
    from kvplan.measure.family import Shape
    from kvplan.measure.step_plan import StepModel

    model = StepModel("tiny", Shape(2, 1, 64), 1, 128, 96, 50)
    step = DenseStep(model, device="cpu", dtype=torch.float64, append=append_kv, seed=0,
                     make_attend=lambda *_: lambda q, cache: decode_attention(q, cache))  # fmt: skip
    caches = random_caches([1, 1], kv_dtype="fp16", num_kv_heads=1, head_dim=64, device="cpu")
    still = torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)  # rotation by nothing
    x = torch.randn(2, 128, dtype=torch.float64)
    slots = caches[0].block_table[:, 0].long() * caches[0].block_size_tokens
    got = step._step(x, caches, slots, still, step.make_attend(caches[0], 2, torch.float64))
    ((qkv, out, gate_up, down),) = step.layers
    v = (rms_norm(x, (128,)) @ qkv.T)[:, 192:].half().double()  # one token: attention returns its value for every head
    x = x + torch.cat([v, v], dim=-1) @ out.T
    gate, up = (rms_norm(x, (128,)) @ gate_up.T).chunk(2, dim=-1)
    x = x + (silu(gate) * up) @ down.T
    assert torch.equal(got, (rms_norm(x, (128,)) @ step.lm_head.T).argmax(-1))


def test_fp8_weights_give_the_product_of_what_they_stand_for() -> None:
    """Weights as stored, times their scale; activations as e4m3."""
    from kvplan.measure.dense_step import DenseStep
    from kvplan.measure.family import Shape
    from kvplan.measure.step_plan import StepModel

    model = StepModel("tiny", Shape(2, 1, 64), 1, 128, 96, 50, "fp8")
    step = DenseStep(model, device="cpu", dtype=torch.float32, append=lambda *_: None, seed=0,
                     make_attend=lambda *_: lambda q, cache: q)  # fmt: skip
    wide = DenseStep(replace(model, weight_dtype="bf16"), device="cpu", dtype=torch.float32, append=lambda *_: None,
                     seed=0, make_attend=lambda *_: lambda q, cache: q)  # fmt: skip
    assert torch.equal(step.lm_head, wide.lm_head)
    x = torch.randn(3, 128)
    for weight, drawn in zip(step.layers[0][:3:2], wide.layers[0][:3:2], strict=True):
        assert weight.dtype == torch.float8_e4m3fn
        values = weight.float() * step.scales[128]
        assert (values - drawn).norm() / drawn.norm() < 0.04
        expected = x.to(torch.float8_e4m3fn).float() @ values.T
        assert torch.allclose(step._product(x, weight), expected, rtol=1e-4, atol=1e-4)
