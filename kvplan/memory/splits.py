"""Splits of weights over ranks that an engine refuses when it starts, whatever the memory.

Sources: vLLM 0.33 ``model_executor/layers/`` ``linear.py`` and ``fused_moe/config.py`` (shares are whole) and
``quantization/utils/fp8_utils.py`` ``validate_fp8_block_shape`` (scales of experts are refined instead,
``fused_moe/oracle/fp8.py``); SGLang 0.5.5 to 0.5.23 ``layers/quantization/fp8.py``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from kvplan.model_config.types import ModelConfig, Weight
from kvplan.weights import format_of

UNCHECKED_ROLES = ("vision", "mtp")


class Split(NamedTuple):
    """Ranks of one server: ``tp_size`` split dense layers, ``expert_ranks`` experts, which ``ep`` leaves whole."""

    tp_size: int
    expert_ranks: int
    ep: bool


@lru_cache(maxsize=1024)
def split_refusal(model: ModelConfig, engine: str, split: Split, weight_dtype: str | None = None) -> str | None:
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
        is_checked = engine == "sglang" or (engine == "vllm" and weight.sharding == "row")
        stored = format_of(model, weight, index, weight_dtype) if is_checked else None
        block, mine = None if stored is None else stored.block, weight.shape[axis] // ranks
        if block is not None and mine % block[axis]:
            return (f"{engine} splits FP8 weights by whole blocks of {block[axis]}, and the {where} are {mine:,} on "
                    f"each of {ranks} ranks")  # fmt: skip
    return None


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
