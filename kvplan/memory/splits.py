"""Splits of weights over ranks that an engine refuses when it starts, whatever the memory.

Sources: vLLM (wheels of 0.28 to 0.33) ``model_executor/layers/`` ``linear.py`` and ``fused_moe/config.py`` (shares are
whole), ``quantization/utils/fp8_utils.py`` ``validate_fp8_block_shape``, ``quantization/auto_awq.py``,
``utils/marlin_utils.py`` and ``compressed_tensors`` (groups are whole). Of experts ``quantization/fp8.py`` wants whole
blocks up to 0.28; since 0.29 ``fused_moe/oracle/fp8.py`` ``refine_fp8_moe_block_shape``, and ``moe_wna16.py`` all
along, refine scales to a block that divides all. SGLang 0.5.5 to 0.5.23 ``layers/quantization/``: ``fp8.py`` (whole
blocks), ``awq``, ``gptq`` and ``moe_wna16.py``.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from kvplan.dtypes import WeightFormat
from kvplan.model_config.types import ModelConfig, Weight
from kvplan.weights import format_of

UNCHECKED_ROLES = ("vision", "mtp")
GROUPED = ("int4", "int4_symmetric")
"""Formats of AWQ, GPTQ and weight-only compressed-tensors, whose scales are of groups of columns."""

VLLM_REFINES_SINCE = (0, 29)
FINEST = 32
"""The finest block that scales of experts are refined to."""


class Split(NamedTuple):
    """Ranks of one server: ``tp_size`` split dense layers, ``expert_ranks`` experts, which ``ep`` leaves whole."""

    tp_size: int
    expert_ranks: int
    ep: bool


@lru_cache(maxsize=1024)
def split_refusal(model: ModelConfig, engine: str, split: Split, weight_dtype: str | None = None,
                  version: tuple[int, ...] | None = None) -> str | None:  # fmt: skip
    """Why ``engine`` does not start with the weights of ``model`` split so; None where nothing is known against it."""
    if engine == "generic" or max(split.tp_size, split.expert_ranks) == 1:
        return None
    seen = set()
    for index, weight in model.weights():
        axis = None if weight.role in UNCHECKED_ROLES else _split_axis(weight, split.ep)
        ranks = split.expert_ranks if weight.sharding == "expert" else split.tp_size
        if axis is None or ranks == 1 or (weight.name, weight.shape) in seen:
            continue
        seen.add((weight.name, weight.shape))
        where = f"{weight.shape[axis]:,} {'columns' if axis else 'rows'} of {weight.name}"
        if weight.shape[axis] % ranks:
            return f"the {where} do not divide by {ranks} ranks"
        stored, mine = format_of(model, weight, index, weight_dtype), weight.shape[axis] // ranks
        whole = None if stored is None else _whole(engine, weight, stored, axis)
        if stored is None or whole is None or mine % whole == 0:
            continue
        refines = weight.sharding == "expert" and (
            stored.block is None or (engine == "vllm" and (version is None or version >= VLLM_REFINES_SINCE))
        )
        if not refines or gcd(whole, mine, *weight.shape) < FINEST:
            what = f"FP8 weights by whole blocks of {whole}" if stored.block else f"4-bit weights by groups of {whole}"
            finer = f" or a finer one of {FINEST} at least" if refines else ""
            return f"{engine} splits {what}{finer}, and the {where} are {mine:,} on each of {ranks} ranks"
    return None


def _whole(engine: str, weight: Weight, stored: WeightFormat, axis: int) -> int | None:
    """Elements along ``axis`` that share a scale, of which a rank must have all; None where that was not read."""
    if stored.block is not None:
        checked = engine == "sglang" or (engine == "vllm" and weight.sharding in ("row", "expert"))
        return stored.block[axis] if checked else None
    return stored.group if stored.name in GROUPED and axis == 1 and engine in ("vllm", "sglang") else None


def redundant_experts(model: ModelConfig, split: Split) -> int:
    """Copies of experts that fill up ranks which do not divide them; 0 where none are missing.

    vLLM deals them unevenly (``fused_moe/expert_map_manager.py``); SGLang and TensorRT-LLM put as many on each rank
    (``layers/moe/fused_moe_triton/layer.py``; ``_torch/modules/fused_moe``) and must be given the copies.
    """
    experts = max((layer.num_experts for layer in model.layers), default=0)
    return -experts % split.expert_ranks if split.ep else 0


def _split_axis(weight: Weight, ep: bool) -> int | None:
    """The axis that ranks split; None where each has all of it, or whole heads, tokens or experts."""
    if weight.sharding == "expert":
        return None if ep else int(weight.name.endswith("down_proj") and len(weight.shape) > 1)
    if weight.sharding == "row" and len(weight.shape) == 1:
        return None
    return {"column": 0, "row": 1}.get(weight.sharding)
