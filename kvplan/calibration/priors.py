"""What calibrations that ship say about a kernel before it is measured: the priors a few samples are fitted under.

Several kernels are tried: "like the others" (medians and spreads over all shipped calibrations), and "like this one"
for each shipped calibration, closest for the same GPU. They are averaged by the evidence that the samples give for
each (``attention_fit.blended_fit``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan import profiles
from kvplan.calibration.attention import AttentionCalibration
from kvplan.calibration.attention_fit import Prior, built_in_prior
from kvplan.calibration.attention_model import INDEX, PARAMETERS
from kvplan.calibration.geometry import ONE_KERNEL, RULES, Dispatch
from kvplan.calibration.schema import KIND, attention_from_json
from kvplan.dtypes import kv_format

Array = NDArray[Any]
MIN_SPREAD = 0.02
SLOTS_SPREAD = 0.1
WIDEN = 1.2
LIKE_ANOTHER = 0.8
SHAPE_FACTOR = 0.5
CLOSER = 0.6
"""A second, narrower spread that each shipped calibration is tried with."""
SAME_GPU = (0.3, 0.1, 0.03)
INFORMED = 1.2
"""A calibration informs a parameter when its spread is below this many built-in spreads."""
BY_WIDTH = ("bandwidth_fraction", "unit_s")
"""Parameters whose median is taken over calibrations of the same element width only."""
SHAPE_PREFIXES = ("bandwidth_ratio", "launch_ratio", "unit_ratio", "group", "max_splits", "wide", "window", "flops",
                  "page", "sm_", "long", "tile")  # fmt: skip


def shipped(exclude: Collection[str] = ()) -> list[AttentionCalibration]:
    """The shipped attention calibrations, but for those named in ``exclude``."""
    found = []
    for name in profiles.names("calibrations"):
        data = profiles.load("calibrations", name)
        if data.get("kind") == KIND and name not in exclude:
            found.append(attention_from_json(data, f"calibration {name}"))
    return found


def candidate_priors(
    dtypes: Sequence[str], gpu: str, known: Sequence[AttentionCalibration] | None = None,
    seen: Dispatch = ONE_KERNEL,
) -> list[Prior]:  # fmt: skip
    """The priors to try for samples of ``dtypes`` on ``gpu`` (a profile's name).

    Args:
        dtypes: canonical KV dtypes, in the order of the fit's blocks.
        gpu: the GPU's profile name.
        known: calibrations to learn from; those that ship when None.
        seen: what the samples themselves say goes to the other kernel.

    """
    calibrations = shipped() if known is None else list(known)
    if not calibrations:
        return [built_in_prior(len(dtypes), slots, dispatch=seen) for slots in (1.0, 2.0)]
    narrow = [_is_narrow(name) for name in dtypes]
    means, spread = _population(calibrations)
    slots = INDEX["slots_per_sm"]
    priors = []
    for rule in (None, *RULES):
        dispatch = Dispatch(seen.shapes, rule)
        for count in (1.0, 2.0):
            mean = np.array([[means[flag]] * dispatch.num_kernels for flag in narrow])
            mean[..., slots], width = np.log(count), spread.copy()
            width[slots] = SLOTS_SPREAD
            name = f"all shipped calibrations, {count:g} units an SM" + (f", {rule}" if rule else "")
            priors.append(Prior(name, mean, width, dispatch))
    shape = np.array([p.name.startswith(SHAPE_PREFIXES) for p in PARAMETERS])
    for calibration in calibrations:
        shapes = tuple(dict.fromkeys(seen.shapes + calibration.dispatch.shapes))
        dispatch = Dispatch(shapes, calibration.dispatch.rule)
        like = np.array([_theta(calibration, flag, means)[: dispatch.num_kernels] for flag in narrow])
        factor = np.where(shape, SHAPE_FACTOR, LIKE_ANOTHER)
        closer = SAME_GPU if calibration.gpu == gpu else ()
        for scale in (factor, CLOSER * factor, *(np.full(len(factor), value) for value in closer)):
            width = np.maximum(spread * scale, MIN_SPREAD)
            width[slots] = min(SLOTS_SPREAD, width[slots])
            priors.append(Prior(f"like {calibration.name}", like, width, dispatch))
    return priors


def _population(calibrations: Sequence[AttentionCalibration]) -> tuple[dict[bool, Array], Array]:
    """Median log parameters of wide and of narrow KV, and their common spread."""
    fits = [
        (_is_narrow(dtype), kernel.theta, kernel.log_spread)
        for calibration in calibrations
        for dtype, fitted in calibration.dtypes.items()
        for kernel in (fitted, fitted.other)
        if kernel is not None
    ]
    built_in = built_in_prior(1, 1.0)
    mean, spread = built_in.mean[0, 0].copy(), built_in.spread.copy()
    means = {False: mean, True: mean.copy()}
    for j, parameter in enumerate(PARAMETERS):
        informed = [(flag, theta[j]) for flag, theta, width in fits if width[j] < INFORMED * parameter.spread]
        if len(informed) < 3:
            continue
        values = np.array([value for _, value in informed])
        middle = float(np.median(values))
        robust = 1.4826 * float(np.median(np.abs(values - middle)))
        spread[j] = max(WIDEN * float(np.sqrt((robust**2 + values.var()) / 2)), MIN_SPREAD)
        for flag in means:
            own = [value for narrow, value in informed if narrow == flag]
            means[flag][j] = np.median(own) if own and parameter.name in BY_WIDTH else middle
    return means, spread


def _theta(calibration: AttentionCalibration, narrow: bool, means: dict[bool, Array]) -> list[Array]:
    """Log parameters of both kernels for this width of KV; of its other dtype, shifted, where it has none."""
    found = next((fit for dtype, fit in calibration.dtypes.items() if _is_narrow(dtype) == narrow), None)
    shift = 0.0 if found is not None else means[narrow] - means[not narrow]
    found = found or next(iter(calibration.dtypes.values()))
    return [found.theta + shift, means[narrow] if found.other is None else found.other.theta + shift]


def _is_narrow(kv_dtype: str) -> bool:
    fmt = kv_format(kv_dtype)
    return fmt.key_bits + fmt.value_bits <= 16
