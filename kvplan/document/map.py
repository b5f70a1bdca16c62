"""Where a smaller KV format pays: the saving of a token's time over users × contexts, against 16-bit KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvplan.document.parts import Surface, WhatIf
from kvplan.dtypes import kv_format
from kvplan.latency.lines import BREAK_EVEN_GAIN

MAX_ROWS = MAX_COLUMNS = 9
Verdict = Literal["saves", "even", "costs", "only", "none"]


@dataclass(frozen=True)
class Cell:
    """One number of users at one context.

    Attributes:
        verdict: ``saves`` or ``costs`` at least 2% of a token's time, ``even`` between; ``only`` the smaller format
            fits; ``none`` does.
        saving: share of the 16-bit time saved; None where not both fit.

    """

    verdict: Verdict
    saving: float | None


@dataclass(frozen=True)
class BreakEvenMap:
    """The cells by users (rows), then contexts."""

    kv_cache_dtype: str
    baseline: str
    users: tuple[int, ...]
    contexts_tokens: tuple[int, ...]
    rows: tuple[tuple[Cell, ...], ...]


def break_even_map(grid: WhatIf, kv_cache_dtype: str) -> BreakEvenMap | None:
    """The map of one format; None without times, without 16-bit KV to compare with, or when nothing fits."""
    by_name = {surface.kv_cache_dtype: surface for surface in grid.surfaces}
    small = by_name.get(kv_cache_dtype)
    base = next((s for s in grid.surfaces if kv_format(s.kv_cache_dtype).key_bits == 16), None)
    if small is None or base is None or small.itl_s is None or base.itl_s is None:
        return None
    rows = _thinned(len(grid.users), MAX_ROWS)
    columns = _thinned(len(grid.contexts_tokens), MAX_COLUMNS)
    cells = tuple(tuple(_cell(grid, small, base, row, column) for column in columns) for row in rows)
    if all(cell.verdict == "none" for row in cells for cell in row):
        return None
    return BreakEvenMap(
        kv_cache_dtype=small.kv_cache_dtype,
        baseline=base.kv_cache_dtype,
        users=tuple(grid.users[row] for row in rows),
        contexts_tokens=tuple(grid.contexts_tokens[column] for column in columns),
        rows=cells,
    )


def _thinned(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` positions, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _cell(grid: WhatIf, small: Surface, base: Surface, row: int, column: int) -> Cell:
    users = grid.users[row]
    fits_small, fits_base = users <= small.max_users[column], users <= base.max_users[column]
    if not fits_base:
        return Cell("only" if fits_small else "none", None)
    assert small.itl_s is not None and base.itl_s is not None
    if not fits_small:
        return Cell("none", None)
    saving = 1 - small.itl_s[row][column] / base.itl_s[row][column]
    verdict: Verdict = "saves" if saving >= BREAK_EVEN_GAIN else "costs" if saving <= -BREAK_EVEN_GAIN else "even"
    return Cell(verdict, saving)
