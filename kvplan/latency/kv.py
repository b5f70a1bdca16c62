"""What the KV format does to time: the format assumed when none is stated, and its slope against 16 bits."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvplan.calibration import store
from kvplan.dtypes import kv_format
from kvplan.errors import InputError
from kvplan.gpu import GpuSpec, load_gpu
from kvplan.latency.latent import latent_calibration, latent_speed
from kvplan.memory.request import Source
from kvplan.model_config.types import ModelConfig
from kvplan.roofline import relative_kv_efficiency

if TYPE_CHECKING:
    from kvplan.calibration.attention import AttentionCalibration
    from kvplan.calibration.latent import LatentCalibration

LATENT_KINDS = {"mla", "compressed", "indexer"}
REFERENCE_HEAD_DIM = 128


class KvSpeed(NamedTuple):
    """How fast a KV format is read, against 16 bits.

    Attributes:
        slowdown: time per byte over the 16-bit kernel's time per byte; 1.0 when only bytes count. Latent attention of
            more than 64 heads a rank is above 1 at 16 bits too: its products take longer than its stream.
        source: ``exact`` for 16 bits, ``calibrated`` or ``assumed``.
        detail: one line that says from what.

    """

    slowdown: float
    source: Source
    detail: str


@lru_cache(maxsize=256)
def attention_calibration(gpu_name: str, engine: str, path: str | None = None) -> AttentionCalibration | None:
    """The decode-attention calibration of an engine on a GPU, remembered; None when there is none.

    Raises:
        ProfileError: ``path`` is given and holds no calibration of this GPU.

    """
    from kvplan.calibration.attention import find_attention, read_attention

    return find_attention(gpu_name, engine) if path is None else read_attention(Path(path), gpu_name)


def given_calibration(
    path: str, gpu_name: str, engine: str, latent: bool, heads: int | None
) -> AttentionCalibration | LatentCalibration | None:
    """The calibration in ``path``, of a model's attention: plain, or latent with ``heads`` query heads a rank.

    Raises:
        InputError: the model's latent attention is sparse or compressed (``heads`` is None).
        ProfileError: it holds no calibration of this GPU and kind of attention.

    """
    if not latent:
        return attention_calibration(gpu_name, engine, path)
    if heads is None:
        raise InputError(f"{path}: no calibration is of sparse or compressed latent attention",
                         hint="leave --calibration out")  # fmt: skip
    return latent_calibration(gpu_name, engine, heads, path)


def found_calibrations(gpu_name: str, engine: str, latent: bool, heads: int | None) -> list[store.Found]:
    """Files of calibrations of a model's attention that were not given, the one that is used first.

    Raises:
        ProfileError: a file of the user's folder is no calibration.

    """
    from kvplan.calibration.latent import matching_latent

    if not latent:
        return list(store.matching("attention", gpu_name, engine))
    return [] if heads is None else [found for found, _ in matching_latent(gpu_name, engine, heads)]


def calibration_notes(gpu_name: str, engine: str, path: str | None, latent: bool, heads: int | None) -> list[str]:
    """What to say of a calibration that is one of several, or not of ``engine``'s own kernels.

    Raises:
        InputError, ProfileError: ``path`` is given and not one of this GPU and attention; see ``given_calibration``.

    """
    if path is not None:
        given = given_calibration(path, gpu_name, engine, latent, heads)
        notes = [None if given is None else _foreign_note("the calibration given", given.engine, gpu_name, engine)]
    else:
        candidates = found_calibrations(gpu_name, engine, latent, heads)
        own = [(f"calibration {each.name} of your own folder", each.data.get("engine") or "") for each in candidates]
        notes = [store.choice_note(candidates), *(_foreign_note(*each, gpu_name, engine) for each in own[:1])]
    return [note for note in notes if note is not None]


def _foreign_note(what: str, of: str, gpu_name: str, engine: str) -> str | None:
    """What to say of a calibration of the kernels ``of`` some engine, maybe unnamed; None where it is the same."""
    if of == engine:
        return None
    if of:
        return f"{what} is of {of} kernels: {engine} reaches it with kernels as good"
    shipped = store.shipped_name("attention", gpu_name, engine)
    instead = f"in place of {shipped}, which ships" if shipped else "though it may be of other kernels"
    return f"{what} names no engine: it is taken for {engine}'s {instead}"


@lru_cache(maxsize=1024)
def kv_speed(gpu_name: str, engine: str, kv_dtype: str, latent: bool, calibration_path: str | None = None,
             latent_heads: int | None = None, latent_bytes_ratio: float = 1.0) -> KvSpeed:  # fmt: skip
    """The slowdown per byte of ``kv_dtype``, from a kernel calibration where one covers it, else assumed.

    Args:
        gpu_name: a bundled GPU's name.
        engine: canonical engine name.
        kv_dtype: a resolved KV format.
        latent: whether layers that read the context are latent attention.
        calibration_path: a calibration file to use instead of the one this GPU and engine have.
        latent_heads: query heads of a rank, where all layers are plain latent attention.
        latent_bytes_ratio: bytes of a token in one of them then, over those of 16 bits.

    """
    fmt = kv_format(kv_dtype)
    bits = min(fmt.key_bits, fmt.value_bits)
    if latent_heads is not None and bits >= 8:
        given = latent_calibration(gpu_name, engine, latent_heads, calibration_path)
        return _latent_kv_speed(load_gpu(gpu_name), given, latent_bytes_ratio, latent_heads)
    if bits >= 16:
        return KvSpeed(1.0, "exact", "16 bits are the reference")
    calibration = None if latent else attention_calibration(gpu_name, engine, calibration_path)
    ratio = None if calibration is None else calibration.slope_ratio(kv_dtype)
    if ratio is not None:
        content = fmt.content_bytes(REFERENCE_HEAD_DIM, REFERENCE_HEAD_DIM)
        byte_ratio = content / (4 * REFERENCE_HEAD_DIM)
        source: Source = "calibrated" if ratio.kind == "calibrated" else "assumed"
        detail = (
            f"{ratio.source}: {ratio.low:.2f}–{ratio.high:.2f} (80%) of the bf16 slope at {byte_ratio:.2f} of its bytes"
        )
        return KvSpeed(ratio.value / byte_ratio, source, detail)
    efficiency = relative_kv_efficiency(bits)
    what = "latent attention" if latent else f"{engine} on {gpu_name}"
    return KvSpeed(1 / efficiency, "assumed", f"no kernel calibration of {what}: {bits}-bit KV is taken to be read at "
                   f"{efficiency:.0%} of the bandwidth of 16-bit KV")  # fmt: skip


def _latent_kv_speed(gpu: GpuSpec, calibration: LatentCalibration | None, bytes_ratio: float, heads: int) -> KvSpeed:
    """Time per byte over that of 16 bits and at most 64 heads a rank.

    8 bits take between the share of the time that their bytes are, and all of it, whatever was measured.
    """
    reference = latent_speed(gpu, calibration, 1.0, 1).slope_s
    half = latent_speed(gpu, calibration, 1.0, heads)
    if bytes_ratio >= 1:
        return KvSpeed(half.slope_s / reference, "exact", "16 bits are the reference")
    found = latent_speed(gpu, calibration, bytes_ratio, heads)
    ratio = found.slope_s / half.slope_s
    taken = min(max(ratio, bytes_ratio), 1.0)
    detail = f"{ratio:.2f} of the bf16 slope at {bytes_ratio:.2f} of its bytes, {heads} heads a rank"
    if found.source is None:
        detail = f"no kernel calibration of latent attention: {detail}, by bytes and FLOPs of the roofline"
    else:
        detail = f"{found.source}: {detail}" + (f"; taken as {taken:.2f}" if taken != ratio else "")
    source: Source = "assumed" if found.source is None else "calibrated"
    return KvSpeed(taken / bytes_ratio * half.slope_s / reference, source, detail)


def is_latent(model: ModelConfig) -> bool:
    """Whether the model's cache is latent or compressed attention."""
    return bool(model.cache_kinds & LATENT_KINDS)


