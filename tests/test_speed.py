"""Speed, as ratios within one run so that a busy machine does not matter; the fastest of several tries counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BASELINE = [sys.executable, "-c", "import typer, pydantic, rich, numpy"]
KVPLAN = str(Path(sys.executable).parent / "kvplan")
LOG = Path(__file__).parent / "check" / "logs" / "vllm-0.31-llama-3.1-8b-a100.log"
ALLOWED_RATIO = 1.4
TRIES = 9


def fastest_s(*commands: list[str]) -> list[float]:
    """The fastest of ``TRIES`` runs of each command, taken in turns so that all see the same noise.

    User and system time of the child, not wall-clock: what other processes do at the same time counts little. Bytecode
    is cached, as it is after an installation.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    best = [float("inf")] * len(commands)
    for _ in range(TRIES):
        for number, command in enumerate(commands):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0, command
            best[number] = min(best[number], usage.ru_utime + usage.ru_stime)
    return best


@pytest.mark.parametrize(
    "words",
    [["--help"], ["size", "--help"], ["size", "--model", "70b", "--ctx", "32k"],
     ["size", "--model", "70b", "--gpu", "h100", "--tp", "4", "--ctx", "32k"],
     ["itl", "--model", "70b", "--gpu", "h200", "--tp", "4", "--ctx", "32k"],
     ["check", "--log", str(LOG)]],
    ids=" ".join,
)  # fmt: skip
def test_a_command_takes_at_most_1_4_times_the_import_of_its_dependencies(words: list[str]) -> None:
    baseline, mine = fastest_s(BASELINE, [KVPLAN, *words])
    assert mine <= ALLOWED_RATIO * baseline, f"{mine:.3f} s against {baseline:.3f} s: {mine / baseline:.2f}×"


MODELS = ("70b", "qwen3.5-27b", "deepseek-v4-flash", "gemma-3-27b", "deepseek-v3.2", "gpt-oss-120b", "jamba-mini")


def case(number: int) -> str:
    """The ``number``-th request: no two alike, seven models in turn."""
    return json.dumps(
        {"model": MODELS[number % len(MODELS)], "gpu": "b200", "tp_size": 1 << number % 3,
         "kv_cache_dtype": ("auto", "fp8")[number // 7 % 2], "context_tokens": 1024 + number, "id": number}
    )  # fmt: skip


def seconds(path: Path, count: int) -> float:
    """CPU seconds of ``kvplan size --cases`` on ``count`` cases, the fastest of two."""
    path.write_text("".join(case(number) + "\n" for number in range(count)))
    best = float("inf")
    for _ in range(2):
        before = os.times()
        done = subprocess.run([KVPLAN, "size", "--cases", str(path)], capture_output=True, text=True, check=True)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        best = min(best, used)
        lines = done.stdout.splitlines()
        assert len(lines) == count
        assert all('"error"' not in line[:10] for line in lines)
    return best


def test_cases_run_at_500_a_second_on_one_core_and_time_grows_linearly(tmp_path: Path) -> None:
    """Start-up included in the rate; growth is per added case, so start-up drops out of the comparison."""
    small, middle, large = (seconds(tmp_path / "cases.jsonl", count) for count in (300, 900, 2700))
    assert 2700 / large >= 500, f"{2700 / large:.0f} cases a second"
    first, second = (middle - small) / 600, (large - middle) / 1800
    assert second <= 1.5 * first + 1e-4, f"{first * 1e3:.2f} ms a case, then {second * 1e3:.2f} ms"


def test_ten_thousand_questions_to_a_running_library_take_seconds() -> None:
    """Models, GPUs and profiles are read once: a plan afterwards is arithmetic."""
    import kvplan

    kvplan.size(compare=False, model="70b", gpu="h100", context_tokens=1024)
    started = time.process_time()
    for context in range(1024, 2024):
        kvplan.size(compare=False, model="70b", gpu="h100", context_tokens=context)
    assert time.process_time() - started < 2.0
