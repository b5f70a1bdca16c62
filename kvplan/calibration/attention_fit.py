"""From samples to an attention calibration: one fit over all KV dtypes at once, parameters coupled between dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan.calibration.attention import REGIMES
from kvplan.calibration.attention_model import INDEX, PARAMETERS, latency_s
from kvplan.calibration.geometry import ONE_KERNEL, Dispatch, Geometry, Hardware
from kvplan.calibration.map_fit import STAGES, Fit, fit
from kvplan.calibration.samples import Points, refused_by_kind
from kvplan.errors import InputError

Array = NDArray[Any]
LogModel = Callable[[Array], Array]
MIN_SAMPLES = 8
DEGREES_OF_FREEDOM = 2.0
KERNELS_SHARE = 0.5
"""Correlation that the prior expects between an engine's two kernels."""
NOISE_SCALES = (0.7, 1.8)
"""Width of the residual law for KV streamed from memory and for small KV, in units of the fit's stages."""
SHORT_TOKENS = 128
SHORT_SCALE = 2.0
"""Shorter contexts stray further still: kernels read them in tiles, with code of their own."""
AROUND = 0.8
"""Spreads of the prior by which further starts lie around its mean."""
ANNEAL_ROWS = 2500
"""Rows a dtype that the annealed search sees; the last stage sees all of them."""
EVIDENCE_SCALE = 2.0
"""Log evidence by which a prior must fall behind to count 1/e in the mean of priors."""
NAMED_SHARE = 0.1
DERIVED_SPREAD = 1.5
MIN_HALF_WIDTH = 0.02


@dataclass(frozen=True)
class Prior:
    """What is believed before the samples: log means per dtype and kernel, log spreads, and the engine's kernels.

    Attributes:
        name: for people.
        mean: ``[num_dtypes, num_kernels, num_parameters]``.
        spread: ``[num_parameters]``.
        dispatch: what goes to the other kernel.

    """

    name: str
    mean: Array
    spread: Array
    dispatch: Dispatch = ONE_KERNEL


@dataclass(frozen=True)
class AttentionFit:
    """A fit and the prior it came from; sample i belongs to dtype and kernel ``divmod(block[i], num_kernels)``."""

    fit: Fit
    prior: Prior
    dtypes: tuple[str, ...]
    block: Array


def built_in_prior(num_dtypes: int, slots_per_sm: float, widen: float = 1.0, dispatch: Dispatch = ONE_KERNEL) -> Prior:
    """The priors written in ``attention_model.PARAMETERS``, with ``slots_per_sm`` units at once on an SM."""
    mean = np.log([p.prior for p in PARAMETERS])
    mean[INDEX["slots_per_sm"]] = np.log(slots_per_sm)
    spread = widen * np.array([p.spread for p in PARAMETERS])
    mean = np.tile(mean, (num_dtypes, dispatch.num_kernels, 1))
    return Prior(f"built in, {slots_per_sm:g} units an SM", mean, spread, dispatch)


def precision_of(prior: Prior) -> Array:
    """Prior precision of the flattened parameters.

    ``Parameter.shared`` is the correlation between dtypes of one kernel, ``KERNELS_SHARE`` that between kernels.
    """
    num_dtypes, num_kernels, count = prior.mean.shape
    kernels = np.full((num_kernels, num_kernels), KERNELS_SHARE)
    np.fill_diagonal(kernels, 1.0)
    size = num_dtypes * num_kernels
    result = np.zeros((size, count, size, count))
    for j, parameter in enumerate(PARAMETERS):
        dtypes = np.full((num_dtypes, num_dtypes), parameter.shared)
        np.fill_diagonal(dtypes, 1.0)
        result[:, j, :, j] = np.linalg.inv(np.kron(dtypes, kernels) * prior.spread[j] ** 2)
    return result.reshape(size * count, size * count)


def log_model_of(
    points: Points, dtypes: Sequence[str], hw: Hardware, dispatch: Dispatch
) -> tuple[LogModel, Array, Array]:
    """Log latencies of all points from ``[k, num_blocks, num_parameters]``; block and noise scale of each point."""
    block = np.zeros(len(points), dtype=int)
    parts = []
    for number, dtype in enumerate(dtypes):
        rows = np.flatnonzero(points.kv_dtype == dtype)
        cases = points.take(rows).geometry(dtype)
        other = dispatch.other(cases)
        for kernel in range(dispatch.num_kernels):
            mine = np.flatnonzero(other == kernel)
            block[rows[mine]] = number * dispatch.num_kernels + kernel
            parts.append((rows[mine], cases.take(mine)))

    scale = np.empty(len(points))
    for rows, cases in parts:
        scale[rows] = noise_scale(cases, hw)

    def log_model(theta: Array) -> Array:
        result = np.empty((len(theta), len(points)))
        for b, (rows, cases) in enumerate(parts):
            if len(rows):
                result[:, rows] = np.log(latency_s(theta[:, b], cases, hw))
        return result

    return log_model, block, scale


