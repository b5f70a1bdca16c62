"""Plain tables are as wide as they need, and never wider than the page as long as text can be cut."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from support import Ran

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


def test_a_very_narrow_page_leaves_text_out_and_says_so_before_it_cuts_a_name() -> None:
    page = Page(io.StringIO(), 60)
    page.table(("name", *"abcde", "where"), [("int4_per_token_head", *["67,584"] * 5, "said")], right=range(1, 6))
    assert page.stream.getvalue().splitlines()[2:] == [  # type: ignore[attr-defined]
        "int4_per_token_head" + "  67,584" * 5, "left out on a page this narrow: where",
    ]  # fmt: skip


def test_names_to_type_stay_whole_at_60_columns(kvplan_cli: Callable[..., Ran]) -> None:
    for command in ("dtypes", "profiles"):
        names = [row["name"] for row in _rows(kvplan_cli(command, "--json").json)]
        page = kvplan_cli(command, width=60).out.splitlines()
        assert [line.split()[0] for line in page[2 : 2 + len(names)]] == names
        assert max(map(len, page)) <= 60


def _rows(found: Any) -> Any:
    return found["calibrations"] if isinstance(found, dict) else found
