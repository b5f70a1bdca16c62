"""The hierarchy of the fit: which offsets a parameter has at which level, how far they may stray, and their columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvplan.latency.parameters import NAMES, PARAMETERS, Traits
from kvplan.traffic import Floats

Columns = npt.NDArray[np.int64]

DENSE_ONLY = {"kernel_dense_s", "matrix_dense"}
MOE_ONLY = {"kernel_moe_s", "matrix_moe", "expert_stream", "routing_evenness"}
DOUBTFUL_LEVELS = {"engine_version", "build"}
"""What rows with doubtful labels may say something about: what is odd about them stays with the version they name."""
HEAVY_LEVELS = {"deployment", "engine_version", "build", "layout"}
HEAVY_NU = 3.0
"""Levels whose offsets are Student-t, and its degrees of freedom."""

SPREADS: dict[str, dict[str, float]] = {
    "engine": {
        "weight_stream": 0.02,
        "kv_stream": 0.1,
        "kernel_dense_s": 0.2,
        "step_s": 0.3,
        "collective_s": 0.3,
        "matrix_dense": 0.15,
        "matrix_moe": 0.3,
        "expert_stream": 0.2,
        "kernel_moe_s": 0.3,
        "sequence_s": 0.4,
        "prefill_kernel_s": 0.4,
        "together_exact": 2.0,
        "together_spread": 0.5,
    },
    "gpu": {
        "weight_stream": 0.02,
        "kv_stream": 0.075,
        "kernel_dense_s": 0.05,
        "step_s": 0.2,
        "collective_s": 0.3,
        "matrix_dense": 0.05,
        "matrix_moe": 0.2,
        "expert_stream": 0.15,
        "kernel_moe_s": 0.2,
        "sequence_s": 0.1,
        "prefill_kernel_s": 0.2,
    },
    "gpu_engine": {
        "weight_stream": 0.02,
        "kv_stream": 0.075,
        "kernel_dense_s": 0.15,
        "step_s": 0.25,
        "collective_s": 0.3,
        "matrix_dense": 0.15,
        "matrix_moe": 0.2,
        "expert_stream": 0.15,
        "kernel_moe_s": 0.2,
        "sequence_s": 0.3,
        "prefill_kernel_s": 0.3,
        "together_exact": 0.3,
        "together_first": 0.3,
        "together_spread": 0.3,
    },
    "precision_engine": {
        "weight_stream": 0.025,
        "kv_stream": 0.1,
        "kernel_dense_s": 0.05,
        "matrix_dense": 0.075,
        "matrix_moe": 0.3,
        "expert_stream": 0.2,
        "kernel_moe_s": 0.2,
    },
    "precision": {
        "matrix_dense": 0.15,
        "matrix_moe": 0.2,
    },
    "family": {
        "kv_stream": 0.075,
        "kernel_dense_s": 0.1,
        "matrix_dense": 0.1,
        "matrix_moe": 0.3,
        "expert_stream": 0.2,
        "routing_evenness": 0.4,
        "kernel_moe_s": 0.3,
        "sequence_s": 0.2,
        "prefill_kernel_s": 0.2,
    },
    "family_engine": {
        "kv_stream": 0.075,
        "kernel_dense_s": 0.3,
        "matrix_dense": 0.3,
        "matrix_moe": 0.2,
        "expert_stream": 0.2,
        "kernel_moe_s": 0.2,
        "sequence_s": 0.4,
        "prefill_kernel_s": 0.3,
    },
    "build": {
        "kernel_dense_s": 0.2,
        "matrix_dense": 0.2,
        "matrix_moe": 0.2,
        "kernel_moe_s": 0.2,
    },
    "engine_version": {
        "kernel_dense_s": 0.3,
        "matrix_dense": 0.3,
        "matrix_moe": 0.1,
        "kernel_moe_s": 0.3,
        "step_s": 0.2,
        "together_exact": 1.0,
        "together_first": 1.0,
        "together_spread": 0.3,
    },
    "layout": {
        "kernel_dense_s": 0.1,
        "collective_s": 0.2,
        "expert_stream": 0.1,
        "kernel_moe_s": 0.1,
        "matrix_dense": 0.1,
        "matrix_moe": 0.1,
    },
    "deployment": {
        "weight_stream": 0.02,
        "kv_stream": 0.075,
        "kernel_dense_s": 0.15,
        "matrix_dense": 0.15,
        "matrix_moe": 0.3,
        "expert_stream": 0.2,
        "kernel_moe_s": 0.2,
        "sequence_s": 0.15,
        "prefill_kernel_s": 0.4,
        "together_exact": 0.3,
        "together_first": 0.3,
        "together_spread": 0.3,
    },
    "speculative": {
        "accepted": 0.7,
    },
    "wide": {
        "matrix_moe": 1.5,
        "kernel_moe_s": 0.5,
        "sequence_s": 1.0,
        "prefill_kernel_s": 1.5,
        "residual": 0.3,
        "kv_stream": 0.5,
        "together_spread": 2.0,
    },
}
"""Level → parameter → standard deviation of its offset. Stated, not fitted."""


class Design:
    """Which coefficient acts on which parameter of which row."""

    def __init__(self, traits: Sequence[Traits], spreads: dict[str, dict[str, float]] = SPREADS) -> None:
        self.columns: list[tuple[str, str, str]] = [("common", "", name) for name in NAMES]
        prior, seen = [parameter.spread for parameter in PARAMETERS], set()
        for level, parameters in spreads.items():
            for name, is_moe in sorted({(found, t.is_moe) for t in traits if (found := t.levels().get(level))}):
                for parameter, spread in parameters.items():
                    column = (level, name, parameter)
                    if parameter not in (DENSE_ONLY if is_moe else MOE_ONLY) and column not in seen:
                        seen.add(column)
                        self.columns.append(column)
                        prior.append(spread)
        self.spread = np.array(prior)
        self.center = np.zeros(len(self.columns))
        self.center[: len(NAMES)] = [parameter.prior_log for parameter in PARAMETERS]
        self.index = {column: i for i, column in enumerate(self.columns)}
        self.is_heavy = np.array([level in HEAVY_LEVELS for level, _, _ in self.columns])

    def prior_cost(self, beta: Floats) -> float:
        """Minus the log prior, up to a constant."""
        z2 = ((beta - self.center) / self.spread) ** 2
        return float(np.where(self.is_heavy, (HEAVY_NU + 1) / 2 * np.log1p(z2 / HEAVY_NU), z2 / 2).sum())

    def prior_precision(self, beta: Floats) -> Floats:
        """Weights of the quadratic that touches the prior at ``beta``."""
        z2 = ((beta - self.center) / self.spread) ** 2
        return np.asarray(np.where(self.is_heavy, (HEAVY_NU + 1) / (HEAVY_NU + z2), 1.0) / self.spread**2)

    def rows(self, traits: Sequence[Traits]) -> list[tuple[int, Columns]]:
        """(parameter, column of each row) pairs; a column of −1 is a level that was not fitted."""
        found = [(j, np.full(len(traits), j)) for j in range(len(NAMES))]
        levels = [t.levels() for t in traits]
        wanted = dict.fromkeys((level, parameter) for level, _, parameter in self.columns if level != "common")
        for level, parameter in wanted:
            columns = [self.index.get((level, names.get(level, ""), parameter), -1) for names in levels]
            found.append((NAMES.index(parameter), np.array(columns)))
        return found

    def informed(self, rows: list[tuple[int, Columns]], doubtful: Floats) -> list[tuple[int, Columns]]:
        """``rows`` with the columns that a row may move: all of them, or its engine version's where it is doubtful."""
        own = np.array([level in DOUBTFUL_LEVELS for level, _, _ in self.columns] + [True])
        return [(j, np.where((doubtful > 0) & ~own[columns], -1, columns)) for j, columns in rows]

    def parameters(self, beta: Floats, rows: list[tuple[int, Columns]]) -> Floats:
        """Parameters of each row, n × parameters, from what ``rows`` returned."""
        padded = np.append(beta, 0.0)
        found = np.zeros((len(rows[0][1]), len(NAMES)))
        for j, columns in rows:
            found[:, j] += padded[columns]
        return found
