"""The folder of a run: what was asked, where it ran, and every record as it was taken.

::

    request.json        what to measure; --resume reads it
    environment.json    GPU, driver, versions
    gates.jsonl         each family against the reference
    roofline.jsonl      read rates
    samples.jsonl       one line a timed cell (``kvplan.samples``); `kvplan calibrate` reads it
    peers.jsonl         other implementations on the same cells
    calibrations.jsonl  where a calibration of the samples was written
    corrupt.txt         lines of samples.jsonl that hold no sample, set aside with their numbers
    report.json         what --json prints, once the run is through
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvplan.errors import InputError, reason, shorten
from kvplan.files import write_text
from kvplan.measure.backend import Environment
from kvplan.measure.plan import MeasureRequest, request_from_dict
from kvplan.samples import CorruptLine, Sample, append_record, append_sample, read_samples

MUST_MATCH = ("gpu", "device_name", "kind", "torch", "triton", "kvplan")
DEFAULT_PARENT = "kvplan-runs"
TEXTS = {"peers": ("name", "kv_dtype"), "steps": ("kv_dtype",)}
COUNTS = {
    "peers": ("num_q_heads", "num_kv_heads", "head_dim", "batch_size", "context_tokens", "read_bytes"),
    "steps": ("batch_size", "context_tokens", "distinct_layers"),
}
SECONDS = ("latency_s", "p10_s", "p90_s")


def cell_key(sample: Sample) -> tuple[Any, ...]:
    """The key of the cell a sample was taken of; see ``plan.Cell.key``."""
    return (sample.num_q_heads, sample.num_kv_heads, sample.head_dim, sample.window_tokens, sample.kv_dtype,
            sample.batch_size, sample.context_tokens)  # fmt: skip


class RunFolder:
    """One run's folder, open for adding records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def samples_path(self) -> Path:
        """The sample file."""
        return self.path / "samples.jsonl"

    def samples(self) -> tuple[list[Sample], list[CorruptLine]]:
        """The samples so far, and the lines that hold none; those are copied to ``corrupt.txt``."""
        found = read_samples(self.samples_path)
        if found.corrupt:
            lines = [f"line {line.line_number}: {line.reason}: {line.text}" for line in found.corrupt]
            write_text(self.path / "corrupt.txt", "\n".join(lines) + "\n", force=True)
        return found.samples, found.corrupt

    def add_sample(self, sample: Sample) -> None:
        """Append a sample."""
        append_sample(self.samples_path, sample)

    def add(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append a record to ``KIND.jsonl``, with the time."""
        append_record(self.path / f"{kind}.jsonl", {**record, "time": timestamp()})

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The whole records of ``KIND.jsonl``, in order; lines that hold none are passed over."""
        try:
            text = (self.path / f"{kind}.jsonl").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        found = []
        for line in text.splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if isinstance(data, dict) and _is_whole(data, kind):
                found.append(data)
        return found

    def has_calibrated(self) -> bool:
        """Whether a calibration of the run's samples was ever written."""
        return bool(self.records("calibrations"))

    def write_report(self, text: str) -> None:
        """Write ``report.json``."""
        write_text(self.path / "report.json", text, force=True)


def _is_whole(record: Mapping[str, Any], kind: str) -> bool:
    """Whether what was timed has what its kind is read for; of other kinds nothing is asked."""
    if kind not in COUNTS:
        return True
    texts = all(isinstance(record.get(name), str) for name in TEXTS[kind])
    counts = all(type(record.get(name)) is int and record[name] > 0 for name in COUNTS[kind])
    return texts and counts and all(type(record.get(name)) is float and 0 < record[name] < 1e6 for name in SECONDS)


def timestamp() -> str:
    """Now, UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def default_path(gpu: str) -> Path:
    """``kvplan-runs/GPU-YYYYMMDD-HHMMSS``."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", gpu)[:60]
    return Path(DEFAULT_PARENT) / f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}"


def create(path: Path, request: MeasureRequest, environment: Environment) -> RunFolder:
    """A new run in ``path``.

    Raises:
        InputError: it holds a run already, or cannot be written.

    """
    if (path / "request.json").exists() or (path / "samples.jsonl").exists():
        raise InputError(f"{path} holds a run already", hint=f"go on with --resume {path}, or choose another -o")
    write_text(
        path / "environment.json",
        json.dumps({**environment.as_dict(), "time": timestamp()}, indent=2) + "\n",
        force=True,
    )
    write_text(path / "request.json", json.dumps(request.as_dict(), indent=2) + "\n", force=True)
    return RunFolder(path)


def read_request(path: Path) -> MeasureRequest:
    """What the run in ``path`` was asked to measure.

    Raises:
        InputError: there is no run, or its request cannot be read.

    """
    return request_from_dict(_read(path / "request.json", path), str(path / "request.json"))


def reopen(path: Path, environment: Environment) -> RunFolder:
    """The run in ``path``, to go on with.

    Raises:
        InputError: it was taken on another GPU or with other versions; the message says which.

    """
    before = _read(path / "environment.json", path)
    for name in MUST_MATCH:
        then, now = before.get(name), getattr(environment, name)
        if then != now:
            what = {"gpu": "GPU", "device_name": "GPU", "kind": "device"}.get(name, name)
            raise InputError(
                f"{path} was taken with {what} {shorten(then, 60)}, this is {shorten(now, 60)}",
                hint="samples of two machines or versions make no run; start a new one without --resume",
                code="other_environment",
            )
    return RunFolder(path)


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} holds no run to go on with ({path.name}: {reason(error)})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON", hint="start a new run without --resume") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a JSON object", hint="start a new run without --resume")
    return data
