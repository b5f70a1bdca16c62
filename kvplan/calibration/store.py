"""Where calibrations lie: the user's own folder first, then those that ship, each named ``KIND-GPU-ENGINE``.

The user's folder is ``$XDG_CONFIG_HOME/kvplan/calibrations`` or ``~/.config/kvplan/calibrations``. Of several there of
one GPU and engine, one that names the engine comes before one that names none, then the newest by its date.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplan import profiles
from kvplan.errors import ProfileError, reason

SHIPPED = "shipped"
MEASURED_HERE = "measured here"
GIVEN = "given"
KINDS = ("all_reduce", "attention", "gemm", "mla_decode", "moe", "serving")
MAX_FILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Found:
    """A calibration file that was read: its JSON, where it lies, and whether it ships or was measured here."""

    name: str
    data: Mapping[str, Any]
    where: str
    origin: str


def canonical_engine(name: str) -> str:
    """The name calibrations use for an engine: ``trtllm`` is ``tensorrt-llm``."""
    key = name.strip().lower().replace("_", "-")
    return "tensorrt-llm" if key in ("trtllm", "trt-llm") else key


def user_folder() -> Path:
    """The folder of the user's own calibrations; it need not exist."""
    base = os.environ.get("XDG_CONFIG_HOME")
    root = Path(base) if base else Path.home() / ".config"
    return root / "kvplan" / "calibrations"


def read(path: Path) -> Mapping[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ProfileError: the file cannot be read, is too large, or holds no JSON object.

    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ProfileError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, not a calibration")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({reason(error)})") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not JSON", hint="remove it, or write it anew with `kvplan calibrate`") from error
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: not a JSON object", hint="remove it, or write it anew with `kvplan calibrate`")
    return data


def _own() -> Iterator[Found]:
    """The user's calibrations, by name.

    Raises:
        ProfileError: a file of the folder is no calibration; passed over, it would look as if it were used.

    """
    folder = user_folder()
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        data = read(path)
        if data.get("kind") not in KINDS or not isinstance(data.get("gpu", ""), str):
            raise ProfileError(f"{path}: not a calibration by its kind and gpu",
                               hint="write it with `kvplan calibrate`, or move it out of this folder")  # fmt: skip
        yield Found(path.stem, data, str(path), MEASURED_HERE)


def every() -> Iterator[Found]:
    """Every calibration file: the user's, by name, then the shipped ones, by name.

    Raises:
        ProfileError: a file of the user's folder is no calibration.

    """
    yield from _own()
    for name in profiles.names("calibrations"):
        yield Found(name, profiles.load("calibrations", name), f"calibration {name}", SHIPPED)


def find(kind: str, gpu_name: str, engine: str) -> Found | None:
    """The first calibration of ``kind`` for this GPU (name or alias) and engine, the user's first, or None.

    Raises:
        ProfileError: a file of the user's folder is no calibration.

    """
    return next(matching(kind, gpu_name, engine), None)


def matching(kind: str, gpu_name: str, engine: str) -> Iterator[Found]:
    """All of them: the user's, the one to use first, then the one that ships.

    Raises:
        ProfileError: a file of the user's folder is no calibration.

    """
    gpu = profiles.find("gpus", gpu_name) or gpu_name.strip().lower()
    engine = canonical_engine(engine)
    yield from sorted((found for found in _own() if _matches(found.data, kind, gpu, engine)), key=_order)
    name = shipped_name(kind, gpu, engine)
    if name is not None:
        yield Found(name, profiles.load("calibrations", name), f"calibration {name}", SHIPPED)


def shipped_name(kind: str, gpu: str, engine: str) -> str | None:
    """The name of the shipped calibration of ``kind`` for a GPU's name and a canonical engine, or None."""
    name = f"{kind.replace('_', '-')}-{gpu}-{engine}"
    return name if name in profiles.names("calibrations") else None


def choice_note(candidates: Sequence[Found]) -> str | None:
    """Which of the user's own calibrations of one kernel is used, and why; None of fewer than two.

    Args:
        candidates: calibrations of one kernel, as ``matching`` orders them.

    """
    own = [found for found in candidates if found.origin == MEASURED_HERE]
    if len(own) < 2:
        return None
    (unnamed, age, _), (next_unnamed, next_age, _) = _order(own[0]), _order(own[1])
    if unnamed != next_unnamed:
        why = "it names the engine"
    elif age != next_age:
        why = f"the newest, {own[0].data.get('date')}"
    else:
        why = "the first by name: their dates are alike"
    others = ", ".join(found.name for found in own[1:])
    return (
        f"calibration {own[0].name} of your own folder is used ({why}), not {others}: --calibration FILE takes another"
    )


def _order(found: Found) -> tuple[bool, int, str]:
    """What comes first: an engine that is named, then the later date (none is the oldest), then the name."""
    date = str(found.data.get("date"))
    try:
        day = datetime.date.fromisoformat(f"{date}-01" if date.count("-") == 1 else date).toordinal()
    except ValueError:
        day = 0
    return found.data.get("engine") is None, -day, found.name


def _matches(data: Mapping[str, Any], kind: str, gpu: str, engine: str) -> bool:
    return data.get("kind") == kind and data.get("gpu") == gpu and data.get("engine") in (engine, None)
