"""Data that ships with kvplan: model and GPU facts, calibrations, measurements. One JSON file per fact sheet.

This package only finds and reads files; what they mean is for ``kvplan.model_config``, ``kvplan.gpu`` and
``kvplan.calibration``. Every profile has ``schema_version``, ``name`` and ``aliases``; names and aliases are unique in
their folder (a test holds it), lower case, and a file is called ``<name>.json``.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent


@cache
def names(kind: str) -> tuple[str, ...]:
    """Names of every profile in folder ``kind`` (``models``, ``gpus``, ``calibrations``), sorted."""
    return tuple(sorted(path.stem for path in (ROOT / kind).glob("*.json")))


@cache
def load(kind: str, name: str) -> dict[str, Any]:
    """The profile ``name`` of folder ``kind``, as parsed JSON. Treat it as read-only: it is cached."""
    data: dict[str, Any] = json.loads((ROOT / kind / f"{name}.json").read_text(encoding="utf-8"))
    return data


@cache
def index(kind: str) -> dict[str, str]:
    """Lower-case name, alias and hub id of every profile in folder ``kind``, to the profile's name."""
    found: dict[str, str] = {}
    for name in names(kind):
        for key in _keys(kind, name):
            found.setdefault(key, name)
    return found


@cache
def find(kind: str, name: str) -> str | None:
    """The profile name that ``name`` (a name, alias or hub id, any case) stands for, or None."""
    key = name.strip().lower()
    if key in names(kind):
        return key
    quoted = json.dumps(key, ensure_ascii=False).encode("utf-8", errors="replace")
    for known in names(kind):  # reading files is a third of the work of parsing them
        if quoted in (ROOT / kind / f"{known}.json").read_bytes().lower() and key in _keys(kind, known):
            return known
    return None


def _keys(kind: str, name: str) -> list[str]:
    """Everything that a profile is called, in lower case."""
    data = load(kind, name)
    return [key.lower() for key in (name, *data.get("aliases", ()), *data.get("hf_ids", ()))]
