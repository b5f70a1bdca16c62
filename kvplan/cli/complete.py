"""Values that a shell offers on Tab: names of models, GPUs, KV and weight formats, engines, calibrations.

Lists are completed in their last part (``bf16,fp`` → ``bf16,fp8``).
"""

from __future__ import annotations

from collections.abc import Iterable

from kvplan import profiles
from kvplan.dtypes import AUTO, KV_ALIASES, KV_FORMATS, WEIGHT_FORMATS


def models(incomplete: str) -> list[str]:
    """Bundled models by name, alias and hub id."""
    return _ending(incomplete, profiles.index("models"))


def gpus(incomplete: str) -> list[str]:
    """Bundled GPUs by name and alias, and ``local``."""
    return _ending(incomplete, ["local", *(name for name in profiles.index("gpus") if "_" not in name)])


def kv_dtypes(incomplete: str) -> list[str]:
    """KV formats by name and short form, and ``auto``."""
    return _ending(incomplete, [AUTO, *KV_FORMATS, *KV_ALIASES])


def weight_dtypes(incomplete: str) -> list[str]:
    """Weight formats."""
    return _ending(incomplete, WEIGHT_FORMATS)


def engines(incomplete: str) -> list[str]:
    """Engines."""
    from kvplan.memory.engines import ENGINES

    return _ending(incomplete, ENGINES)


def calibrations(incomplete: str) -> list[str]:
    """Calibrations that ship or were measured here."""
    from kvplan.calibration import store

    return _ending(incomplete, (found.name for found in store.every()))


def _ending(incomplete: str, names: Iterable[str]) -> list[str]:
    """What the last part of a comma list may become."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in sorted(set(names)) if name.startswith(last.lower())]
