"""Tab completion: what each shell is offered after an option, and that a real bash takes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvplan.cli import complete

KVPLAN = Path(sys.executable).parent / "kvplan"


def offered(shell: str, line: str) -> str:
    """What ``kvplan`` prints when ``shell`` asks how ``line`` may go on."""
    words = line.split(" ")
    asks = {
        "bash": {"_KVPLAN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_KVPLAN_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line},
        "fish": {"_KVPLAN_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": line,
                 "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]  # fmt: skip
    done = subprocess.run([KVPLAN], env={**os.environ, **asks}, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "name"),
    [("kvplan size --gpu h20", "h200"), ("kvplan itl --kv-cache-dtype bf16,fp8_per", "bf16,fp8_per_token_head"),
     ("kvplan size --model llama-3.1-7", "llama-3.1-70b"),
     ("kvplan profiles show attention-h2", "attention-h200-vllm")],
    ids=["GPU", "KV dtype", "model", "calibration"],
)  # fmt: skip
def test_names_are_offered_after_an_option(shell: str, line: str, name: str) -> None:
    assert name in offered(shell, line)


def test_each_kind_of_name_is_offered_by_its_beginning_only() -> None:
    assert complete.weight_dtypes("nv") == ["nvfp4"]
    assert complete.engines("tensor") == ["tensorrt-llm"]
    assert "local" in complete.gpus("") and "h100-sxm" in complete.gpus("H100")
    assert complete.kv_dtypes("fp8,bf") == ["fp8,bf16", "fp8,bfloat16"]
    assert complete.models("no-such-model") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_script_works_in_a_real_bash() -> None:
    script = (
        'eval "$(_KVPLAN_COMPLETE=source_bash kvplan)"; COMP_WORDS=(kvplan size --gpu rtx-pro); COMP_CWORD=3; '
        '_kvplan_completion kvplan; echo "${COMPREPLY[@]}"'
    )
    path = f"{KVPLAN.parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert "rtx-pro-6000-server" in done.stdout.split(), done.stderr
