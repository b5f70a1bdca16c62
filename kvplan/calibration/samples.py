"""Measured decode-attention points from CSV, CSV.gz or JSONL, and which of them are refused and why."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan.calibration.attention import make_geometry
from kvplan.calibration.geometry import Geometry, default_head_dim_v
from kvplan.dtypes import AUTO, canonical_kv_dtype
from kvplan.errors import InputError, KvplanError, shorten
from kvplan.gpu import GpuSpec
from kvplan.units import format_bytes_per_s

Array = NDArray[Any]
MAX_FILE_BYTES = 512 * 2**20
MAX_ROWS = 2_000_000
MAX_LINE_CHARS = 1_000_000
INTEGER_COLUMNS = {
    "batch_size": 2**24, "context_tokens": 2**40, "num_q_heads": 2**16, "num_kv_heads": 2**16, "head_dim": 2**14,
}  # fmt: skip
REQUIRED = (*INTEGER_COLUMNS, "window_tokens", "kv_dtype", "latency_s")
LATENCY = REQUIRED[-1]
SHAPE_COLUMNS = REQUIRED[:-1]
GEOMETRY_COLUMNS = (*INTEGER_COLUMNS, "head_dim_v", "window_tokens")
MAX_LATENCY_S = 3600.0
IN_OTHER_UNITS = {"_ms": "1,000", "_us": "1,000,000", "_ns": "1,000,000,000"}
"""How a column of times in another unit ends, and what makes seconds of it."""
KERNEL_COLUMNS = ("kernel_source", "kernel")
GRANULAR = {"token_head": "per_token_head", "per_token_head": "per_token_head"}


@dataclass(frozen=True)
class Row:
    """One line of a file: its number, its values as written, and what is wrong with it (None: nothing)."""

    line: int
    values: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Refused:
    """A point that was set aside: where it stood and why; the values of that line come after ``kind``."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"

    @property
    def kind(self) -> str:
        """What is wrong, without the values of the line: up to the first ``, not`` or colon."""
        return self.reason.split(", not ")[0].split(": ")[0]


@dataclass(frozen=True)
class Points:
    """Usable points, one element each; ``rows`` are positions in the file's list of rows.

    ``latency_s`` is NaN where a case carries none.
    """

    rows: Array
    kv_dtype: Array
    columns: Mapping[str, Array]
    latency_s: Array
    kernel: Array
    refused: list[Refused] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Array) -> Points:
        """The points at ``chosen`` (indices or a mask)."""
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return Points(self.rows[chosen], self.kv_dtype[chosen], columns, self.latency_s[chosen], self.kernel[chosen])

    def geometry(self, kv_dtype: str) -> Geometry:
        """Every point as a case of ``kv_dtype``."""
        return make_geometry([self.columns[name] for name in GEOMETRY_COLUMNS], kv_dtype)


def refused_by_kind(refused: Sequence[Refused], limit: int = 3) -> str:
    """``refused: 40 faster than h200 can be, 4 kv_dtype is missing``: the commonest kinds; empty without any."""
    kinds = Counter(item.kind for item in refused).most_common()
    shown = [f"{count:,} {shorten(kind)}" for kind, count in kinds[:limit]]
    if rest := sum(count for _, count in kinds[limit:]):
        shown.append(f"{rest:,} for other reasons")
    return f"refused: {', '.join(shown)}" if shown else ""


def read_rows(path: Path, need_latency: bool = False) -> tuple[list[str], list[Row]]:
    """Column names and rows of a CSV (``.csv``, ``.csv.gz``) or JSONL file, corrupt lines marked and kept in place.

    Raises:
        InputError: the file cannot be read, is empty, or lacks a column; ``latency_s`` counts where it is needed.

    """
    text = _text(path)
    first = text.lstrip()[:1]
    if not first:
        raise InputError(f"{path}: empty", hint="a CSV with a header, or JSONL of `kvplan measure`")
    rows = list(_json_rows(text)) if first == "{" else list(_csv_rows(text, path))
    if not rows:
        raise InputError(f"{path}: no rows", hint=f"columns: {', '.join(REQUIRED)}")
    names: dict[str, None] = {}
    for row in rows:
        for name in row.values:
            names.setdefault(name)
    if need_latency and names and LATENCY not in names:
        raise _lacking(path, [LATENCY], names)
    return list(names), rows


def read_points(rows: list[Row], need_latency: bool = True) -> Points:
    """The rows that hold a decode-attention point; the rest refused by line with the reason."""
    kept: list[int] = []
    values: list[list[float]] = []
    dtypes: list[str] = []
    kernels: list[str] = []
    refused: list[Refused] = []
    for position, row in enumerate(rows):
        try:
            numbers, dtype = _point(row, need_latency)
        except InputError as error:
            refused.append(Refused(row.line, error.message))
            continue
        kept.append(position)
        values.append(numbers)
        dtypes.append(dtype)
        kernels.append(str(next((row.values[k] for k in KERNEL_COLUMNS if row.values.get(k)), "")))
    table = np.array(values, dtype=float).reshape(len(kept), 8).T
    columns = dict(zip(GEOMETRY_COLUMNS, table[:7], strict=True))
    return Points(np.array(kept, dtype=int), np.array(dtypes, dtype=object), columns, table[7],
                  np.array(kernels, dtype=object), refused)  # fmt: skip


