"""One way of writing to the terminal: width-aware, colour only where it is wanted, plain when piped."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MIN_WIDTH = 60
MAX_WIDTH = 120
PIPED_WIDTH = 100


def make_console(stream: TextIO | None = None, width: int | None = None) -> Console:
    """A console on ``stream`` (stdout); styled only on a terminal without ``NO_COLOR``, fixed width when piped."""
    from rich.console import Console

    out = stream or sys.stdout
    terminal = out.isatty()
    if width is None:
        columns = os.environ.get("COLUMNS", "")
        if columns.isdigit() and int(columns) > 0:
            width = int(columns)
        elif not terminal:
            width = PIPED_WIDTH
    if width is not None:
        width = max(MIN_WIDTH, min(width, MAX_WIDTH))
    return Console(
        file=out, width=width, highlight=False, soft_wrap=False, force_terminal=terminal, emoji=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
    )  # fmt: skip


def make_table(
    *columns: str, title: str | None = None, right: tuple[int, ...] = (), wrap: tuple[int, ...] = ()
) -> Table:
    """A borderless table with a heading line; columns in ``right`` align right, those in ``wrap`` may fold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", title_style="bold",
        title=Text(title) if title else None, header_style="dim", padding=(0, 1, 0, 0),
    )  # fmt: skip
    for number, name in enumerate(columns):
        table.add_column(
            Text(name), justify="right" if number in right else "left", no_wrap=number not in wrap,
            overflow="fold" if number in wrap else "ellipsis",
        )  # fmt: skip
    return table


def add_row(table: Table, *cells: str, style: str | None = None) -> None:
    """A row of literal text: nothing in a cell is markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells), style=style)
