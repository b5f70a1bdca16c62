"""Fit the parameters on measured deployments: a maximum a posteriori estimate over a hierarchy of offsets.

Each parameter of a row is its common value plus the offsets of the row's levels, Gaussian around zero; those of single
deployments, layouts and engine versions are Student-t, so that an odd deployment keeps its oddity to itself instead of
bending its GPU, engine and family. Residuals of ln TPOT are Student-t too: a mislabelled row has little pull. Large
groups must not outvote small ones: a row weighs √(min(1, 10 / rows of its group)). A doubtful row moves only the
offsets of the engine version it names. Requests that waited longer than they decoded did not all run at once: such a
row moves nothing where its label is doubtful or the plan has memory for all of them. Levenberg–Marquardt with
reweighted least squares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvplan.latency.hierarchy import SPREADS, Columns, Design
from kvplan.latency.load import load_state
from kvplan.latency.parameters import NAMES, Traits
from kvplan.latency.served import Served
from kvplan.latency.step import LoadFeatures, StepFeatures, load_times
from kvplan.traffic import Floats

SIGMA_TPOT = 0.08
SIGMA_TTFT = 0.35
STUDENT_NU = 4.0
EXACT_TTFT_WEIGHT = 0.03
"""Weight of TTFT where lengths are exact: enough to find ``ttft_exact``, too little to move anything else."""
GROUP_WEIGHT_ROWS = 10
ENOUGH = 0.3
"""Gain of log posterior below which, twice in a row, the fit has arrived."""
SATURATED = 0.8
"""Share of the KV capacity above which TTFT is mostly waiting for a slot, and is not fitted."""


@dataclass(frozen=True)
class Observations:
    """Rows to fit: features as arrays of n, what was measured, and what each row is called at every level."""

    step: StepFeatures
    load: LoadFeatures
    traits: tuple[Traits, ...]
    tpot_s: Floats
    ttft_s: Floats
    weight: Floats
    ttft_weight: Floats
    doubtful: Floats

    def __len__(self) -> int:
        return len(self.tpot_s)

    def take(self, rows: Floats) -> Observations:
        """The rows where ``rows`` is true."""
        picked = np.flatnonzero(rows)
        return Observations(
            StepFeatures(*(np.asarray(values)[picked] for values in self.step)),
            LoadFeatures(*(np.asarray(values)[picked] for values in self.load)),
            tuple(self.traits[i] for i in picked),
            *(v[picked] for v in (self.tpot_s, self.ttft_s, self.weight, self.ttft_weight, self.doubtful)),
        )


def observe(served: Sequence[Served], points: Sequence[tuple[float, float, float]], tpot_s: Floats, ttft_s: Floats,
            suspect: Floats) -> Observations:  # fmt: skip
    """Features of measured rows: ``points`` are (input tokens, output tokens, concurrency), lengths not stated."""
    steps, loads, limits, held = [], [], [], []
    nan = np.full(1, np.nan)
    for one, point in zip(served, points, strict=True):
        inputs, outputs, clients = (np.array([value], dtype=float) for value in point)
        step, load, _, running = load_state(one, inputs, outputs, clients, nan)
        steps.append(step)
        loads.append(load)
        ranks = one.deployment.attention_dp_size
        limits.append(float(clients[0]) / ranks <= float(running[0]) / SATURATED * 0.999)
        held.append(float(clients[0]) / ranks <= float(running[0]))
    traits = tuple(one.traits for one in served)
    groups = Counter(t.group for t in traits)
    weight = np.array([min(1.0, GROUP_WEIGHT_ROWS / groups[t.group]) ** 0.5 for t in traits])
    narrow = np.array([not t.is_wide for t in traits])
    waited = ttft_s > tpot_s * np.array([point[1] for point in points])
    weight = weight * ~(waited & ((suspect > 0) | (np.array(held) & narrow)))
    load = LoadFeatures(*(np.concatenate(column) for column in zip(*loads, strict=True)))
    return Observations(
        StepFeatures(*(np.concatenate(column) for column in zip(*steps, strict=True))),
        load, traits, tpot_s, ttft_s, weight,
        weight * np.array(limits) * narrow * np.where(load.has_spread, 1.0, EXACT_TTFT_WEIGHT), suspect,
    )  # fmt: skip


def _log_times(phi: Floats, data: Observations) -> Floats:
    times = load_times({name: phi[:, j] for j, name in enumerate(NAMES)}, data.step, data.load)
    return np.concatenate([np.log(times.tpot_s), np.log(times.ttft_s * times.burst)])


def predict(design: Design, beta: Floats, data: Observations) -> Floats:
    """TPOT and TTFT of each row under fitted coefficients, 2 × n seconds."""
    return np.asarray(np.exp(_log_times(design.parameters(beta, design.rows(data.traits)), data)).reshape(2, -1))


def fit(data: Observations, *, iterations: int = 60, spreads: dict[str, dict[str, float]] = SPREADS
        ) -> tuple[Design, Floats]:  # fmt: skip
    """The design and its coefficients, from a cold start at the priors."""
    design = Design(data.traits, spreads)
    rows, n = design.rows(data.traits), len(data)
    informed = design.informed(rows, data.doubtful)
    measured = np.log(np.concatenate([data.tpot_s, data.ttft_s]))
    sigma2 = np.concatenate([np.full(n, SIGMA_TPOT**2), np.full(n, SIGMA_TTFT**2)])
    weight = np.concatenate([data.weight, data.ttft_weight])

    def cost(beta: Floats) -> float:
        r = _log_times(design.parameters(beta, rows), data) - measured
        loss = weight * (STUDENT_NU + 1) / 2 * np.log1p(r * r / (STUDENT_NU * sigma2))
        return float(loss.sum()) + design.prior_cost(beta)

    beta, damping, idle = design.center.copy(), 1e-2, 0
    best = cost(beta)
    for _ in range(iterations):
        phi = design.parameters(beta, rows)
        now = _log_times(phi, data)
        r = now - measured
        robust = weight * (STUDENT_NU + 1) / (STUDENT_NU + r * r / sigma2) / sigma2
        slopes = np.empty((len(NAMES), 2 * n))
        for j in range(len(NAMES)):
            moved = phi.copy()
            moved[:, j] += 1e-4
            slopes[j] = (_log_times(moved, data) - now) / 1e-4
        hessian, gradient = _normal_equations(informed, slopes, robust, r, len(beta))
        precision = design.prior_precision(beta)
        hessian += np.diag(precision)
        gradient += (beta - design.center) * precision
        step, found, damping = _try_step(cost, beta, hessian, gradient, best, damping)
        if step is None:
            break
        beta = beta + step
        gained, best = best - found, found
        damping = max(damping / 4, 1e-4)
        idle = idle + 1 if gained < ENOUGH else 0
        if idle == 2:
            break
    return design, beta


def _normal_equations(rows: list[tuple[int, Columns]], slopes: Floats, robust: Floats, residuals: Floats, size: int
                      ) -> tuple[Floats, Floats]:  # fmt: skip
    """JᵀWJ and JᵀWr. The Jacobian is kept in single precision: it only steers the steps, the cost judges them."""
    used = np.flatnonzero(robust)
    position = used % len(rows[0][1])
    jacobian = np.zeros((len(used), size + 1), dtype=np.float32)
    each = np.arange(len(used))
    scale = np.sqrt(robust[used])
    for j, columns in rows:
        jacobian[each, columns[position]] += slopes[j][used] * scale
    jacobian = np.ascontiguousarray(jacobian[:, :-1])
    gradient = jacobian.T @ (scale * residuals[used]).astype(np.float32)
    return (jacobian.T @ jacobian).astype(np.float64), gradient.astype(np.float64)


def _try_step(cost: object, beta: Floats, hessian: Floats, gradient: Floats, best: float, damping: float
              ) -> tuple[Floats | None, float, float]:  # fmt: skip
    """A step that lowers the cost, with the damping it took; None when ten attempts found none."""
    assert callable(cost)
    diagonal = np.diag(np.diag(hessian))
    for _ in range(10):
        step = np.clip(-np.linalg.solve(hessian + damping * diagonal, gradient), -1, 1)
        found = cost(beta + step)
        if found < best:
            return step, found, damping
        damping *= 4
    return None, best, damping
