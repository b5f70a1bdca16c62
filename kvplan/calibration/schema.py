"""The JSON form of an attention calibration, checked field by field on the way in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvplan.calibration.attention import REGIMES, AttentionCalibration, DtypeCalibration
from kvplan.calibration.attention_model import NAMES, PARAMETERS
from kvplan.calibration.fields import Checker
from kvplan.calibration.geometry import RULES, Dispatch, Hardware
from kvplan.calibration.store import SHIPPED
from kvplan.dtypes import AUTO, canonical_kv_dtype
from kvplan.errors import KvplanError, ProfileError, shorten

SCHEMA_VERSION = 3
OTHER_SCHEMA_VERSION = 1
KIND = "attention"
KINDS = "'attention' is of plain attention, 'mla_decode' of latent: `kvplan measure --model` makes that of its model"
OTHER_KINDS = ("all_reduce", "gemm", "mla_decode", "moe")
MAX_FACTOR = 1e6
"""A parameter further than a factor of a million from its prior is absurd."""
MAX_BANDWIDTH_FRACTION = 2.0
FIGURES = {
    "intercept_s": (0.0, 60.0), "effective_bandwidth_bytes_per_s": (1e6, 1e15), "l2_bandwidth_bytes_per_s": (1e6, 1e16),
}  # fmt: skip
HARDWARE_FIELDS = {
    "peak": ("memory_bandwidth_bytes_per_s", 1e9, 1e15), "l2": ("l2_usable_bytes", 1e4, 2**40),
    "l2_sharpness": ("l2_sharpness", 1, 1000), "sms": ("num_sms", 1, 2**16),
    "flops": ("dense_bf16_flops_per_s", 1e9, 1e18), "l2_nominal": ("l2_cache_bytes", 1e4, 2**40),
}  # fmt: skip


def attention_from_json(data: Mapping[str, Any], where: str, origin: str = SHIPPED) -> AttentionCalibration:
    """A calibration from its JSON form.

    Raises:
        ProfileError: a field is missing, of the wrong type, NaN, negative or absurd; the message names it.

    """
    check = Checker(where)
    check.finite(data, "")
    if data.get("kind") != KIND:
        raise ProfileError(f"{where}: kind must be {KIND!r}, not {shorten(data.get('kind'))}", hint=KINDS)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ProfileError(
            f"{where}: schema_version must be {SCHEMA_VERSION}, not {shorten(version)}",
            hint="write the calibration again with `kvplan calibrate`",
        )
    hardware = hardware_from_json(check, data)
    fitted = check.table(data, "kv_dtypes")
    if not fitted:
        raise ProfileError(f"{where}: kv_dtypes is empty")
    dispatch = _dispatch(check, data.get("other_kernel"))
    dtypes = {_kv_dtype(check, name): _dtype(check, name, entry, dispatch) for name, entry in fitted.items()}
    ranges = {
        name: check.pair(value, f"valid_range.{name}") for name, value in check.table(data, "valid_range").items()
    }
    name = check.text(data, "name")
    engine, version = data.get("engine"), data.get("engine_version")
    for key, value in (("engine", engine), ("engine_version", version)):
        if value is not None and not isinstance(value, str):
            raise ProfileError(f"{where}: {key} must be text or null")
    samples = sum(entry.num_samples + (entry.other.num_samples if entry.other else 0) for entry in dtypes.values())
    made_with = f"{engine} {version}" if engine and version else engine or "an unnamed engine"
    date = check.text(data, "date")
    source = f"calibration {name} ({made_with}, {samples:,} samples, {date}, {origin})"
    return AttentionCalibration(
        name, check.text(data, "gpu"), engine or "", version, hardware, dtypes,
        dispatch, ranges, source, origin, date,
    )  # fmt: skip


def hardware_from_json(check: Checker, data: Mapping[str, Any]) -> Hardware:
    """The figures of the GPU in a calibration's JSON form.

    Raises:
        ProfileError: one is missing or absurd; the message names it.

    """
    figures = check.table(data, "hardware")
    return Hardware(**{
        field: check.number(figures, key, f"hardware.{key}", low, high)
        for field, (key, low, high) in HARDWARE_FIELDS.items()
    })  # type: ignore[arg-type]  # fmt: skip


def hardware_to_json(hw: Hardware) -> dict[str, float]:
    """The same figures as JSON, six digits of each."""
    return {key: float(f"{getattr(hw, field):.6g}") for field, (key, _, _) in HARDWARE_FIELDS.items()}


def check_other(data: Mapping[str, Any], where: str) -> None:
    """Check a calibration of another kernel than decode attention.

    Raises:
        ProfileError: a field is missing, of the wrong type, NaN or not positive; the message names it.

    """
    check = Checker(where)
    check.finite(data, "")
    if data.get("schema_version") != OTHER_SCHEMA_VERSION:
        raise ProfileError(f"{where}: schema_version must be {OTHER_SCHEMA_VERSION}")
    for key in ("name", "gpu", "engine", "date"):
        check.text(data, key)
    entries = check.table(data, "entries")
    for name in entries:
        at = f"entries.{name}"
        parameters = check.table(check.table(entries, name, at), "parameters", f"{at}.parameters")
        for key in parameters:
            item = check.table(parameters, key, f"{at}.parameters.{key}")
            check.number(item, "value", f"{at}.parameters.{key}.value", 1e-15, 1e18)


def _dtype(check: Checker, name: str, entry: Any, dispatch: Dispatch) -> DtypeCalibration:
    at = f"kv_dtypes.{name}"
    main = _kernel(check, at, entry)
    if dispatch.num_kernels == 1:
        return main
    return replace(main, other=_kernel(check, f"{at}.other_kernel", entry.get("other_kernel")))


def _kernel(check: Checker, at: str, entry: Any) -> DtypeCalibration:
    if not isinstance(entry, Mapping):
        raise ProfileError(f"{check.where}: {at} must be an object")
    values = check.table(entry, "parameters", f"{at}.parameters")
    unknown = set(values) - set(NAMES)
    if unknown:
        raise ProfileError(f"{check.where}: {at}.parameters.{sorted(unknown)[0]} is not a parameter of this version")
    theta, spread = [], []
    for parameter in PARAMETERS:
        path = f"{at}.parameters.{parameter.name}"
        item = values.get(parameter.name)
        if not isinstance(item, Mapping):
            raise ProfileError(f"{check.where}: {path} is missing")
        low, high = parameter.prior / MAX_FACTOR, parameter.prior * MAX_FACTOR
        if parameter.name == "bandwidth_fraction":
            high = MAX_BANDWIDTH_FRACTION
        theta.append(math.log(check.number(item, "value", f"{path}.value", low, high)))
        spread.append(check.number(item, "log_spread", f"{path}.log_spread", 0, 100))
    for key, (low, high) in FIGURES.items():
        check.number(entry, key, f"{at}.{key}", low, high)
    widths = check.table(entry, "half_width_log", f"{at}.half_width_log")
    half = {regime: check.number(widths, regime, f"{at}.half_width_log.{regime}", 1e-6, 5) for regime in REGIMES}
    samples = check.number(entry, "num_samples", f"{at}.num_samples", 0, 1e12)
    residuals = entry.get("residuals") if isinstance(entry.get("residuals"), Mapping) else {}
    covariance = _covariance(check, entry.get("covariance_log"), f"{at}.covariance_log")
    scale = check.number(entry, "interval_scale", f"{at}.interval_scale", 1e-3, 100)
    return DtypeCalibration(
        np.array(theta), np.array(spread), covariance, half, int(samples), dict(residuals or {}), scale
    )


def _kv_dtype(check: Checker, name: str) -> str:
    try:
        found = canonical_kv_dtype(name)
    except KvplanError as error:
        raise ProfileError(f"{check.where}: kv_dtypes.{shorten(name)} is not a KV dtype", hint=error.hint) from error
    if found == AUTO:
        raise ProfileError(f"{check.where}: kv_dtypes.{shorten(name)} is not one KV dtype")
    return found


def _dispatch(check: Checker, value: Any) -> Dispatch:
    rule = value.get("rule") if isinstance(value, Mapping) else 0
    if rule is not None and not (isinstance(rule, str) and rule in RULES):
        raise ProfileError(
            f"{check.where}: other_kernel must be an object whose rule is null or one of {', '.join(RULES)}"
        )
    shapes = value.get("shapes")
    if not isinstance(shapes, list):
        raise ProfileError(f"{check.where}: other_kernel.shapes must be a list")
    found = []
    for number, item in enumerate(shapes):
        shape = item if isinstance(item, Mapping) else {}
        width, windowed, group = (shape.get(key) for key in ("head_dim", "windowed", "q_heads_per_kv_head"))
        if type(width) is not int or type(windowed) is not bool or not (group is None or type(group) is int):
            raise ProfileError(
                f"{check.where}: other_kernel.shapes[{number}] needs head_dim (a whole number), windowed (true or "
                "false) and q_heads_per_kv_head (a whole number or null)"
            )
        found.append((width, windowed, group))
    return Dispatch(tuple(found), rule)


def _covariance(check: Checker, value: Any, path: str) -> np.ndarray[Any, Any] | None:
    if value is None:
        return None
    try:
        matrix = np.array(value, dtype=float)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape != (len(NAMES), len(NAMES)) or not np.isfinite(matrix).all() or (np.diag(matrix) < 0).any():
        raise ProfileError(f"{check.where}: {path} must be a {len(NAMES)}×{len(NAMES)} matrix of finite numbers")
    return matrix