def refuse_impossible(points: Points, rows: list[Row], gpu: GpuSpec) -> Points:
    """Set aside points whose KV is larger than L2 and that are faster than ``gpu``'s peak bandwidth allows."""
    peak, l2 = gpu.memory_bandwidth_bytes_per_s, gpu.l2_cache_bytes
    if peak is None or l2 is None:
        return points
    kv = np.zeros(len(points))
    for dtype in set(points.kv_dtype):
        mask = points.kv_dtype == dtype
        kv[mask] = points.take(mask).geometry(dtype).kv_bytes
    rate = kv / points.latency_s
    bad = (kv > l2) & (rate > peak)
    good = points.take(~bad)
    refused = [*points.refused, *(
        Refused(
            rows[points.rows[i]].line,
            f"faster than {gpu.name} can be: {kv[i] / 1e6:,.0f} MB of KV, more than its {l2 / 1e6:,.0f} MB of L2, in "
            f"{points.latency_s[i] * 1e6:,.1f} µs is {format_bytes_per_s(float(rate[i]))} against a peak of "
            f"{format_bytes_per_s(peak)}",
        )
        for i in np.flatnonzero(bad)
    )]  # fmt: skip
    return Points(good.rows, good.kv_dtype, good.columns, good.latency_s, good.kernel, sorted(refused, key=_line_of))


def _line_of(item: Refused) -> int:
    return item.line


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB")
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(raw)) as packed:
                raw = packed.read(MAX_FILE_BYTES + 1)
            if len(raw) > MAX_FILE_BYTES:
                raise InputError(f"{path}: unpacks to more than {MAX_FILE_BYTES >> 20} MiB")
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason})") from error
    return raw.decode("utf-8-sig", errors="replace").replace("\0", "�")


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text))
    try:
        header = [name.strip() for name in next(reader)]
    except (csv.Error, StopIteration) as error:
        raise InputError(f"{path}: neither CSV nor JSONL") from error
    missing = [name for name in SHAPE_COLUMNS if name not in header]
    if missing:
        raise _lacking(path, missing, header)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Row(reader.line_num, {}, f"not CSV ({error})")
            continue
        if cells is None:
            return
        if not cells:
            continue
        values = dict(zip(header, cells, strict=False))
        wrong = f"{len(cells)} cells where the header has {len(header)}" if len(cells) != len(header) else None
        yield Row(reader.line_num, values, wrong)


def _lacking(path: Path, missing: Sequence[str], names: Iterable[str]) -> InputError:
    """The error of missing columns; a time in another unit is what ``latency_s`` is made of."""
    hint = f"columns: {', '.join(REQUIRED)}"
    other = next((name for name in names if name[-3:] in IN_OTHER_UNITS), None) if LATENCY in missing else None
    if other is not None:
        hint = f"divide {shorten(other, 40)} by {IN_OTHER_UNITS[other[-3:]]} and call it {LATENCY}: seconds"
    return InputError(f"{path}: no column {', '.join(missing)}", hint=hint)


def _json_rows(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line) if len(line) <= MAX_LINE_CHARS else None
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict):
            yield Row(number, data)
        else:
            yield Row(number, {}, "not a JSON object")


def _point(row: Row, need_latency: bool) -> tuple[list[float], str]:
    if row.problem is not None:
        raise InputError(row.problem)
    v = row.values
    if v.get("latent_dim") not in (None, "", 0, "0"):
        raise InputError("latent attention, which `kvplan measure` calibrates itself")
    shape = {name: _whole(v, name, 1, high) for name, high in INTEGER_COLUMNS.items()}
    if shape["num_q_heads"] < shape["num_kv_heads"]:
        raise InputError("fewer query heads than KV heads")
    window = 0.0 if v.get("window_tokens") in (None, "", "None") else _whole(v, "window_tokens", 0, 2**40)
    width = v.get("head_dim_v")
    width_v = float(default_head_dim_v(shape["head_dim"])) if width in (None, "") else _whole(v, "head_dim_v", 1, 2**14)
    latency = math.nan
    if need_latency or v.get("latency_s") not in (None, ""):
        latency = _number(v, "latency_s")
        if not 0 < latency <= MAX_LATENCY_S:
            raise InputError(f"latency_s must be a positive number of seconds, not {shorten(v.get('latency_s'), 24)}")
    return [*shape.values(), width_v, window, latency], _kv_dtype(v)


def _kv_dtype(values: Mapping[str, Any]) -> str:
    name = values.get("kv_dtype")
    if not isinstance(name, str) or not name.strip():
        raise InputError("kv_dtype is missing")
    granularity = str(values.get("scale_granularity") or "").strip().lower()
    suffix = GRANULAR.get(granularity)
    if suffix is not None and suffix not in name:
        name = f"{name.split('_')[0]}_{suffix}"
    try:
        found = canonical_kv_dtype(name)
    except KvplanError as error:
        raise InputError(error.message) from error
    if found == AUTO or found.endswith("_ds_mla"):
        raise InputError(f"kv_dtype {shorten(name, 24)!r} is not a plain attention format")
    return found


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if value is None or value == "" or isinstance(value, bool):
        raise InputError(f"{name} is missing")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} must be a number, not {shorten(value, 24)!r}") from error
    return number


def _whole(values: Mapping[str, Any], name: str, low: int, high: int) -> float:
    number = _number(values, name)
    if not (low <= number <= high and number == int(number)):
        raise InputError(f"{name} must be a whole number from {low} to {high:,}, not {shorten(values.get(name), 24)}")
    return number
