"""From what a server reported to the request that a plan of it answers: its own settings, and what the user gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvplan import profiles
from kvplan.check.server import ServerReport
from kvplan.dtypes import canonical_kv_dtype
from kvplan.errors import InputError, KvplanError, UnknownNameError, shorten
from kvplan.gpu import profile_of_device
from kvplan.memory.request import make_request
from kvplan.model_config import ModelConfig, resolve_model

SETTINGS = ("engine_version", "tp_size", "pp_size", "dp_size", "dcp_size", "ep", "block_size_tokens",
            "max_model_len_tokens", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization",
            "enable_prefix_caching", "swa_full_tokens_ratio", "mamba_full_memory_ratio")  # fmt: skip
"""Facts that are fields of a sizing request under the same name."""

SHAPE = ("num_layers", "num_kv_heads", "head_dim")
"""Fields that describe a model without a name."""

TORCH_DTYPES = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2", "uint8": "nvfp4"}
STORED_AS = {
    "fp8": "fp8", "awq": "int4", "gptq": "int4", "int4": "int4", "w4a16": "int4", "4bit": "int4", "nvfp4": "nvfp4",
    "fp4": "nvfp4", "mxfp4": "mxfp4", "int8": "int8", "w8a8": "int8", "8bit": "int8",
}  # fmt: skip
"""Words at the end of a checkpoint's name, and how its weights are then stored."""

OTHER_WORDS = ("dynamic", "instruct", "chat", "it", "hf", "quantized", "bnb", "marlin", "block", "static")


@dataclass(frozen=True)
class Basis:
    """Fields of a sizing request.

    Attributes:
        options: the server's settings with ``given`` laid over them.
        given: fields the user stated, by flags or a scenario.
        notes: what was taken for granted on the way.

    """

    options: Mapping[str, Any]
    given: Mapping[str, Any]
    notes: tuple[str, ...]


def basis_of(report: ServerReport, given: Mapping[str, Any]) -> Basis:
    """The request a plan of this server answers.

    Raises:
        InputError: neither the server nor the user names a model that is known.

    """
    checked = make_request(given)
    given = {name: getattr(checked, name) for name, value in given.items() if value is not None}
    notes: list[str] = []
    if "speculative" in report.facts:
        notes.append("the server decodes speculatively: a draft model's weights and its blocks are not in the plan")
    options: dict[str, Any] = {"engine": report.engine}
    for name in SETTINGS:
        value = report.value(name)
        if value is not None and (isinstance(value, bool | str) or value > 0):
            options[name] = value
    dtype = _kv_dtype(report, notes)
    if dtype is not None:
        options["kv_cache_dtype"] = dtype
    if "gpu" not in given and "gpu_memory_bytes" not in given:
        options |= gpu_of(report)
    fixed = report.value("kv_cache_given_bytes")
    if fixed is not None:
        options["kv_cache_memory_bytes"] = fixed
    if not given.keys() & {"model", *SHAPE}:
        options |= _model(report, notes)
    elif "model" in given and "weight_dtype" not in given:
        options |= _stored_as(report, given["model"], notes)
    longest = report.number("max_model_len_tokens")
    if longest is not None and "max_model_len_tokens" not in given and given.get("context_tokens", 0) > longest:
        given["max_model_len_tokens"] = given["context_tokens"]
    options |= given | {"engine": report.engine}
    if "block_size_tokens" not in options:
        options |= _block(report, options.get("model"))
    return Basis(options, given, tuple(notes))


def _kv_dtype(report: ServerReport, notes: list[str]) -> str | None:
    stated = report.value("kv_cache_dtype")
    if stated is None:
        return None
    name = TORCH_DTYPES.get(str(stated), str(stated))
    try:
        return canonical_kv_dtype(name)
    except KvplanError:
        notes.append(f"the server's KV dtype {shorten(name, 40)!r} is not known here: planned as auto")
        return None


