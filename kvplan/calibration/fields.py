"""Fields of a calibration's JSON, checked one by one as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kvplan.errors import ProfileError, shorten


class Checker:
    """Reads fields; what is missing, of the wrong type or absurd is a ``ProfileError`` that names file and field.

    Args:
        where: what the fields are of; begins every message.

    """

    def __init__(self, where: str) -> None:
        self.where = where

    def finite(self, value: Any, path: str) -> None:
        """Nothing in ``value``, however deep, is infinite or no number."""
        if isinstance(value, float) and not math.isfinite(value):
            raise ProfileError(f"{self.where}: {path} must be a finite number, not {value}")
        if isinstance(value, Mapping):
            for key, item in value.items():
                self.finite(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list):
            for number, item in enumerate(value):
                self.finite(item, f"{path}[{number}]")

    def table(self, data: Mapping[str, Any], key: str, path: str | None = None) -> Mapping[str, Any]:
        """The object at ``key``."""
        value = data.get(key)
        if not isinstance(value, Mapping):
            raise ProfileError(f"{self.where}: {path or key} must be an object")
        return value

    def text(self, data: Mapping[str, Any], key: str) -> str:
        """The text at ``key``, not empty."""
        value = data.get(key)
        if not isinstance(value, str) or not value:
            raise ProfileError(f"{self.where}: {key} must be text")
        return value

    def number(self, data: Mapping[str, Any], key: str, path: str, low: float, high: float) -> float:
        """The number at ``key``, from ``low`` to ``high``."""
        value = data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ProfileError(f"{self.where}: {path} must be a number from {low:g} to {high:g}, not {shorten(value)}")
        return float(value)

    def pair(self, value: Any, path: str, low: float = 0.0, high: float = 1e18) -> tuple[float, float]:
        """``[smallest, largest]``, both from ``low`` to ``high``."""
        if not isinstance(value, list) or len(value) != 2:
            raise ProfileError(f"{self.where}: {path} must be [smallest, largest]")
        smallest, largest = (self.number({"": item}, "", path, low, high) for item in value)
        if smallest > largest:
            raise ProfileError(f"{self.where}: {path} must be [smallest, largest], not {shorten(value)}")
        return smallest, largest
