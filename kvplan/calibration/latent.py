"""Latent (MLA) decode attention as measured: a small form, its fit, and predictions with it.

B sequences of N tokens, H query heads of a rank on one row of 512 + 64 numbers, b bytes a token::

    t = launch_s + chain_s·log2(1 + N/256) + (stream² + products² + (sequence_s·B/SMs)²)^½
    stream   = B·N'·b / (peak · bandwidth_fraction)            N' = (N³ + page_tokens³)^⅓
    products = 2·B·N'·max(H, T)·1088 / (bf16 FLOPs · flops_fraction)

T is ``tile_rows``, the fewest query rows that a program multiplies with: 64 in engines' kernels, 16 in kvplan's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan.calibration import store
from kvplan.calibration.attention_fit import MIN_SAMPLES
from kvplan.calibration.attention_model import Parameter
from kvplan.calibration.fields import Checker
from kvplan.calibration.geometry import Hardware, hardware_of
from kvplan.calibration.other_kernels import Table, fitted_document, read_columns
from kvplan.calibration.schema import KINDS, check_other, hardware_from_json, hardware_to_json
from kvplan.errors import InputError, ProfileError, shorten
from kvplan.gpu import GpuSpec
from kvplan.samples import Sample

Array = NDArray[Any]
KIND = "mla_decode"
LATENT, ROPE = 512, 64
FLOPS_PER_ROW = 2 * (2 * LATENT + ROPE)
"""Of one query head with one token: both products."""
ENGINE_TILE_ROWS = 64
RANGE = (1e-15, 1e18)
"""Of a parameter in a file."""
USELESS_ERROR = 0.5
"""Median error on its own samples above which a fit says nothing about others."""

MLA = (
    Parameter("launch_s", 1e-5, 0.5, "s", "launch and everything that does not grow"),
    Parameter("chain_s", 1e-6, 0.6, "s", "dependent steps, for each doubling of the context beyond 256"),
    Parameter("bandwidth_fraction", 0.8, 0.1, "of peak", "latent streamed from memory"),
    Parameter("flops_fraction", 0.4, 0.5, "of peak bf16", "matrix work"),
    Parameter("page_tokens", 128.0, 0.6, "tokens", "tokens a short context reads anyway"),
    Parameter("sequence_s", 4e-6, 0.8, "s", "fixed work for one sequence, per SM"),
)
ANY_FLOPS_SPREAD = 2.0
"""Of ``flops_fraction``, in the fit of samples of any device."""


@dataclass(frozen=True)
class LatentCases:
    """Latent decode attention, one element a case; arrays of one length (floats). ``heads`` are of one rank."""

    batch: Array
    context: Array
    heads: Array
    token_bytes: Array

    def take(self, rows: Array) -> LatentCases:
        """The cases at ``rows`` (indices or a mask)."""
        return LatentCases(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def mla_s(theta: Array, cases: LatentCases, hw: Hardware, tile_rows: int = ENGINE_TILE_ROWS) -> Array:
    """Seconds of one layer's latent attention; log parameters ``[..., 6]`` and ``n`` cases to ``[..., n]``."""
    p = np.exp(theta)[..., None]
    launch, chain, bandwidth, flops, page, sequence = (p[..., j, :] for j in range(len(MLA)))
    tokens = cases.batch * np.cbrt(cases.context**3 + page**3)
    stream = tokens * cases.token_bytes / (hw.peak * bandwidth)
    products = tokens * np.maximum(cases.heads, tile_rows) * FLOPS_PER_ROW / (hw.flops * flops)
    body = np.sqrt(stream**2 + products**2 + (sequence * cases.batch / hw.sms) ** 2)
    return np.asarray(launch + chain * np.log2(1 + cases.context / 256) + body)


def mla_document(path: Path, about: Mapping[str, Any], gpu: GpuSpec) -> dict[str, Any]:
    """The calibration of a table of an engine's kernel: one entry a KV dtype."""
    table = read_columns(path)
    labels = table["kv_cache_dtype"]
    batch, context, heads = (table[name].astype(float) for name in ("batch_size", "context_tokens", "num_heads"))
    width = np.where(np.char.startswith(labels.astype(str), "fp8"), 1.0, 2.0)
    cases = LatentCases(batch, context, heads, width * (LATENT + ROPE))
    return _document(about, cases, labels, table["latency_s"].astype(float), hardware_of(gpu), MLA, ENGINE_TILE_ROWS)


