"""Plain tables are as wide as they need, and never wider than the page as long as text can be cut."""

from __future__ import annotations

import io

from kvplan.terminal.plain import Page

COLUMNS = ("name", "bytes", "where it is said")
ROWS = [("fp8_per_token_head", "67,584", "line 12: Available KV cache memory"), ("bf16", "131,072", "–")]


def table(width: int) -> list[str]:
    page = Page(io.StringIO(), width)
    page.table(COLUMNS, ROWS, right=(1,))
    return page.stream.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_wide_page_shows_every_cell_whole() -> None:
    rows = table(100)
    assert rows[2] == "fp8_per_token_head   67,584  line 12: Available KV cache memory"
    assert rows[3] == "bf16                131,072  –"


def test_a_narrow_page_cuts_the_last_text_first_and_no_number() -> None:
    rows = table(60)
    assert max(map(len, rows)) <= 60
    assert rows[2] == "fp8_per_token_head   67,584  line 12: Available KV cache me…"
