"""Whatever a log or a server says, the answer is a result or one clear line, never a traceback."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from check.test_url import vllm
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplan.check.log import read_stream
from kvplan.check.metrics import read_scrape, report_of
from kvplan.check.reconcile import reconcile
from kvplan.check.what_if import WhatIf
from kvplan.errors import KvplanError

LOGS = [path.read_bytes() for path in sorted((Path(__file__).parent / "logs").glob("*.log"))]
NASTY = [
    b"-1",
    b"0",
    b"0.00",
    b"nan",
    b"1e999",
    b"99999999999999999999",
    b"3.4.5",
    b"",
    b"None",
    b"\xff",
    b"'",
    b"{",
    b"%n",
]


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A real log with some of its words replaced, dropped or cut."""
    words = draw(st.sampled_from(LOGS)).split(b" ")
    for _ in range(draw(st.integers(1, 6))):
        words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(NASTY) | st.binary(max_size=12))
    log = b" ".join(words)
    return log[: draw(st.integers(0, len(log)))] if draw(st.booleans()) else log


@settings(max_examples=150, deadline=None)
@given(spoilt(), st.sampled_from([{}, {"model": "8b"}, {"model": "8b", "gpu": "h100", "batch_size": 4}]))
def test_a_spoilt_log_is_read_or_refused_in_one_line(log: bytes, given: dict[str, object]) -> None:
    try:
        report = read_stream(io.BytesIO(log), "log")
        result = reconcile(report, given)
        json.loads(result.to_json())
        WhatIf(report, given).plan({**given, "tp_size": 2}, compare=False)
    except KvplanError as error:
        assert error.message and "\n" not in error.message


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_spoilt_metrics_are_read_or_refused_in_one_line(data: st.DataObject) -> None:
    words = vllm().split(b" ")
    for _ in range(data.draw(st.integers(1, 6))):
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.sampled_from(NASTY) | st.binary(max_size=12))
    text = b" ".join(words).decode("utf-8", errors="replace")
    about = data.draw(st.dictionaries(st.sampled_from(["version", "tp_size"]), st.text(max_size=5) | st.integers()))
    try:
        result = reconcile(report_of("x", read_scrape(text, "x"), None, [], about), {"model": "8b", "gpu": "h100"})
        assert "NaN" not in result.to_json() and "Infinity" not in result.to_json()
    except KvplanError as error:
        assert error.message and "\n" not in error.message


@pytest.mark.parametrize("log", LOGS)
def test_a_compressed_log_reads_the_same(log: bytes, tmp_path: Path) -> None:
    import gzip

    from kvplan.check.log import read_log

    path = tmp_path / "vllm.log.1.gz"
    path.write_bytes(gzip.compress(log))
    assert read_log(path).facts == read_stream(io.BytesIO(log), "log").facts
    path.write_bytes(gzip.compress(log)[:-20])
    with pytest.raises(KvplanError, match="cannot be read"):
        read_log(path)
