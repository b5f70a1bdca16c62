"""One way of writing to the terminal: width-aware, colour only where it is wanted, plain when piped."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MIN_WIDTH = 60
MAX_WIDTH = 120
PIPED_WIDTH = 100
PAGE_HEIGHT = 25
"""Nothing here depends on it, but Rich asks dumb terminals for their width unless both are given."""


class _Trimmed:
    """A stream for plain text, whose lines end where their words do: Rich fills them with spaces."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write("\n".join(line.rstrip(" ") for line in text.split("\n")))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_console(stream: TextIO | None = None, width: int | None = None) -> Console:
    """A console on ``stream`` (stdout); styled only on a terminal without ``NO_COLOR``, fixed width when piped."""
    from rich.console import Console

    out = stream or sys.stdout
    file = out if is_styled(out) else cast("TextIO", _Trimmed(out))
    return Console(
        file=file, width=page_width(out, width), height=PAGE_HEIGHT, highlight=False, soft_wrap=False,
        force_terminal=out.isatty(), emoji=False, color_system="auto" if is_styled(out) else None,
    )  # fmt: skip


def page_width(stream: TextIO, width: int | None = None) -> int:
    """``width``, else what COLUMNS or the terminal says, within what tables stay readable at; fixed when piped."""
    if width is None:
        columns = os.environ.get("COLUMNS", "")
        if columns.isdigit() and int(columns) > 0:
            width = int(columns)
        elif stream.isatty():
            width = os.get_terminal_size(stream.fileno()).columns or PIPED_WIDTH
        else:
            width = PIPED_WIDTH
    return max(MIN_WIDTH, min(width, MAX_WIDTH))


def is_styled(stream: TextIO) -> bool:
    """Colour and weight belong on a terminal that knows them, and where nobody asked for none."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def make_table(
    *columns: str, title: str | None = None, right: tuple[int, ...] = (), wrap: tuple[int, ...] = ()
) -> Table:
    """A borderless table with a heading line; those in ``right`` align right, labels and those in ``wrap`` may fold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", title_style="bold",
        title=Text(title) if title else None, header_style="dim", padding=(0, 1, 0, 0),
    )  # fmt: skip
    folding = {*wrap, 0} - {*right}  # labels fold on a narrow page, so that numbers stay whole
    for number, name in enumerate(columns):
        table.add_column(
            Text(name), justify="right" if number in right else "left", no_wrap=number not in folding,
            overflow="fold" if number in folding else "ellipsis",
        )  # fmt: skip
    return table


def add_row(table: Table, *cells: str, style: str | None = None) -> None:
    """A row of literal text: nothing in a cell is markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells), style=style)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is: nothing in it is markup."""
    from rich.text import Text

    console.print(Text(text, style=style or ""))
