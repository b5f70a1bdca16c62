"""Values of options: words and counts between commas, and token counts and sizes that may be left out."""

from __future__ import annotations

from itertools import pairwise

from kvplan.errors import InputError, shorten
from kvplan.units import GROUPED, parse_bytes, parse_tokens

MOST = 2**30
SHORT_CONTEXT = 256
"""A first context below this, before three digits, is read as thousands: ``32,768`` is hardly a list."""


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
    _refuse_thousands(text or "", flag)
    return found


def contexts(text: str | None, flag: str) -> list[int]:
    """The token counts of a list such as ``1k,8k..64k``, whose ranges double and have both ends in.

    Raises:
        InputError: the option was given and holds none, reads as one number, or a range has one end or runs backwards.

    """
    _refuse_thousands(text or "", flag, SHORT_CONTEXT)
    found: list[int] = []
    for word in named(text, flag):
        first, dots, last = word.partition("..")
        if dots and not (first and last):
            raise InputError(f"{flag} {shorten(word, 40)} is a range with one end", hint=f"write {flag} 1k..128k")
        at, end = (parse_tokens(text, flag) for text in (first, last if dots else first))
        if at > end:
            raise InputError(
                f"{flag} {shorten(word, 40)} runs backwards", hint=f"write the smaller one first: {last}..{first}"
            )
        while at < end:
            found.append(at)
            at *= 2
        found.append(end)
    return found


def _refuse_thousands(text: str, flag: str, least: int = 0) -> None:
    """Raise InputError where a list of numbers is rather one number with its thousands marked."""
    if not GROUPED.fullmatch(text.strip()):
        return
    parts = text.strip().split(",")
    ascending = all(int(a) < int(b) for a, b in pairwise(parts))
    if not ascending or int(parts[0]) < least or any(part.startswith("0") for part in parts):
        raise InputError(
            f"{flag} {shorten(text.strip(), 30)} reads as one number and as a list",
            hint=f"write {''.join(parts)}, or, for a list, a space after each comma",
        )


def counts(text: str, flag: str, most: int = MOST) -> list[int]:
    """Whole numbers from 1 to ``most``.

    Raises:
        InputError: there is none, or a word is not one.

    """
    found = []
    _refuse_thousands(text, flag)
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
        InputError: not a count of tokens, or a list or range of them.

    """
    if text is not None and (".." in text or len(words(text)) > 1) and not GROUPED.fullmatch(text.strip()):
        lists = "; `kvplan size` and `kvplan itl` take lists and ranges" if flag == "--ctx" else ""
        raise InputError(f"{flag} {shorten(text, 30)!r} is several values, and this command plans one",
                         hint=f"write {flag} 32k{lists}")  # fmt: skip
    return None if text is None else parse_tokens(text, flag)


def size_bytes(text: str | None, flag: str, zero: bool = False) -> int | None:
    """Bytes of ``80GiB`` and the like, nothing too where ``zero`` allows it; None where the option is not given.

    Raises:
        InputError: not a size.

    """
    if text is None:
        return None
    return 0 if zero and text.strip() in ("0", "0GiB") else parse_bytes(text, flag)