def noise_scale(cases: Geometry, hw: Hardware) -> Array:
    """How far measurements stray from any form, relative: streamed KV least, small KV and short contexts further."""
    streamed, small = NOISE_SCALES
    scale = streamed + (small - streamed) / (1 + (cases.kv_bytes / hw.l2_nominal) ** 2)
    return np.asarray(scale * np.where(cases.context < SHORT_TOKENS, SHORT_SCALE, 1.0))


def fit_prior(
    points: Points, dtypes: tuple[str, ...], hw: Hardware, prior: Prior, *, start: Array | None = None,
    num_starts: int = 1,
) -> AttentionFit:  # fmt: skip
    """The best fit of ``points`` under one prior; from ``start``, only the last stage is run.

    The first of ``num_starts`` is the prior's mean, the others lie around it, the same ones each time.
    """
    model, block, scale = log_model_of(points, dtypes, hw, prior.dispatch)
    mean, precision = prior.mean.reshape(-1, len(PARAMETERS)), precision_of(prior)
    measured = np.log(points.latency_s)
    law: dict[str, Any] = {"scale": scale, "degrees_of_freedom": DEGREES_OF_FREEDOM}
    if start is not None:
        return AttentionFit(
            fit(model, measured, block, mean, precision, start, STAGES[-1:], 8, **law), prior, dtypes, block
        )
    generator = np.random.default_rng(0)
    around = [mean + AROUND * prior.spread * generator.standard_normal(len(PARAMETERS)) for _ in range(num_starts - 1)]
    fits = [fit(model, measured, block, mean, precision, begin, **law) for begin in (mean, *around)]
    return AttentionFit(max(fits, key=lambda found: found.evidence), prior, dtypes, block)


def best_fit(
    points: Points, dtypes: tuple[str, ...], hw: Hardware, priors: Sequence[Prior], num_starts: int = 1
) -> AttentionFit:
    """The fit whose prior the samples favour; of many samples, some choose it and all settle it."""
    some = _some(points, len(dtypes))
    fits = (fit_prior(some, dtypes, hw, prior, num_starts=num_starts) for prior in priors)
    best = max(fits, key=lambda found: found.fit.evidence)
    return best if some is points else fit_prior(points, dtypes, hw, best.prior, start=best.fit.theta)


def blended_fit(points: Points, dtypes: tuple[str, ...], hw: Hardware, priors: Sequence[Prior]) -> AttentionFit:
    """The fit under the mean of the priors, weighted by how well each explains the samples.

    Few samples seldom tell two kernels apart; the mean of those that fit predicts better than the best of them, and
    wrong samples cannot tip it from one to another. Only priors with the best one's dispatch take part.
    """
    some = _some(points, len(dtypes))
    fits: dict[str, AttentionFit] = {}
    for found in (fit_prior(some, dtypes, hw, prior) for prior in priors):
        kept = fits.get(found.prior.name)
        if kept is None or found.fit.evidence > kept.fit.evidence:
            fits[found.prior.name] = found
    best = max(fits.values(), key=lambda found: found.fit.evidence)
    close = [found for found in fits.values() if found.prior.dispatch == best.prior.dispatch]
    weight = np.exp([(found.fit.evidence - best.fit.evidence) / EVIDENCE_SCALE for found in close])
    weight /= weight.sum()
    mean, spread, start = (
        np.tensordot(weight, np.array(values), 1)
        for values in zip(*((found.prior.mean, found.prior.spread, found.fit.theta) for found in close), strict=True)
    )
    named = sorted(zip(weight, close, strict=True), key=lambda item: -item[0])
    name = "; ".join(f"{share:.0%} {found.prior.name}" for share, found in named if share >= NAMED_SHARE)
    return fit_prior(points, dtypes, hw, Prior(name, mean, spread, best.prior.dispatch), start=start)


def _some(points: Points, num_dtypes: int) -> Points:
    """All points, or as many of them as the annealed search can see."""
    limit = ANNEAL_ROWS * num_dtypes
    if len(points) <= limit:
        return points
    return points.take(np.random.default_rng(0).choice(len(points), limit, replace=False))


