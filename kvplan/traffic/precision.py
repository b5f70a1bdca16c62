"""Which formats the weights of a step are read in."""

from __future__ import annotations

from kvplan.dtypes import weight_format
from kvplan.model_config.types import ModelConfig
from kvplan.weights import format_name, format_of, plain_format, stored_format

FOUR_BIT = ("nvfp4", "mxfp4", "int4")


def weight_dtypes(model: ModelConfig, asked: str | None) -> tuple[str | None, str | None, str]:
    """(override for attention and dense parts, override for experts, the precision class).

    Four-bit requests on a model with experts quantise the experts only, as published checkpoints do; a checkpoint that
    already stores them so is taken as it is. The class is what matrix kernels and calibrations go by: ``bf16``,
    ``fp8``, ``fp4`` or ``int4``.
    """
    stored = stored_format(model)
    name = weight_format(asked).name if asked is not None else stored
    if asked is None or name == stored or (stored == "mxfp4" and name == "nvfp4"):
        return None, None, precision_class(stored)
    if model.is_moe and name in FOUR_BIT:
        return "bf16", name, precision_class(name)
    return name, name, precision_class(name)


def precision_class(format_name: str) -> str:
    """``fp8_block`` → ``fp8``, ``mxfp4`` → ``fp4``, ``fp16`` → ``bf16``."""
    if format_name in ("nvfp4", "mxfp4"):
        return "fp4"
    if format_name.startswith(("fp8", "mxfp8")):
        return "fp8"
    return {"int4": "int4", "int8": "int8"}.get(format_name, "bf16")


def role_format(model: ModelConfig, roles: tuple[str, ...], override: str | None) -> str:
    """The format of the first matrix of ``roles``, ``override`` applied."""
    for index, weight in model.weights():
        if weight.role in roles and weight.linear and len(weight.shape) == 2:
            return format_name(model, format_of(model, weight, index, override))
    return plain_format(model)