def samples_document(
    samples: Sequence[Sample], about: Mapping[str, Any], gpu: GpuSpec, tile_rows: int
) -> dict[str, Any]:
    """The calibration of measured samples of latent attention: one entry a KV dtype.

    Raises:
        InputError: a KV dtype has fewer than 8 samples, or half of them are far from the best fit; or bandwidth, L2 or
            SM count of ``gpu`` are unknown.

    """
    columns = [
        np.array([float(getattr(sample, name)) for sample in samples])
        for name in ("batch_size", "context_tokens", "num_q_heads", "latency_s", "read_bytes")
    ]
    batch, context, heads, latency_s, read = columns
    labels = np.array([_entry(sample.kv_dtype) for sample in samples])
    for name, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if count < MIN_SAMPLES:
            raise InputError(
                f"{count} usable samples of {name}: at least {MIN_SAMPLES} a KV dtype are needed",
                hint="measure more batches and contexts",
            )
    cases = LatentCases(batch, context, heads, read / batch / context)
    hw = hardware_of(gpu)
    document = _document(about, cases, labels, latency_s, hw, _start(cases, latency_s, hw, tile_rows), tile_rows)
    for name, entry in document["entries"].items():
        if (error := entry["residuals"]["median_error"]) > USELESS_ERROR:
            raise InputError(f"no calibration comes of the samples of {name}: half of them are more than {error:.0%} "
                             "away from the best fit")  # fmt: skip
    return document


def _entry(kv_dtype: str) -> str:
    """The name that a KV dtype's parameters go by: one for both names of e4m3."""
    return "fp8" if kv_dtype == "fp8_e4m3" else kv_dtype


def _start(cases: LatentCases, latency_s: Array, hw: Hardware, tile_rows: int) -> tuple[Parameter, ...]:
    """Where a fit of samples of any device starts: at the products a second that it is seen to reach at least."""
    flops = cases.batch * cases.context * np.maximum(cases.heads, tile_rows) * FLOPS_PER_ROW
    least = float((flops / latency_s).max() / hw.flops)
    return tuple(replace(p, prior=least, spread=ANY_FLOPS_SPREAD) if p.name == "flops_fraction" else p for p in MLA)


def _document(
    about: Mapping[str, Any], cases: LatentCases, labels: Array, latency_s: Array, hw: Hardware,
    parameters: Sequence[Parameter], tile_rows: int,
) -> dict[str, Any]:  # fmt: skip
    def model(theta: Array, rows: Array, _: str) -> Array:
        return mla_s(theta, cases.take(rows), hw, tile_rows)

    ranges = {"batch_size": cases.batch, "context_tokens": cases.context, "num_heads": cases.heads}
    table = Table(latency_s, labels, ranges, shape=cases.batch * 1e9 + cases.heads)
    about = {**about, "hardware": hardware_to_json(hw), "tile_rows": tile_rows}
    return fitted_document(about, KIND, parameters, table, model)


@dataclass(frozen=True)
class LatentCalibration:
    """Latent decode attention of one engine on one GPU.

    Attributes:
        num_heads: the fewest and the most query heads of a rank that were measured.
        entries: canonical KV dtype → log parameters, in the order of ``MLA``.
        source: one line for people: engine, version, samples, where from.

    """

    name: str
    gpu: str
    engine: str
    hardware: Hardware
    tile_rows: int
    num_heads: tuple[float, float]
    entries: Mapping[str, Array]
    source: str

    def covers(self, num_heads: int) -> bool:
        """Whether so many query heads a rank lie within what was measured."""
        return self.num_heads[0] <= num_heads <= self.num_heads[1]

    def slope_s(self, kv_dtype: str, num_heads: int, token_bytes: float) -> float | None:
        """Seconds that one sequence's token of context adds to a layer; None for a KV dtype that was not measured."""
        entry = self.entries.get(_entry(kv_dtype))
        if entry is None:
            return None
        values = dict(zip((p.name for p in MLA), np.exp(entry), strict=True))
        stream = token_bytes / (self.hardware.peak * values["bandwidth_fraction"])
        rows = max(num_heads, self.tile_rows)
        return float(np.hypot(stream, FLOPS_PER_ROW * rows / (self.hardware.flops * values["flops_fraction"])))

    def latency_s(
        self, kv_dtype: str, batch: int, context_tokens: int, num_heads: int, token_bytes: int
    ) -> float | None:
        """Seconds of one layer; None for a KV dtype or a number of heads that was not measured.

        What products take is told by no other format or number of heads.
        """
        entry = self.entries.get(_entry(kv_dtype))
        if entry is None or not self.covers(num_heads):
            return None
        one = (np.array([float(value)]) for value in (batch, context_tokens, num_heads, token_bytes))
        return float(mla_s(entry, LatentCases(*one), self.hardware, self.tile_rows)[0])