def usable_dtypes(points: Points) -> tuple[str, ...]:
    """KV dtypes of ``points``, bf16 first.

    Raises:
        InputError: a dtype has fewer than 8 usable samples; says why others were refused, or what to measure next.

    """
    names = sorted(set(points.kv_dtype), key=lambda name: (name != "bfloat16", name))
    if not names:
        raise _too_few(f"no usable samples: at least {MIN_SAMPLES} a KV dtype are needed", points, None)
    for name in names:
        have = points.take(points.kv_dtype == name)
        if (count := len(have)) < MIN_SAMPLES:
            samples = "sample" if count == 1 else "samples"
            text = f"{count} usable {samples} of {name}: at least {MIN_SAMPLES} a KV dtype are needed"
            raise _too_few(text, points, have)
    return tuple(names)


def _too_few(text: str, points: Points, have: Points | None) -> InputError:
    """What was refused is counted by reason: mending it comes before measuring more."""
    if not points.refused:
        return InputError(text, hint=_next(have))
    hint = f"{points.refused[0]}; check --gpu, and that latency_s is in seconds"
    return InputError(f"{text}; {refused_by_kind(points.refused)}", hint=hint)


def _next(have: Points | None) -> str:
    """What to measure: batches and contexts that are not there yet, the cheapest among which there are enough."""
    seen = set() if have is None else {
        (int(b), int(c)) for b, c in zip(have.columns["batch_size"], have.columns["context_tokens"], strict=True)
    }  # fmt: skip
    known, missing = seen or {(1, 1024)}, MIN_SAMPLES - (0 if have is None else len(have))
    wanted: list[tuple[int, int]] = []
    for power in itertools.count(1):
        steps = [4**k for k in range(power + 1)]
        batches, contexts = (sorted({*v, *(max(v) * step for step in steps)}) for v in zip(*known, strict=True))
        dearest = steps[-1] * max(b * c for b, c in known)
        wanted = [(b, c) for c in contexts for b in batches if b * c <= dearest and (b, c) not in seen]
        if len(wanted) >= missing:
            break
    spread = wanted[:: len(wanted) // missing][:missing]
    return "measure next: " + ", ".join(f"batch {b} × {c:,} tokens" for b, c in spread)


def residual_half_widths(residuals: Array, regime: Array) -> dict[str, float]:
    """Half of the 80% interval of the log latency in each regime, from residuals of many rows."""
    overall = float(np.quantile(np.abs(residuals), 0.8))
    widths = {}
    for number, name in enumerate(REGIMES):
        here = np.abs(residuals[regime == number])
        widths[name] = max(MIN_HALF_WIDTH, float(np.quantile(here, 0.8)) if len(here) >= 50 else overall)
    return widths


def learn_dispatch(points: Points) -> Dispatch:
    """Shapes served by a second kernel, where samples name their kernel: those not on the most frequent one."""
    labels, counts = np.unique(points.kernel.astype(str), return_counts=True)
    named = labels != ""
    if named.sum() < 2:
        return ONE_KERNEL
    main = labels[named][np.argmax(counts[named])]
    columns = points.columns
    group = columns["num_q_heads"] // columns["num_kv_heads"]
    votes: dict[tuple[int, bool], dict[int, list[bool]]] = {}
    for width, window, heads, label in zip(columns["head_dim"], columns["window_tokens"], group, points.kernel,
                                           strict=True):  # fmt: skip
        if label:
            votes.setdefault((int(width), bool(window)), {}).setdefault(int(heads), []).append(label != main)
    shapes: list[tuple[int, bool, int | None]] = []
    for shape, groups in sorted(votes.items()):
        other = [heads for heads, cast in sorted(groups.items()) if np.mean(cast) > 0.5]
        shapes += [(*shape, None)] if len(other) == len(groups) else [(*shape, heads) for heads in other]
    return Dispatch(tuple(shapes))


def summary(residuals: Array) -> Mapping[str, float]:
    """Residual quantiles of the log latency, and the median and p90 of its size."""
    size = np.abs(np.expm1(residuals))
    q10, q50, q90 = np.quantile(residuals, [0.1, 0.5, 0.9])
    return {
        "log_q10": float(q10), "log_q50": float(q50), "log_q90": float(q90),
        "median_error": float(np.median(size)), "p90_error": float(np.quantile(size, 0.9)),
    }  # fmt: skip
