"""Tables and paragraphs as plain text, for answers that must come at once: nothing here imports a terminal library."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from kvplan.terminal.console import is_styled, page_width

MIN_COLUMN = 6
"""Characters a column of text keeps on a narrow page."""

STYLES = {"bold": "1", "dim": "2", "yellow": "33"}


class Page:
    """Lines on their way to a stream: wrapped to its width, styled only on a terminal without ``NO_COLOR``."""

    def __init__(self, stream: TextIO | None = None, width: int | None = None) -> None:
        self.stream = stream or sys.stdout
        self.styled = is_styled(self.stream)
        self.width = page_width(self.stream, width)

    def line(self, text: str = "", style: str | None = None) -> None:
        """A paragraph, wrapped between words."""
        for row in wrap(text, self.width):
            self.raw(row, style)

    def raw(self, text: str, style: str | None = None) -> None:
        """One line as it is."""
        if self.styled and style in STYLES:
            text = f"\x1b[{STYLES[style]}m{text}\x1b[0m"
        self.stream.write(text + "\n")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
        """Columns as wide as their widest cell, under a dim heading and a rule.

        Where the page is too narrow, text is cut, the last columns first, then left out, which a line below says; the
        first column, names to type, is cut only where nothing else is left.
        """
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        texts = [i for i in range(1, len(widths)) if i not in right]
        left_out: list[str] = []
        while texts and self._excess(min(w, MIN_COLUMN) if i in texts else w for i, w in enumerate(widths)) > 0:
            last = texts.pop()
            left_out.insert(0, columns[last])
            columns, rows = _without(columns, last), [_without(row, last) for row in rows]
            widths.pop(last)
            right = [i - (i > last) for i in right]
        while self._excess(widths) > 0:
            wide = [i for i in texts or [0] if widths[i] > MIN_COLUMN]
            if not wide:
                break
            widths[wide[-1]] -= 1

        def joined(cells: Sequence[str]) -> str:
            cut = [c if len(c) <= w else f"{c[: w - 1]}…" for c, w in zip(cells, widths, strict=True)]
            padded = [
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cut, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        self.raw(joined(columns), "dim")
        self.raw("─" * (sum(widths) + 2 * (len(widths) - 1)))
        for row in rows:
            self.raw(joined(row))
        if left_out:
            self.line(f"left out on a page this narrow: {', '.join(left_out)}", "dim")

    def _excess(self, widths: Iterable[int]) -> int:
        """Characters by which columns of these widths are wider than the page."""
        found = list(widths)
        return sum(found) + 2 * (len(found) - 1) - self.width


def _without(cells: Sequence[str], position: int) -> tuple[str, ...]:
    return (*cells[:position], *cells[position + 1 :])


def wrap(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` characters; further lines are indented as the first one and two more."""
    if len(text) <= width:
        return [text]
    indent = " " * (len(text) - len(text.lstrip()))
    rows, row = [], indent
    for word in text.strip().split(" "):
        candidate = f"{row} {word}" if row.strip() else f"{row}{word}"
        if len(candidate) > width and row.strip():
            rows.append(row)
            candidate = f"{indent}  {word}"
        row = candidate
    return [*rows, row]