def gpu_of(report: ServerReport) -> dict[str, Any]:
    """The GPU the server names, else one of the memory it reports."""
    found: dict[str, Any] = {}
    total = report.value("total_bytes")
    if total is not None:
        found["gpu_memory_bytes"] = total
    name = report.value("gpu")
    if isinstance(name, str) and isinstance(total, int):
        profile = profile_of_device(name.replace("_", " "), total)
        found |= {"gpu": profile.name} if profile is not None else {}
    return found


def _block(report: ServerReport, model: str | None) -> dict[str, Any]:
    """The server's block size, unless the engine worked it out itself (models with states)."""
    block = report.value("observed_block_tokens")
    if block is None or (model is not None and "state" in resolve_model(model).cache_kinds):
        return {}
    return {"block_size_tokens": block}


def model_of(report: ServerReport) -> dict[str, Any] | None:
    """The model the server names, and how its weights are stored where that is not the checkpoint's own.

    None where it names none, or none that is known here.
    """
    try:
        return _model(report, [])
    except InputError:
        return None


def _stored_as(report: ServerReport, model: str, notes: list[str]) -> dict[str, Any]:
    """How the server stores the weights of ``model``, where that is its own and not as the checkpoint says."""
    theirs = model_of(report)
    stored = None if theirs is None else theirs.get("weight_dtype")
    if theirs is None or stored is None or not same_model(resolve_model(model), resolve_model(theirs["model"])):
        return {}
    notes.append(f"weights are planned as the server stores them: {stored}")
    return {"weight_dtype": stored}


def same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two references lead to one model: the same profile, or where one is a file, the same layers."""
    if all(model.source.startswith("bundled profile") for model in (one, other)):
        return one.name == other.name
    return one.name == other.name or all(
        getattr(one, name) == getattr(other, name)
        for name in ("architecture", "hidden_size", "vocab_size", "max_context_tokens", "layers")
    )


def _model(report: ServerReport, notes: list[str]) -> dict[str, Any]:
    """The model the server names, or the bundled one that its name points to, which a note says."""
    stated = report.value("model")
    if not isinstance(stated, str) or not stated.strip():
        raise InputError(f"{report.source}: the server names no model", hint="add --model")
    name = _hub_id(stated)
    try:
        quantised_at_start = resolve_model(name).quantization is None
    except KvplanError as error:
        known, stored = bundled_sibling(name)
        if known is None:
            closest = error.closest if isinstance(error, UnknownNameError) else []
            hint = f"add --model{'; closest: ' + ', '.join(closest) if closest else ''}, or --model ./config.json"
            raise InputError(f"the server's model {shorten(stated)!r} is not known here", hint=hint) from error
        stored = stored or _stored(report)
        notes.append(f"{shorten(stated)} is taken as {known}, by its name" + (f", weights {stored}" if stored else ""))
        return {"model": known} | ({"weight_dtype": stored} if stored else {})
    stored = _stored(report) if quantised_at_start else None
    return {"model": name} | ({"weight_dtype": stored} if stored else {})


def _hub_id(name: str) -> str:
    """``…/models--org--name/snapshots/…`` is a folder of the hub cache: ``org/name``."""
    for part in name.split("/"):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return name


def _stored(report: ServerReport) -> str | None:
    return STORED_AS.get(str(report.value("quantization") or "").split("_")[0].lower())


def bundled_sibling(name: str) -> tuple[str | None, str | None]:
    """(bundled model, weight dtype) that the last part of a path or hub id points to; None where it points to none.

    ``RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic`` → ``("llama-3.3-70b", "fp8")``.
    """
    words = name.rstrip("/").split("/")[-1].lower().removeprefix("meta-").split("-")
    stored = None
    while words:
        found = profiles.find("models", "-".join(words))
        if found is not None:
            return found, stored
        last = words.pop()
        if last in STORED_AS:
            stored = STORED_AS[last]
        elif last not in OTHER_WORDS:
            break
    return None, None
