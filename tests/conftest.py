"""Shared fixtures: measured data outside the project (optional), snapshots, and a shell that runs ``kvplan``."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support import Ran

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):  # the same examples every time; elsewhere they vary
    settings.load_profile("ci")

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
SNAPSHOTS = Path(__file__).parent / "snapshots"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshots", action="store_true", help="rewrite tests/snapshots/*.txt; review the diff")


@pytest.fixture(scope="session", autouse=True)
def no_calibrations_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was measured on this machine is not what tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
        yield


@pytest.fixture(scope="session")
def data() -> Path:
    """Facts that others measured; tests that need them skip where the folder is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no measured data at {DATA}: this test compares with facts that do not ship with the project")
    return DATA


@pytest.fixture
def snapshot(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with ``tests/snapshots/NAME.txt``; ``--update-snapshots`` rewrites it."""

    def check(name: str, text: str) -> None:
        path = SNAPSHOTS / f"{name}.txt"
        if request.config.getoption("--update-snapshots"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: run pytest --update-snapshots and review it"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture
def kvplan_cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run ``kvplan`` in this process, through the same ``main`` as the script: exit code, stdout, stderr."""
    from kvplan.cli import main

    def run(*words: str, width: int = 80, stdin: str = "", env: dict[str, str] | None = None) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["kvplan", *words])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.setenv("COLUMNS", str(width))
            patch.setattr("typer.rich_utils.MAX_WIDTH", width)  # read once a process from TERMINAL_WIDTH
            patch.setenv("NO_COLOR", "1")
            patch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")  # what ``main`` makes of it, taken back afterwards
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main()
                    code = 0
                except SystemExit as stop:
                    code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        return Ran(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache and no hub; the cache's root."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "hf" / "hub"
