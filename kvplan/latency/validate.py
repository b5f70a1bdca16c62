"""How wrong the latency model is on deployments it was not fitted on: the strict protocol behind ``docs/accuracy.md``.

Every fold is fitted from a cold start, and no training row repeats a measurement of the rows held out: the public table
lists some runs under two names. Two questions: rows of known groups (5 folds), and whole (model, GPU, engine) groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvplan.latency.fit import Observations, fit, observe, predict
from kvplan.latency.request import POINT_FIELDS, make_itl_request
from kvplan.latency.serve import serve
from kvplan.latency.served import Served
from kvplan.latency.serving_rows import ServingRow, read_rows
from kvplan.traffic import Floats

NUM_FOLDS = 5
COVERED = 0.8
TAILS = tuple(thousandth / 1000 for thousandth in range(100, 19, -5))
Parts = np.ndarray[tuple[int], np.dtype[np.str_]]


@dataclass(frozen=True)
class Validation:
    """Held-out predictions of every row.

    Attributes:
        groups: model|GPU|engine of each row, the model as the table names it.
        folds: fold of each row; rows of one measurement share it.
        seen_s, unseen_s: TPOT predicted with the row's fold, or its whole group, left out; ``*_ttft_s`` likewise.

    """

    rows: tuple[ServingRow, ...]
    data: Observations
    groups: np.ndarray[tuple[int], np.dtype[np.str_]]
    folds: Floats
    seen_s: Floats
    unseen_s: Floats
    seen_ttft_s: Floats
    unseen_ttft_s: Floats

    @property
    def is_moe(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Rows of models with experts."""
        return np.asarray(self.data.step.is_moe) > 0

    @property
    def is_suspect(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Rows whose labels the table itself doubts."""
        return np.array([row.is_suspect for row in self.rows])


def load_observations(table: Path) -> tuple[tuple[ServingRow, ...], Observations]:
    """Rows of the table and their features.

    Raises:
        KvplanError: a row's request is refused.

    """
    rows = tuple(read_rows(table))
    memo: dict[tuple[tuple[str, object], ...], Served] = {}
    served = []
    for row in rows:
        fixed = {key: value for key, value in row.case.items() if key not in POINT_FIELDS}
        key = tuple(sorted(fixed.items()))
        if key not in memo:
            memo[key] = serve(make_itl_request(fixed))
        served.append(memo[key])
    points = [(r.case["input_tokens"], r.case["output_tokens"], r.case["concurrency"]) for r in rows]
    tpot, ttft, suspect = (
        np.array([getattr(r, n) for r in rows], dtype=float) for n in ("tpot_s", "ttft_s", "is_suspect")
    )
    return rows, observe(served, points, tpot, ttft, suspect)


def validate(rows: Sequence[ServingRow], data: Observations) -> Validation:
    """Predict every row held out, twice. Takes minutes."""
    text = [f"{a:.9f}|{b:.9f}" for a, b in zip(data.tpot_s, data.ttft_s, strict=True)]
    measurement = np.unique(text, return_inverse=True)[1]
    folds = np.random.default_rng(0).integers(0, NUM_FOLDS, measurement.max() + 1)[measurement]
    seen, unseen = np.empty((2, len(data))), np.empty((2, len(data)))
    for fold in range(NUM_FOLDS):
        design, beta = fit(data.take(folds != fold))
        seen[:, folds == fold] = predict(design, beta, data.take(folds == fold))
    pairs = zip(rows, data.traits, strict=True)
    groups = np.array([f"{row.case['model']}|{t.gpu}|{t.engine}" for row, t in pairs])
    for group in np.unique(groups):
        held = groups == group
        train = ~held & ~np.isin(measurement, measurement[held])
        design, beta = fit(data.take(train))
        unseen[:, held] = predict(design, beta, data.take(held))
    return Validation(tuple(rows), data, groups, folds, seen[0], unseen[0], seen[1], unseen[1])


def log_residuals(validation: Validation, predicted_s: Floats) -> Floats:
    """ln(predicted / measured) of every row."""
    return np.asarray(np.log(predicted_s / validation.data.tpot_s))


def residual_quantiles(validation: Validation) -> dict[str, list[float]]:
    """``seen_dense``, ``unseen_moe``, ``ttft_seen_exact`` … → [low, high] quantiles of held-out residuals, sound rows.

    TPOT: the widest tails outside which other folds (seen) or groups (unseen) leave at most 20% of the rows. TTFT: 10%
    and 90%.
    """
    found = {}
    for name, residuals, parts in _held_out(validation):
        tail = _tail(residuals, parts)
        found[name] = np.quantile(residuals, [tail, 1 - tail])
    spread = np.asarray(validation.data.load.has_spread) > 0
    for name, predicted in (("seen", validation.seen_ttft_s), ("unseen", validation.unseen_ttft_s)):
        residuals = np.log(predicted / validation.data.ttft_s)
        for kind, mask in (("exact", ~spread), ("spread", spread)):
            found[f"ttft_{name}_{kind}"] = np.quantile(residuals[mask & ~validation.is_suspect], [0.1, 0.9])
    return {name: [round(float(low), 4), round(float(high), 4)] for name, (low, high) in found.items()}


def coverage(validation: Validation) -> dict[str, float]:
    """Share of sound rows inside intervals made from other folds (seen) or other groups (unseen) only."""
    return {
        name: _covered(residuals, parts, _tail(residuals, parts)) for name, residuals, parts in _held_out(validation)
    }


def _held_out(validation: Validation) -> Iterator[tuple[str, Floats, Parts]]:
    """(name, residuals, part each was held out with) of sound rows."""
    for name, predicted, parts in (
        ("seen", validation.seen_s, validation.folds.astype(str)), ("unseen", validation.unseen_s, validation.groups)
    ):  # fmt: skip
        residuals = log_residuals(validation, predicted)
        for kind, mask in (("dense", ~validation.is_moe), ("moe", validation.is_moe)):
            sound = mask & ~validation.is_suspect
            yield f"{name}_{kind}", residuals[sound], parts[sound]


def _tail(residuals: Floats, parts: Parts) -> float:
    return next((tail for tail in TAILS if _covered(residuals, parts, tail) >= COVERED), TAILS[-1])


def _covered(residuals: Floats, parts: Parts, tail: float) -> float:
    inside = np.zeros(len(residuals), dtype=bool)
    for part in np.unique(parts):
        mine = parts == part
        low, high = np.quantile(residuals[~mine], [tail, 1 - tail])
        inside |= mine & (residuals >= low) & (residuals <= high)
    return float(inside.mean())
