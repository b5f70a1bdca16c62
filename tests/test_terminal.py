"""On a terminal the output is styled; ``NO_COLOR`` leaves plain text, and a pipe never sees an escape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")

KVPLAN = str(Path(sys.executable).parent / "kvplan")
LOG = str(Path(__file__).parent / "check" / "logs" / "vllm-0.31-llama-3.1-8b-a100.log")
COMMANDS = (["size", "--model", "8b", "--ctx", "8k"], ["check", "--log", LOG], ["dtypes"], ["models"])


def on_a_terminal(words: list[str], **variables: str) -> bytes:
    """What a command writes to a terminal."""
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    ours, theirs = pty.openpty()
    with subprocess.Popen([KVPLAN, *words], stdout=theirs, stderr=theirs, stdin=theirs,
                          env={**kept, "TERM": "xterm-256color", **variables}):  # fmt: skip
        os.close(theirs)
        written = b""
        try:
            while piece := os.read(ours, 65536):
                written += piece
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    return written


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_no_color_means_no_escape(words: list[str]) -> None:
    assert b"\x1b[" in on_a_terminal(words)
    plain = on_a_terminal(words, NO_COLOR="1")
    assert plain and b"\x1b[" not in plain


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_pipe_gets_plain_text(words: list[str]) -> None:
    done = subprocess.run([KVPLAN, *words], capture_output=True, check=True)
    assert done.stdout and b"\x1b" not in done.stdout