def latent_from_json(data: Mapping[str, Any], where: str, origin: str) -> LatentCalibration:
    """A calibration from its JSON form.

    Raises:
        ProfileError: a field is missing, of the wrong type, NaN or not positive; the message names it.

    """
    if data.get("kind") != KIND:
        raise ProfileError(f"{where}: kind must be {KIND!r}, not {shorten(data.get('kind'))}", hint=KINDS)
    check_other(data, where)
    check = Checker(where)
    entries = {}
    for label, entry in data["entries"].items():
        given, at = entry["parameters"], f"entries.{label}.parameters"
        values = [check.number(check.table(given, p.name, f"{at}.{p.name}"), "value", p.name, *RANGE) for p in MLA]
        entries[label] = np.log(values)
    made_with = " ".join(part for part in (data["engine"], data.get("engine_version")) if part)
    samples = int(check.number(data, "num_samples", "num_samples", 0, 1e12))
    return LatentCalibration(
        data["name"], data["gpu"], data["engine"], hardware_from_json(check, data),
        int(check.number(data, "tile_rows", "tile_rows", 1, 1024)),
        check.pair(check.table(data, "valid_range").get("num_heads"), "valid_range.num_heads"), entries,
        f"calibration {data['name']} ({made_with}, {samples:,} samples, {data['date']}, {origin})",
    )  # fmt: skip


def find_latent(gpu_name: str, engine: str, num_heads: int) -> LatentCalibration | None:
    """The calibration of ``engine`` on ``gpu_name`` that covers ``num_heads``, measured here or shipped; or None.

    Raises:
        ProfileError: a calibration file breaks its schema.

    """
    return next((calibration for _, calibration in matching_latent(gpu_name, engine, num_heads)), None)


def matching_latent(gpu_name: str, engine: str, num_heads: int) -> Iterator[tuple[store.Found, LatentCalibration]]:
    """All of them with the file each was read from, the one to use first.

    Raises:
        ProfileError: a calibration file breaks its schema.

    """
    for found in store.matching(KIND, gpu_name, engine):
        calibration = latent_from_json(found.data, found.where, found.origin)
        if calibration.covers(num_heads):
            yield found, calibration


def read_latent(path: Path, gpu_name: str, num_heads: int) -> LatentCalibration:
    """The latent-attention calibration in ``path``, which must be of ``gpu_name``, cover ``num_heads`` and have bf16.

    Raises:
        ProfileError: it cannot be read, breaks its schema, is of another GPU or number of query heads, or lacks the 16
            bits that others are held against.

    """
    found = latent_from_json(store.read(path), str(path), store.GIVEN)
    if found.gpu != gpu_name:
        raise ProfileError(f"{path}: a calibration of {shorten(found.gpu, 40)}, not of {gpu_name}",
                           hint="calibrate on this GPU, or leave --calibration out")  # fmt: skip
    if not found.covers(num_heads):
        low, high = found.num_heads
        of = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
        raise ProfileError(f"{path}: of {of} query heads a rank, here are {num_heads}",
                           hint="measure with the same --tp, or leave --calibration out")  # fmt: skip
    if "bfloat16" not in found.entries:
        raise ProfileError(f"{path}: no samples in bf16, which other formats are held against",
                           hint="measure with --kv-cache-dtype bf16,fp8, or leave --calibration out")  # fmt: skip
    return found
