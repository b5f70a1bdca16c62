"""Output where the stream's encoding is not Unicode: signs are spelled in ASCII instead of ending in an error."""

from __future__ import annotations

import codecs
from typing import TextIO

HANDLER = "kvplan.spelled"
SPELLED = {
    "·": "-", "•": "*", "–": "-", "−": "-", "─": "-", "│": "|", "├": "|", "┤": "|", "└": "+", "×": "x", "→": "->",
    "…": "~", "µ": "u", "±": "+-", "≥": ">=", "≤": "<=", "⌈": "ceil(", "⌉": ")", "⌊": "floor(", "⌋": ")",
    "●": "*", "○": "o", "◆": "#", "◇": "%", "▲": "^", "△": "v", "■": "@", "□": "=", "✓": "", "✕": "",
    "╭": "+", "╮": "+", "╰": "+", "╯": "+",
}  # fmt: skip
"""Table rules and plot marks keep their width; other signs may take more room."""


def spell(error: UnicodeError) -> tuple[str, int]:
    """Characters that cannot be encoded, spelled; the error handler of ``HANDLER``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(SPELLED.get(character, "?") for character in unknown), error.end


def make_encodable(stream: TextIO) -> None:
    """Let ``stream`` spell what its encoding lacks: of Unicode, bytes in names that were no characters."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        codecs.register_error(HANDLER, spell)
        reconfigure(errors=HANDLER)
