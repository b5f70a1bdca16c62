"""Measured samples: their schema, an append-only file of them, and a reader that one bad line cannot stop.

A sample file is JSONL, one object a line, each written whole and synced as soon as it is taken: a run that is killed
keeps every sample before. A torn or foreign line is set aside with its number; the others are used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvplan.errors import InputError, reason, shorten

MAX_LINE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One timing of one layer's decode attention, plain or latent.

    Attributes:
        batch_size, context_tokens: sequences, and tokens of context of each.
        num_q_heads, num_kv_heads, head_dim: of one rank.
        window_tokens: sliding window, 0 for none.
        latent_dim: of latent attention, the first of the ``head_dim`` numbers of a token, which are values too; 0 for
            plain attention.
        kv_dtype: as ``kvplan dtypes`` names it; ``scale_granularity`` says what one scale covers.
        latency_s, p10_s, p90_s: median, 10th and 90th percentile of ``num_replays`` replays, of one call.
        read_bytes: K, V and per-token scales that one call has to read.
        layers: disjoint caches that the replay goes through, so that none is read from the L2 cache.
        sm_clock_hz: SM clock right after; None where the driver does not tell.
        kernel_facts: what ran: configuration, number of chunks, registers, spills, shared memory.
        environment: GPU, driver and versions.
        time: when, UTC, ISO 8601.

    """

    batch_size: int
    context_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window_tokens: int
    kv_dtype: str
    scale_granularity: str
    latency_s: float
    p10_s: float
    p90_s: float
    num_replays: int
    read_bytes: int
    layers: int
    layout: str
    block_size_tokens: int
    seed: int
    sm_clock_hz: float | None
    kernel_facts: Mapping[str, Any]
    environment: Mapping[str, Any]
    time: str
    latent_dim: int = 0

    @property
    def bytes_per_s(self) -> float:
        """Achieved read rate."""
        return self.read_bytes / self.latency_s


@dataclass(frozen=True, slots=True)
class CorruptLine:
    """A line that holds no sample: its number (from 1), what is wrong, and its text."""

    line_number: int
    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class SampleFile:
    """What a sample file holds."""

    samples: list[Sample]
    corrupt: list[CorruptLine]


_POSITIVE_INTS = (
    "batch_size", "context_tokens", "num_q_heads", "num_kv_heads", "head_dim", "num_replays", "read_bytes", "layers",
    "block_size_tokens",
)  # fmt: skip
_WHOLE = (*_POSITIVE_INTS, "window_tokens", "latent_dim", "seed")
_SECONDS = ("latency_s", "p10_s", "p90_s")
_TEXTS = ("kv_dtype", "scale_granularity", "layout", "time")


def sample_from_record(record: Mapping[str, Any]) -> Sample:
    """The sample in a parsed line; keys it does not know are left out, and plain attention need not say so.

    Raises:
        ValueError: a field is missing, of the wrong type, not positive or not finite; the message names it.

    """
    record = {"latent_dim": 0, **record}
    known = {field.name for field in fields(Sample)}
    missing = known - set(record)
    if missing:
        raise ValueError(f"{sorted(missing)[0]} is missing")
    for name in _WHOLE:
        value = record[name]
        if type(value) is not int or value < (1 if name in _POSITIVE_INTS else 0):
            raise ValueError(f"{name} is {shorten(value, 30)}")
    for name in _SECONDS:
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {shorten(value, 30)}")
    for name in _TEXTS:
        if not isinstance(record[name], str):
            raise ValueError(f"{name} is no text")
    if not isinstance(record["kernel_facts"], Mapping) or not isinstance(record["environment"], Mapping):
        raise ValueError("kernel_facts and environment must be objects")
    return Sample(**{name: record[name] for name in known})


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add ``record`` to the JSONL file ``path``: one line, one write, synced; a torn line before it is closed first.

    Raises:
        InputError: the file cannot be written (a full disk, no permission).

    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(handle, line)
            if written < len(line):
                raise OSError(28, "No space left on device")
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({reason(error)})",
            hint="what was recorded so far is kept; make room, then go on with --resume",
            code="cannot_write",
        ) from error


def append_sample(path: Path, sample: Sample) -> None:
    """Add ``sample`` to the file; see ``append_record``."""
    append_record(path, asdict(sample))


def read_samples(path: Path) -> SampleFile:
    """Every sample of ``path`` and every line that is none; a file that does not exist holds nothing.

    Raises:
        InputError: the file is there and cannot be read.

    """
    found = SampleFile([], [])
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                try:
                    found.samples.append(sample_from_record(_parsed(raw)))
                except ValueError as error:
                    text = raw[:MAX_LINE_BYTES].decode(errors="replace").rstrip("\n")
                    found.corrupt.append(CorruptLine(number, str(error), text))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
    return found


def _parsed(raw: bytes) -> Mapping[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise ValueError("longer than a million bytes")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return data
