"""Lines in a terminal: one character a line, linear axes, 80 columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

MARKERS = "●○◆◇▲△■□"
HEIGHT = 12
"""Rows of the drawing."""


class PlotLine(NamedTuple):
    """A line through (x, y) points, ascending in x."""

    label: str
    points: tuple[tuple[float, float], ...]


def draw(lines: Sequence[PlotLine], x_labels: tuple[str, str], *, width: int = 78, y_unit: str = "ms") -> list[str]:
    """Rows of text. Both axes start at zero; where lines meet, the earlier one is on top."""
    lines = [line for line in lines if line.points]
    if not lines:
        return []
    x_max = max(x for line in lines for x, _ in line.points) or 1.0
    y_max = max(y for line in lines for _, y in line.points) or 1.0
    margin = 9
    columns = width - margin
    grid = [[" "] * columns for _ in range(HEIGHT)]
    for number in reversed(range(len(lines))):
        marker = MARKERS[number % len(MARKERS)]
        for column in range(columns):
            y = _at(lines[number].points, x_max * column / (columns - 1))
            if y is not None:
                grid[HEIGHT - 1 - round(y / y_max * (HEIGHT - 1))][column] = marker
    rows = []
    for number, cells in enumerate(grid):
        value = y_max * (HEIGHT - 1 - number) / (HEIGHT - 1)
        axis = f"{value:6.1f} ┤" if number % 3 == 0 or number == HEIGHT - 1 else "       │"
        rows.append(f"{axis}{''.join(cells)}".rstrip())
    left, right = x_labels
    rows.append(f"       └{'─' * columns}")
    rows.append(f"{y_unit:>6}  {left}{right:>{max(columns - len(left), 1)}}")
    rows += [f"        {MARKERS[i % len(MARKERS)]} {line.label}" for i, line in enumerate(lines)]
    return rows


def _at(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The line at ``x``, None outside its points."""
    if len(points) == 1:
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None
