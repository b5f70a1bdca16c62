"""Reading fields of a config.json that may be missing, mistyped or lying. A refusal names the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kvplan.errors import ConfigError, shorten

MAX_LAYERS = 4096
MAX_DIM = 2**24
MAX_COUNT = 2**20


class Fields:
    """A JSON object with typed, bounded getters.

    ``where`` names the file (and the nesting) in messages. Fallback names are tried in order, so
    ``integer("num_key_value_heads", "n_head_kv")`` reads whichever is there; None and absent are the same.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def fail(self, field: str, why: str, hint: str | None = None) -> ConfigError:
        """The error to raise about ``field``."""
        return ConfigError(f"{self.where}: {field} {why}", hint=hint)

    def has(self, *names: str) -> bool:
        """Whether any of ``names`` is there and not null."""
        return any(self.data.get(name) is not None for name in names)

    def raw(self, *names: str) -> Any:
        """The first of ``names`` that is there and not null, or None."""
        for name in names:
            value = self.data.get(name)
            if value is not None:
                return value
        return None

    def _first(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if self.data.get(name) is not None), names[0])

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_DIM) -> int:
        """A whole number within ``[low, high]``; ``default`` when absent, else an error."""
        value = self.raw(*names)
        if value is None:
            if default is not None:
                return default
            raise self.fail(names[0], "is missing", hint="give the model's own config.json, or the flags")
        return self.check_integer(self._first(names), value, low, high)

    def optional_integer(self, *names: str, low: int = 1, high: int = MAX_DIM) -> int | None:
        """A whole number, or None when absent."""
        value = self.raw(*names)
        return None if value is None else self.check_integer(self._first(names), value, low, high)

    def check_integer(self, field: str, value: Any, low: int, high: int) -> int:
        """``value`` as an int within bounds, or an error that names ``field``; a list that repeats a value is it."""
        if isinstance(value, list) and len(value) > 1 and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(field, f"must be a whole number, not {shorten(repr(value), 40)}")
        if isinstance(value, float) and (not math.isfinite(value) or value != int(value)):
            raise self.fail(field, f"must be a whole number, not {value}")
        if not low <= value <= high:
            raise self.fail(field, f"is {value:.6g}, which no model has (allowed {low} to {high:,})")
        return int(value)

    def number(self, *names: str, default: float) -> float:
        """A finite number, ``default`` when absent."""
        value = self.raw(*names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(self._first(names), f"must be a number, not {shorten(repr(value), 40)}")
        return float(value)

    def boolean(self, *names: str, default: bool = False) -> bool:
        """True or false, ``default`` when absent."""
        value = self.raw(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(self._first(names), f"must be true or false, not {shorten(repr(value), 40)}")
        return value

    def text(self, *names: str, default: str = "") -> str:
        """A string, ``default`` when absent."""
        value = self.raw(*names)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(self._first(names), f"must be text, not {shorten(repr(value), 40)}")
        return value

    def integers(self, *names: str, low: int = 0, high: int = MAX_DIM) -> list[int] | None:
        """A list of whole numbers, or None when absent."""
        value = self.raw(*names)
        if value is None:
            return None
        field = self._first(names)
        if not isinstance(value, list) or len(value) > MAX_LAYERS:
            raise self.fail(field, "must be a list of whole numbers")
        return [self.check_integer(f"{field}[{i}]", item, low, high) for i, item in enumerate(value)]

    def strings(self, *names: str) -> list[str] | None:
        """A list of strings, or None when absent."""
        value = self.raw(*names)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(self._first(names), "must be a list of text")
        return value

    def child(self, name: str) -> Fields | None:
        """The nested object ``name``, or None when absent."""
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(name, "must be an object")
        return Fields(value, f"{self.where}: {name}")

    @property
    def num_layers(self) -> int:
        """``num_hidden_layers`` under any of its names, at most 4,096."""
        return self.integer("num_hidden_layers", "n_layer", "num_layers", "n_layers", high=MAX_LAYERS)
