"""Values of options: words and counts between commas, and token counts and sizes that may be left out."""

from __future__ import annotations

from kvplan.errors import InputError, shorten
from kvplan.units import parse_bytes, parse_tokens

MOST = 2**30


def words(text: str | None) -> list[str]:
    """The words between commas; none where the option is not given."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def named(text: str | None, flag: str) -> list[str]:
    """The words of a list option.

    Raises:
        InputError: the option was given and holds none.

    """
    found = words(text)
    if text is not None and not found:
        raise InputError(f"{flag} has no value", hint=f"leave {flag} out, or give it one")
    return found


def counts(text: str, flag: str, most: int = MOST) -> list[int]:
    """Whole numbers from 1 to ``most``.

    Raises:
        InputError: there is none, or a word is not one.

    """
    found = []
    for word in words(text):
        if not (word.isascii() and word.isdigit()) or not 1 <= int(word[:20]) <= most:
            raise InputError(
                f"{flag} {shorten(word, 20)!r} is not a whole number from 1 to {most:,}",
                hint=f"write {flag} 4 or {flag} 1,2,4",
            )
        found.append(int(word))
    if not found:
        raise InputError(f"{flag} has no value", hint=f"write {flag} 4")
    return found


def tokens(text: str | None, flag: str) -> int | None:
    """Tokens of ``32k`` and the like; None where the option is not given.

    Raises:
        InputError: not a count of tokens.

    """
    return None if text is None else parse_tokens(text, flag)


def size_bytes(text: str | None, flag: str, zero: bool = False) -> int | None:
    """Bytes of ``80GiB`` and the like, nothing too where ``zero`` allows it; None where the option is not given.

    Raises:
        InputError: not a size.

    """
    if text is None:
        return None
    return 0 if zero and text.strip() in ("0", "0GiB") else parse_bytes(text, flag)
