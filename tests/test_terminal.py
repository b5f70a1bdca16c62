"""On a terminal the output is styled; ``NO_COLOR`` leaves plain text, and a pipe never sees an escape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
termios = pytest.importorskip("termios")

KVPLAN = str(Path(sys.executable).parent / "kvplan")
LOG = str(Path(__file__).parent / "check" / "logs" / "vllm-0.31-llama-3.1-8b-a100.log")
COMMANDS = (["size", "--model", "8b", "--ctx", "8k"], ["check", "--log", LOG], ["dtypes"], ["models"], ["--help"])
TABLES = (*COMMANDS[:-1], ["size", "--model", "8b", "--gpu", "h100"], ["gpus"], ["profiles"])


def on_a_terminal(words: list[str], columns: int = 80, **variables: str) -> bytes:
    """What a command writes to a terminal."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
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
@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_no_color_and_dumb_terminals_mean_no_escape(words: list[str], variable: dict[str, str]) -> None:
    assert b"\x1b[" in on_a_terminal(words)
    plain = on_a_terminal(words, **variable)
    assert plain and b"\x1b[" not in plain


@pytest.mark.parametrize("words", TABLES, ids=lambda words: " ".join(words[:4]))
@pytest.mark.parametrize(("columns", "width"), [(40, 60), (80, 80), (200, 120)])
def test_pages_are_as_wide_as_the_terminal_within_what_tables_need(words: list[str], columns: int, width: int) -> None:
    page = on_a_terminal(words, columns, NO_COLOR="1").decode()
    widest = max(len(line.rstrip()) for line in page.splitlines())
    cells = 70 if words[0] in ("check", "dtypes") else width  # their numbers alone are wider than 60
    assert widest <= max(width, cells)


def test_numbers_stay_whole_on_a_narrow_page() -> None:
    page = on_a_terminal(["size", "--model", "8b", "--gpu", "h100", "--ctx", "8k"], 40, NO_COLOR="1").decode()
    assert "131,072" in page and "…" not in page


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_pipe_gets_plain_text(words: list[str]) -> None:
    done = subprocess.run([KVPLAN, *words], capture_output=True, check=True)
    assert done.stdout and b"\x1b" not in done.stdout
