"""The measurements that ship: which samples belong to which run, and the slopes they show."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from kvplan import profiles
from kvplan.measure.analysis import line_rows
from kvplan.samples import Sample, read_samples

SAMPLES = "h200-measure-2026-11-24.jsonl"
STEPS = "h200-steps-2026-11-24.jsonl"
STEPS_FP8_WEIGHTS = "h200-steps-fp8-weights-2026-11-24.jsonl"
PEERS = "h200-peers-2026-11-24.jsonl"
LATENT = "h200-latent-2026-11-24.jsonl"
ROOFLINE_BYTES_PER_S = 4.54e12
"""Read roofline of the runs, as they printed it."""
LATENT_ROOFLINE_BYTES_PER_S = 4.54e12
"""The same of the runs of latent attention."""
QUICK_CELLS = 27


@dataclass(frozen=True)
class Runs:
    """The shipped samples by run: quick, the same again, six formats, and the heads of an 8B model."""

    quick: list[Sample]
    again: list[Sample]
    formats: list[Sample]
    small: list[Sample]


@dataclass(frozen=True)
class LatentRuns:
    """The shipped samples of latent attention by run: quick with 16 query heads, the same again, 128 query heads."""

    quick: list[Sample]
    again: list[Sample]
    wide: list[Sample]


@dataclass(frozen=True, slots=True)
class MeasuredSlope:
    """Slope of kvplan's own kernel over context, against its 16-bit one in the same run.

    ``floor`` is what the bytes alone would give, scales included.
    """

    ratio: float
    floor: float
    device: str
    batch_size: int
    source: str


def shipped_runs() -> Runs:
    """The samples that ship."""
    found = read_samples(profiles.ROOT / "measurements" / SAMPLES).samples
    formats = QUICK_CELLS // 3 * 6
    cuts = (0, QUICK_CELLS, 2 * QUICK_CELLS, 2 * QUICK_CELLS + formats, len(found))
    return Runs(*(found[low:high] for low, high in itertools.pairwise(cuts)))


def shipped_latent() -> LatentRuns:
    """The samples of latent attention that ship."""
    found = read_samples(profiles.ROOT / "measurements" / LATENT).samples
    return LatentRuns(found[:QUICK_CELLS], found[QUICK_CELLS : 2 * QUICK_CELLS], found[2 * QUICK_CELLS :])


def shipped_steps(weights: str = "bf16") -> list[dict[str, Any]]:
    """The records of whole decode steps that ship, with ``weights`` in bf16 or fp8."""
    return _records(STEPS_FP8_WEIGHTS if weights == "fp8" else STEPS)


def shipped_peers() -> list[dict[str, Any]]:
    """Other implementations on the cells of a run of ours; ``ours_latency_s`` is our time in that run."""
    return _records(PEERS)


def _records(name: str) -> list[dict[str, Any]]:
    text = (profiles.ROOT / "measurements" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def measured_slopes() -> dict[str, MeasuredSlope]:
    """KV format → its measured slope at the largest batch of the run of all formats."""
    samples = shipped_runs().formats
    device = str(samples[0].environment["device_name"])
    rows = line_rows(samples, ROOFLINE_BYTES_PER_S)
    batch = max(row.batch_size for row in rows)
    source = f"measurements/{SAMPLES}"
    return {
        row.kv_dtype: MeasuredSlope(row.slope_ratio, row.floor, device, batch, source)
        for row in rows
        if row.batch_size == batch and row.slope_ratio is not None
    }
