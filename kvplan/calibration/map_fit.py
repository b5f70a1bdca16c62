"""Maximum a posteriori fits of positive parameters on few, noisy, partly wrong samples; plain numpy.

Parameters are fitted as natural logarithms with Gaussian priors; residuals ln(predicted) − ln(measured) follow a
Student-t law with few degrees of freedom, whose influence falls off with size: a sample that is three times off has
almost no pull (Lange, Little, Taylor 1989, "Robust statistical modeling using the t distribution"). The optimum is
found by Levenberg–Marquardt on iteratively reweighted least squares; the width of the law is annealed, each stage
starting where the wider one ended, which steps over local minima.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DEGREES_OF_FREEDOM = 3.0
STEP = 3e-3
MAX_STEP = 0.7
STAGES = (0.4, 0.15, 0.05)


@dataclass(frozen=True)
class Fit:
    """Where a fit ended.

    Attributes:
        theta: log parameters, ``[num_blocks, num_parameters]``.
        covariance: of the flattened ``theta`` (inverse of the Gauss–Newton Hessian).
        cost: negative log posterior, up to a constant.
        evidence: Laplace approximation of the log evidence, for choosing between priors.
        residuals: ln(measured) − ln(predicted), one a sample.

    """

    theta: Array
    covariance: Array
    cost: float
    evidence: float
    residuals: Array


def fit(
    log_model: Callable[[Array], Array],
    log_measured: Array,
    block: Array,
    mean: Array,
    precision: Array,
    start: Array | None = None,
    stages: tuple[float, ...] = STAGES,
    iterations: int = 25,
    *,
    scale: Array | float = 1.0,
    degrees_of_freedom: float = DEGREES_OF_FREEDOM,
) -> Fit:
    """The parameters with the highest posterior.

    Args:
        log_model: ``[k, num_blocks, num_parameters]`` log parameters → ``[k, n]`` log predictions. Sample i may depend
            on block ``block[i]`` only.
        log_measured: ``[n]``.
        block: ``[n]``, which block of parameters each sample depends on.
        mean: prior mean, ``[num_blocks, num_parameters]``.
        precision: prior precision of the flattened parameters.
        start: where to begin; the prior mean when None.
        stages: widths of the residual law (log units), wide to narrow.
        iterations: at most this many steps a stage.
        scale: ``[n]``, how wide each sample's residual law is, in units of the stages' widths.
        degrees_of_freedom: of the residual law; fewer give wrong samples less pull.

    """
    theta = mean.copy() if start is None else start.copy()
    cost, hessian = 0.0, precision
    for sigma in stages:
        theta, cost, hessian = _descend(
            log_model, log_measured, block, mean, precision, theta, sigma * scale, degrees_of_freedom, iterations
        )
    residuals = log_measured - log_model(theta[None])[0]
    evidence = -cost - 0.5 * float(np.linalg.slogdet(hessian)[1] - np.linalg.slogdet(precision)[1])
    return Fit(theta, np.linalg.inv(hessian), cost, evidence, residuals)


def jacobian(log_model: Callable[[Array], Array], theta: Array, block: Array, base: Array) -> Array:
    """d(log prediction)/d(log parameter), ``[n, num_blocks · num_parameters]``, by forward differences."""
    num_blocks, count = theta.shape
    moved = theta[None] + STEP * np.eye(count)[:, None, :]
    slopes = (log_model(moved) - base) / STEP
    result = np.zeros((len(block), num_blocks * count))
    columns = block[:, None] * count + np.arange(count)
    np.put_along_axis(result, columns, slopes.T, axis=1)
    return result


def _descend(
    log_model: Callable[[Array], Array], log_measured: Array, block: Array, mean: Array, precision: Array,
    theta: Array, sigma: Array | float, nu: float, iterations: int,
) -> tuple[Array, float, Array]:  # fmt: skip
    def cost_of(point: Array, predicted: Array) -> float:
        misfit = (nu + 1) / 2 * np.log1p((predicted - log_measured) ** 2 / (nu * sigma**2)).sum()
        away = (point - mean).ravel()
        return float(misfit + 0.5 * away @ precision @ away)

    predicted = log_model(theta[None])[0]
    cost, damping = cost_of(theta, predicted), 1e-2
    hessian = precision
    for _ in range(iterations):
        residual = predicted - log_measured
        slopes = jacobian(log_model, theta, block, predicted)
        weight = (nu + 1) / (nu + (residual / sigma) ** 2) / sigma**2
        hessian = (slopes * weight[:, None]).T @ slopes + precision
        gradient = slopes.T @ (weight * residual) + precision @ (theta - mean).ravel()
        before = cost
        for _ in range(6):
            step = -np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
            tried = theta + np.clip(step, -MAX_STEP, MAX_STEP).reshape(theta.shape)
            tried_predicted = log_model(tried[None])[0]
            tried_cost = cost_of(tried, tried_predicted)
            if tried_cost < cost:
                theta, predicted, cost, damping = tried, tried_predicted, tried_cost, max(damping / 5, 1e-5)
                break
            damping *= 4
        if before - cost < 1e-4:
            break
    return theta, cost, hessian