def assumed_kv_dtype(
    model: ModelConfig, gpu: GpuSpec, engine: str, precision: str, weight_dtype: str | None
) -> tuple[str, str | None]:
    """(KV format, a note when it is not ``auto``) of a deployment that does not state one.

    Public deployments with 8-bit and 4-bit floating-point weights mostly run FP8 KV on TensorRT-LLM, and on vLLM on
    Blackwell. On Hopper vLLM is left at its default: where public runs wait for KV, half of what FP8 would hold runs.
    SGLang keeps 16 bits unless told, except for sparse latent attention; gpt-oss and weight-only INT4 keep 16 bits.
    """
    is_mxfp4 = model.quantization is not None and model.quantization.method == "mxfp4"
    keeps_16 = (
        precision not in ("fp8", "fp4")
        or is_mxfp4
        or (engine == "sglang" and "indexer" not in model.cache_kinds)
        or (engine == "vllm" and (gpu.sm or 0) < 100)
        or (engine == "tensorrt-llm" and weight_dtype == "fp8_block")
    )
    if keeps_16 or "compressed" in model.cache_kinds:
        return "auto", None
    return (
        "fp8",
        f"KV dtype not stated: fp8, as most public deployments of {precision} weights on {engine} run; "
        "`kvplan size` plans auto",
    )
