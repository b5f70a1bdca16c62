"""What each KV format is and where it can be used: bytes, scales, engines, GPUs, and the slope it has in an engine.

Where a format is taken is asked of the rule sets themselves, with a model of plain attention, or of sparse latent
attention for the formats made for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvplan.calibration import store
from kvplan.calibration.attention import AttentionCalibration
from kvplan.calibration.schema import KIND, attention_from_json
from kvplan.dtypes import KV_FORMATS, KvFormat
from kvplan.errors import InputError
from kvplan.gpu import gpu_names, load_gpu
from kvplan.memory.engines import ENGINES
from kvplan.memory.engines.options import EngineOptions
from kvplan.model_config import resolve_model

HEAD_DIM = 128
PLAIN_MODEL, LATENT_MODEL = "llama-3.1-8b", "deepseek-v3.2"
CPU = "cpu-"
"""How names of measured CPUs begin: a CPU is not a GPU, and its slopes are no engine's."""

SIXTEEN_BITS = ("bfloat16", "float16")
SLOPE_BATCH, SLOPE_CONTEXTS = 32, (16384, 65536)


@dataclass(frozen=True, slots=True)
class EngineSlope:
    """Latency per token of context a format has in an engine's kernel, against 16 bits there, from a calibration."""

    gpu: str
    engine: str
    engine_version: str | None
    ratio: float
    source: str


@dataclass(frozen=True, slots=True)
class FormatFacts:
    """One KV format.

    Attributes:
        bytes_per_element: of K and V elements, scales left out.
        bytes_per_token_head, scale_bytes: of one token and head, K and V, at a head_dim of 128; None for latent rows,
            whose size is the model's.
        gain: 16-bit bytes over bytes, before padding.
        engines: engine that takes the format → the GPUs it takes it on; None where its rules do not say.
        engine_slopes: from calibrations of engines' kernels.

    """

    name: str
    bytes_per_element: float
    bytes_per_token_head: int | None
    scale_bytes: float | None
    scale_granularity: str
    gain: float | None
    note: str
    engines: Mapping[str, tuple[str, ...] | None]
    engine_slopes: tuple[EngineSlope, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        return asdict(self)


def format_facts() -> tuple[FormatFacts, ...]:
    """Every named KV format, in the order of ``KV_FORMATS``."""
    slopes: dict[str, list[EngineSlope]] = {}
    for name, slope in _engine_slopes():
        slopes.setdefault(name, []).append(slope)
    return tuple(_facts(fmt, tuple(slopes.get(fmt.name, ()))) for fmt in KV_FORMATS.values())


def _facts(fmt: KvFormat, slopes: tuple[EngineSlope, ...]) -> FormatFacts:
    latent = fmt.name.endswith("_ds_mla")
    size = None if latent else fmt.content_bytes(HEAD_DIM, HEAD_DIM)
    return FormatFacts(
        name=fmt.name,
        bytes_per_element=(fmt.key_bits + fmt.value_bits) / 16,
        bytes_per_token_head=size,
        scale_bytes=None if latent else fmt.scale_bytes(HEAD_DIM, HEAD_DIM),
        scale_granularity=fmt.scale_granularity,
        gain=None if size is None else 4 * HEAD_DIM / size,
        note=fmt.note,
        engines={
            engine: taken if ENGINES[engine].exact else None
            for engine in ENGINES
            if (taken := _taken_on(fmt, engine, latent))
        },
        engine_slopes=slopes,
    )


def _taken_on(fmt: KvFormat, engine: str, latent: bool) -> tuple[str, ...]:
    """The GPUs on which ``engine`` takes ``fmt``; GPUs of one architecture are asked once."""
    model = resolve_model(LATENT_MODEL if latent else PLAIN_MODEL)
    answers: dict[tuple[str, str | None], bool] = {}
    taken = []
    for name in gpu_names():
        gpu = load_gpu(name)
        key = (gpu.vendor, gpu.architecture)
        if key not in answers:
            try:
                ENGINES[engine].plan_cache(model, EngineOptions(kv_cache_dtype=fmt.name, gpu=gpu))
                answers[key] = True
            except InputError:
                answers[key] = False
        if answers[key]:
            taken.append(name)
    return tuple(taken)


def _engine_slopes() -> Iterator[tuple[str, EngineSlope]]:
    """(format, slope) from the attention calibrations: predicted times of two contexts, against the same in 16 bits."""
    for found in store.every():
        if found.data.get("kind") != KIND or str(found.data.get("gpu")).startswith(CPU):
            continue
        calibration = attention_from_json(found.data, found.where, found.origin)
        base = next((name for name in SIXTEEN_BITS if name in found.data["kv_dtypes"]), None)
        for name in found.data["kv_dtypes"]:
            if base is None or name not in KV_FORMATS or name == base:
                continue
            ratio = _slope(calibration, name) / _slope(calibration, base)
            source = f"calibration {found.name} ({found.origin})"
            engine = str(found.data.get("engine") or "engine not named")
            yield name, EngineSlope(str(found.data.get("gpu")), engine, found.data.get("engine_version"), ratio, source)


def _slope(calibration: AttentionCalibration, kv_dtype: str) -> float:
    """Seconds a token of context for the heads of a 70B model, at ``SLOPE_BATCH`` between ``SLOPE_CONTEXTS``."""
    short, long = calibration.latency_s(SLOPE_BATCH, list(SLOPE_CONTEXTS), 64, 8, HEAD_DIM, kv_dtype=kv_dtype)
    return float(long - short) / (SLOPE_CONTEXTS[1] - SLOPE_CONTEXTS[0])
