"""The named parameters of the latency model, and what calibrations on public serving measurements made of them.

Every parameter is a logarithm (``together_*``: a logit) and the sum of a common value and offsets of the levels a
deployment belongs to: engine and its version, GPU, precision, model family, parallel layout, and some of them together.
A ``build`` is an engine version as it runs one family: fused kernels come model by model.
A level never measured has no offset, so an unknown GPU, engine or model gets the common value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import Any, NamedTuple

from kvplan import profiles
from kvplan.calibration.fields import Checker
from kvplan.errors import ProfileError
from kvplan.memory.request import Source

SCHEMA_VERSION = 1
PROFILE = "serving"


class Parameter(NamedTuple):
    """A parameter: what it means, the value assumed before any measurement, and how sure that is.

    Attributes:
        prior: value in its own unit (a fraction, seconds, a logit).
        spread: standard deviation of its logarithm (of the logit itself).

    """

    name: str
    prior: float
    spread: float
    meaning: str
    is_log: bool = True

    @property
    def prior_log(self) -> float:
        """The prior as fitted: its logarithm, or itself."""
        return log(self.prior) if self.is_log else self.prior


PARAMETERS: tuple[Parameter, ...] = (
    Parameter("weight_stream", 0.85, 0.06, "share of peak bandwidth that weights stream at, before it bends at 1"),
    Parameter(
        "expert_stream",
        0.7,
        0.3,
        "the same of routed experts",
    ),
    Parameter("kv_stream", 0.6, 0.3, "share of peak bandwidth that 16-bit KV is read at, before it bends at 1"),
    Parameter("routing_evenness", 2.0, 0.7, "shape of experts' popularity: large is uniform routing"),
    Parameter("kernel_dense_s", 3e-6, 0.5, "time of each kernel of a layer that nothing else explains, dense models"),
    Parameter("kernel_moe_s", 3.5e-6, 0.5, "the same in models with experts"),
    Parameter("step_s", 6e-4, 0.6, "time of a step: scheduling, sampling, output"),
    Parameter("sequence_s", 8e-6, 0.7, "time of a step for each sequence in it"),
    Parameter("collective_s", 4.6e-6, 0.25, "latency of one small all-reduce on Hopper NVLink"),
    Parameter("matrix_dense", 0.5, 0.3, "share of dense peak FLOPs of matrix products, dense models"),
    Parameter("matrix_moe", 0.2, 0.5, "the same in models with experts"),
    Parameter("prefill_attention", 0.6, 0.1, "share of dense 16-bit peak FLOPs of attention over a prompt"),
    Parameter("prefill_kernel_s", 2.5e-5, 0.6, "the same in a step with a prompt in it (no graph, eager launches)"),
    Parameter("together_exact", -1.0, 1.0, "logit: prompts that arrive together when lengths are exact", False),
    Parameter("together_first", 0.0, 1.0, "logit: the same where prompts run before decoding: half of a wave", False),
    Parameter("together_spread", -2.0, 1.0, "logit: the same when lengths are spread", False),
    Parameter(
        "ttft_exact", 1.0, 1.0, "TTFT over the steady state's where lengths are exact: short runs start in a burst"
    ),
    Parameter("accepted", 1.0, 1e-6, "tokens a step yields of each sequence: more only with speculative decoding"),
    Parameter("residual", 1.0, 1e-6, "everything else; only deployments wider than a node have it"),
)
NAMES = tuple(parameter.name for parameter in PARAMETERS)


@dataclass(frozen=True, slots=True)
class Traits:
    """What a deployment is called at each level that carries offsets.

    Attributes:
        is_wide: attention data parallel, one GPU each, and experts over part of a rack that NVLink joins: GPUs that
            only decode, while others prefill, is what was measured of it.
        is_beyond_node: any other stage of more GPUs than a node has, of which nothing was measured.

    """

    engine: str
    gpu: str
    precision: str
    family: str
    is_moe: bool = False
    is_wide: bool = False
    is_beyond_node: bool = False
    is_speculative: bool = False
    engine_version: str = "unstated"
    layout: str = "TP 1"

    def levels(self) -> dict[str, str]:
        """Level → its name for this deployment; absent where it does not apply."""
        found = {
            "engine": self.engine,
            "gpu": self.gpu,
            "gpu_engine": f"{self.gpu}|{self.engine}",
            "precision": self.precision,
            "precision_engine": f"{self.precision}|{self.engine}",
            "family": self.family,
            "family_engine": f"{self.family}|{self.engine}",
            "engine_version": f"{self.engine}|{self.engine_version}",
            "build": f"{self.family}|{self.engine}|{self.engine_version}",
            "layout": f"{self.family}|{self.engine}|{self.layout}",
            "deployment": f"{self.family}|{self.gpu}|{self.engine}|{self.precision}",
        }
        if self.is_speculative:
            found["speculative"] = "speculative"
        if self.is_wide:
            found["wide"] = "wide"
        return found

    @property
    def group(self) -> str:
        """The model family, GPU and engine: what leave-one-group-out leaves out."""
        return f"{self.family}|{self.gpu}|{self.engine}"


@dataclass(frozen=True)
class ServingCalibration:
    """Parameters fitted on served deployments.

    Attributes:
        common: parameter → logarithm.
        offsets: (level, name) → parameter → offset of the logarithm.
        groups: family|gpu|engine → measurements it was fitted on.
        gpu_engines: gpu|engine → measurements.
        residuals: ``seen_dense``, ``unseen_moe`` … → [10%, 90%] quantiles of ln(predicted / measured), held out.
        valid_range: quantity → [smallest, largest].

    """

    common: Mapping[str, float]
    offsets: Mapping[tuple[str, str], Mapping[str, float]]
    groups: Mapping[str, int]
    gpu_engines: Mapping[str, int]
    residuals: Mapping[str, tuple[float, float]]
    valid_range: Mapping[str, tuple[float, float]]
    num_rows: int
    source: str
    date: str

    def parameters(self, traits: Traits) -> dict[str, float]:
        """The logarithms for one deployment."""
        found = dict(self.common)
        for level in traits.levels().items():
            for name, offset in self.offsets.get(level, {}).items():
                found[name] += offset
        return found

    def covers(self, traits: Traits) -> bool:
        """Whether anything was measured on the GPU and engine, on as many GPUs."""
        return f"{traits.gpu}|{traits.engine}" in self.gpu_engines and not traits.is_beyond_node

    def status(self, traits: Traits) -> tuple[Source, str]:
        """(source, words) of a prediction for ``traits``."""
        if traits.is_beyond_node:
            return "assumed", f"nothing was measured of {traits.layout}: efficiencies of one node ({self.source})"
        here = self.gpu_engines.get(f"{traits.gpu}|{traits.engine}", 0)
        seen = self.groups.get(traits.group, 0)
        if seen:
            return "calibrated", f"{seen:,} measurements of this model, GPU and engine ({self.source})"
        if here:
            return "calibrated", f"{here:,} measurements of other models on this GPU and engine ({self.source})"
        return (
            "assumed",
            f"no measurement of {traits.engine} on {traits.gpu}: roofline times efficiencies of other GPUs",
        )


@lru_cache(maxsize=1)
def serving_calibration() -> ServingCalibration:
    """The bundled calibration.

    Raises:
        ProfileError: the file breaks its schema; the message names the field.

    """
    return calibration_from_profile(profiles.load("calibrations", PROFILE), f"calibration {PROFILE}")


def calibration_from_profile(data: Mapping[str, Any], where: str) -> ServingCalibration:
    """A ``ServingCalibration`` from its JSON, every number checked.

    Raises:
        ProfileError: a field is missing, of the wrong type, NaN or absurd; the message names it.

    """
    check = Checker(where)
    check.finite(data, "")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ProfileError(f"{where}: schema_version must be {SCHEMA_VERSION}")
    common = {}
    values = check.table(data, "common")
    for parameter in PARAMETERS:
        path = f"common.{parameter.name}"
        value = check.number(values, parameter.name, path, -50, 1e6)
        if parameter.is_log and value <= 0:
            raise ProfileError(f"{where}: {path} must be above 0")
        common[parameter.name] = log(value) if parameter.is_log else value
    offsets: dict[tuple[str, str], dict[str, float]] = {}
    levels = check.table(data, "offsets")
    for level in levels:
        names = check.table(levels, level, f"offsets.{level}")
        for name in names:
            at = f"offsets.{level}.{name}"
            entries = check.table(names, name, at)
            unknown = next((key for key in entries if key not in NAMES), None)
            if unknown is not None:
                raise ProfileError(f"{where}: {at}.{unknown} is not a parameter of this version")
            offsets[level, name] = {key: check.number(entries, key, f"{at}.{key}", -5, 5) for key in entries}
    return ServingCalibration(
        common=common,
        offsets=offsets,
        groups=_counts(check, data, "groups"),
        gpu_engines=_counts(check, data, "gpu_engines"),
        residuals=_pairs(check, data, "residuals"),
        valid_range=_pairs(check, data, "valid_range"),
        num_rows=int(check.number(data, "num_rows", "num_rows", 1, 1e9)),
        source=str(data.get("source", where)),
        date=str(data.get("date", "")),
    )


def _counts(check: Checker, data: Mapping[str, Any], key: str) -> dict[str, int]:
    values = check.table(data, key)
    return {name: int(check.number(values, name, f"{key}.{name}", 0, 1e9)) for name in values}


def _pairs(check: Checker, data: Mapping[str, Any], key: str) -> dict[str, tuple[float, float]]:
    values = check.table(data, key)
    return {name: check.pair(value, f"{key}.{name}", -1e12, 1e12) for name, value in values.items()}
