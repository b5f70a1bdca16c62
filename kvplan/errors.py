"""The errors kvplan raises on purpose, and the exit code each one ends a command with.

::

    KvplanError
    ├── InputError                 2   the request cannot be understood or is impossible as asked
    │   ├── UnknownNameError       2   no model, GPU, dtype or engine of that name; carries the closest ones
    │   ├── ConfigError            2   a model's config.json (or a file beside it) cannot be planned from
    │   ├── ProfileError           2   a profile or calibration file breaks its schema
    │   └── UnsupportedError       2   an engine refuses this combination
    ├── AnswerIsNo                 1   the answer is no and the caller asked to be told
    ├── OutOfTolerance             3   a measurement or a server disagrees with the plan
    ├── MissingDependencyError     4   hardware or an optional dependency is missing
    └── UnreachableError           4   no server answers at an address, or not in time

Each carries a ``code`` (stable, for programs), a ``message`` (one line for people) and a ``hint`` (what to try next).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_NAME_CHARS = 80


def shorten(value: object, limit: int = MAX_NAME_CHARS) -> str:
    """One printable line of at most ``limit`` characters for a value that came from outside."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(ch if ch.isprintable() else "?" for ch in text[: 4 * limit])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def reason(error: OSError) -> str:
    """What the system says went wrong with a file."""
    return error.strerror or type(error).__name__


class KvplanError(Exception):
    """Base of everything kvplan raises on purpose."""

    exit_code = 2
    code = "error"

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def as_dict(self) -> dict[str, str | None]:
        """The JSON form: ``{"code", "message", "hint"}``."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class InputError(KvplanError):
    """The request cannot be understood or is impossible as asked."""

    code = "bad_input"


class UnknownNameError(InputError):
    """No model, GPU, dtype or engine of that name."""

    code = "unknown_name"

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str | None = None) -> None:
        close = closest(name, known)
        suggestion = f"closest: {', '.join(close)}" if close else None
        super().__init__(
            f"unknown {kind} {shorten(name)!r}",
            hint="; ".join(part for part in (suggestion, hint) if part) or None,
        )
        self.closest = close


class ConfigError(InputError):
    """A model's config.json, or a file beside it, cannot be planned from."""

    code = "bad_config"


class ProfileError(InputError):
    """A profile or calibration file breaks its schema."""

    code = "bad_profile"


class UnsupportedError(InputError):
    """The engine refuses this combination of model, GPU and options."""

    code = "unsupported"


class AnswerIsNo(KvplanError):
    """The answer is no, and the caller asked for an exit code that says so."""

    exit_code = 1
    code = "does_not_fit"


class OutOfTolerance(KvplanError):
    """A measurement or a running server disagrees with the plan."""

    exit_code = 3
    code = "out_of_tolerance"


class MissingDependencyError(KvplanError):
    """Hardware or an optional dependency is missing."""

    exit_code = 4
    code = "missing_dependency"


class UnreachableError(KvplanError):
    """No server answers at the address in time, or its TLS is not to be trusted."""

    exit_code = 4
    code = "unreachable"


def closest(name: str, known: Iterable[str], limit: int = 4) -> list[str]:
    """The known names nearest to ``name``, best first; at most ``limit``."""
    names = sorted(set(known))
    wanted = name.lower()[:MAX_NAME_CHARS]
    found = difflib.get_close_matches(wanted, names, n=limit, cutoff=0.5)
    if len(found) < limit and len(wanted) >= 2:
        found += [n for n in names if n not in found and (wanted in n or n in wanted)][: limit - len(found)]
    return found
