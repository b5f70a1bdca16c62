"""Where the measuring extra is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from support import Ran


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_without_torch_one_line_says_how_to_install_it(
    kvplan_cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ran = kvplan_cli("measure", "--device", device)
    assert ran.code == 4
    assert ran.out == ""
    assert ran.err == ("error: kvplan measure needs torch, which is not installed (pip install 'kvplan[measure]')\n")


def test_help_needs_no_torch(kvplan_cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ran = kvplan_cli("measure", "--help")
    assert ran.code == 0
    assert "--resume" in ran.out
    assert "Default: 60s, thorough 600s." in " ".join(ran.out.replace("│", "").split())
