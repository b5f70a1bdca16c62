"""Reading sizes from people and writing them for people. Everything else in kvplan is bytes, tokens and seconds.

``k`` on a token count means 1,024 (``32k`` = 32,768: what engines and model cards mean), a bare number is exact.
"""

from __future__ import annotations

import re

from kvplan.errors import InputError, shorten

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4

MAX_TOKENS = 2**40
MAX_BYTES = 2**60

RATES = (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6))
"""Units of bandwidth; each serves from a tenth of it on."""
GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
"""A number with a mark between its thousands: ``32,768``."""
_TOKENS = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*(k|ki|m|mi)?$", re.IGNORECASE)
_TOKEN_FACTORS = {"": 1, "k": 1024, "ki": 1024, "m": 1024**2, "mi": 1024**2}
_BYTES = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?b?|b)?$", re.IGNORECASE)
_BYTE_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "ki": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mi": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gi": GIB, "gb": 10**9,
    "t": TIB, "tib": TIB, "ti": TIB, "tb": 10**12,
}  # fmt: skip


def _ungrouped(text: str) -> str:
    """``32,768`` and ``32_768`` without the marks between thousands; a comma elsewhere stays, and is no number."""
    text = text.strip().replace("_", "")
    return text.replace(",", "") if GROUPED.match(text) else text


def text_or_integer(value: object, what: str) -> str | int:
    """Text as it is, whole numbers as ints.

    Raises:
        InputError: anything else.

    """
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_BYTES:
        return int(value)
    raise InputError(f"{what} must be a whole number, not {shorten(repr(value), 40)}")


def parse_tokens(given: object, what: str = "token count") -> int:
    """Read ``"32k"``, ``"131072"``, ``"1M"`` or a whole number as tokens; ``k`` is 1,024.

    Raises:
        InputError: not a number, zero, negative, or above 2^40.

    """
    text = text_or_integer(given, what)
    if isinstance(text, int):
        value = text
    else:
        match = _TOKENS.match(_ungrouped(text))
        if match is None or len(text) > 40:
            raise InputError(f"{what} {shorten(text)!r} is not a token count", hint="write 32768, 32k or 1M")
        scaled = float(match[1]) * _TOKEN_FACTORS[(match[2] or "").lower()]
        value = int(scaled)
        if value != scaled:
            raise InputError(f"{what} {shorten(text)!r} is not a whole number of tokens", hint="write 32768 or 32k")
    if not 1 <= value <= MAX_TOKENS:
        raise InputError(f"{what} must be between 1 and {MAX_TOKENS:,} tokens, not {shorten(text)}")
    return value


def parse_bytes(given: object, what: str = "size") -> int:
    """Read ``"80GiB"``, ``"141GB"``, ``"85899345920"`` or a whole number as bytes; ``G`` alone is GiB, ``GB`` is 10^9.

    Raises:
        InputError: not a size, zero, negative, or above 2^60.

    """
    text = text_or_integer(given, what)
    if isinstance(text, int):
        value = text
    else:
        match = _BYTES.match(_ungrouped(text))
        if match is None or len(text) > 40:
            raise InputError(f"{what} {shorten(text)!r} is not a size", hint="write 80GiB, 141GB or a number of bytes")
        value = int(float(match[1]) * _BYTE_FACTORS[(match[2] or "").lower()])
        if not match[2] and 0 < value < MIB:
            raise InputError(f"{what} {shorten(text)} would be {value:,} bytes", hint=f"write {shorten(text)}GiB")
    if not 1 <= value <= MAX_BYTES:
        raise InputError(f"{what} must be between 1 byte and 1 EiB, not {shorten(text)}")
    return value


def format_bytes(value: int | None) -> str:
    """``1374389534720`` → ``"1.25 TiB"``; unknown is ``"unknown"``."""
    if value is None:
        return "unknown"
    sign, size = ("−", -value) if value < 0 else ("", value)
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            scaled = size / unit
            digits = 2 if scaled < 100 else 1
            return f"{sign}{scaled:,.{digits}f} {name}"
    return f"{sign}{size} B"


def format_gib(value: int | None) -> str:
    """Bytes as GiB with two digits, the unit ops teams read memory in."""
    return "unknown" if value is None else f"{value / GIB:,.2f} GiB".replace("-", "−")


def format_tokens(value: int | None) -> str:
    """An exact, grouped token count."""
    return "unknown" if value is None else f"{value:,}"


def format_ratio(value: float | None, digits: int = 2) -> str:
    """``1.9393`` → ``"1.94×"``."""
    return "–" if value is None else f"{value:.{digits}f}×"


def format_percent(value: float | None, digits: int = 1) -> str:
    """``0.0312`` → ``"3.1%"``; what rounds to nothing has no sign."""
    return "–" if value is None else f"{round(100 * value, digits) + 0.0:.{digits}f}%".replace("-", "−")


def format_seconds(value: float | None) -> str:
    """Seconds as µs, ms or s, labelled."""
    if value is None:
        return "unknown"
    if value < 1e-3:
        return f"{value * 1e6:.1f} µs"
    if value < 1:
        return f"{value * 1e3:.2f} ms"
    return f"{value:.2f} s"


def format_bytes_per_s(value: float | None) -> str:
    """``4.62e12`` → ``"4.62 TB/s"``; powers of ten, as datasheets give bandwidth."""
    if value is None:
        return "unknown"
    unit, size = next((u for u in RATES if value >= u[1] / 10), RATES[-1])
    return f"{value / size:.2f} {unit}"


def format_count(value: int, noun: str) -> str:
    """``"1 request"``, ``"2 requests"``."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉ in integers."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``a``."""
    return ceil_div(a, multiple) * multiple
