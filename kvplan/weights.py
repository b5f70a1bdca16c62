"""Bytes a model's weights take on one GPU, from its architecture and how its checkpoint stores them.

Tensor parallelism splits linear layers by column or row, embeddings by vocabulary (padded to 64), KV projections by
head (replicated beyond one head a rank) and experts by expert under expert parallelism; norms, routers and latent
down-projections are replicated. Source: vLLM ``model_executor/layers/linear.py``, ``vocab_parallel_embedding.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from kvplan.dtypes import SCALAR_BYTES, WEIGHT_FORMATS, WeightFormat, weight_format
from kvplan.model_config.quantization import matches
from kvplan.model_config.types import ModelConfig, Quantization, Weight
from kvplan.parallelism import pipeline_bounds
from kvplan.units import ceil_div, round_up

VOCAB_PADDING = 64
NEVER_QUANTISED = ("vision", "mtp")
PLAIN_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class WeightBytes:
    """Weight bytes of one GPU, by role, and where they come from.

    Attributes:
        total_bytes: on the rank that holds most.
        by_role: role → bytes on that rank, scales included.
        model_bytes: of the whole model, unsharded.
        source: ``exact`` (read from safetensors) or ``assumed`` (from the architecture and the quantisation).
        detail: one line that says how.

    """

    total_bytes: int
    by_role: dict[str, int]
    model_bytes: int
    source: str
    detail: str


class ExpertPadding(NamedTuple):
    """Multiples that kernels fill the MXFP4 experts of a rank up to: of the hidden size, and of an expert's width."""

    hidden: int = 1
    width: int = 1


UNPADDED = ExpertPadding()


class _Ranks(NamedTuple):
    """Over how many ranks linear layers are split, every expert is split, and experts are dealt to whole."""

    tp: int = 1
    moe_tp: int = 1
    ep: int = 1


@lru_cache(maxsize=1024)
def weight_bytes(model: ModelConfig, *, tp_size: int = 1, pp_size: int = 1, ep_size: int = 1,
                 moe_tp_size: int | None = None, weight_dtype: str | None = None,
                 padding: ExpertPadding = UNPADDED) -> WeightBytes:  # fmt: skip
    """Weights of the fullest rank.

    Args:
        model: the model.
        tp_size: tensor parallel ranks.
        pp_size: pipeline ranks.
        ep_size: ranks that experts are dealt to whole; 1 splits each of them.
        moe_tp_size: ranks that each expert is then split over; None is ``tp_size``.
        weight_dtype: how linear layers are stored, when not as the checkpoint says.
        padding: what the engine's kernels fill MXFP4 experts up to.

    Raises:
        UnknownNameError: no such weight dtype.

    """
    model_total, _ = _rank_bytes(model, weight_dtype, _Ranks(), UNPADDED, 0, model.num_layers, True, True)
    best: tuple[int, dict[str, int]] = (0, {})
    ranks = _Ranks(tp_size, tp_size if moe_tp_size is None else moe_tp_size, ep_size)
    for rank, (low, high) in enumerate(pipeline_bounds(model.num_layers, pp_size)):
        first, last = rank == 0, rank == pp_size - 1
        found = _rank_bytes(model, weight_dtype, ranks, padding, low, high, first, last)
        best = max(best, found, key=lambda item: item[0])
    total, by_role = best
    pads = padding != UNPADDED and (weight_dtype is None or weight_format(weight_dtype).name == "mxfp4")
    filled = "" if not pads else f", experts filled up to multiples of {padding.hidden} × {padding.width}"
    exact = model.exact_weights
    if exact is None or weight_dtype is not None:
        return WeightBytes(total, by_role, model_total, "assumed", _describe(model, weight_dtype) + filled)
    measured = _exact_total(model, weight_dtype)
    scaled = {role: value * measured // max(model_total, 1) for role, value in by_role.items()}
    share = total * measured // max(model_total, 1)
    detail = f"{measured:,} bytes in {exact.source}, sharded as modelled{filled}"
    return WeightBytes(share, scaled, measured, "exact", detail)


def _describe(model: ModelConfig, weight_dtype: str | None) -> str:
    return f"{model.num_parameters:,} parameters of the architecture stored as {stored_format(model, weight_dtype)}"


@lru_cache(maxsize=1024)
def stored_format(model: ModelConfig, weight_dtype: str | None = None) -> str:
    """The name of ``weight_dtype``; without one, of the format most of the checkpoint's matrices are in.

    That is the format of its experts, else of its MLPs.
    """
    if weight_dtype is not None:
        return weight_format(weight_dtype).name
    for role in ("expert", "mlp", "attention"):
        for index, weight in model.weights():
            if weight.role == role and weight.linear:
                return format_name(model, format_of(model, weight, index))
    return plain_format(model)


def format_name(model: ModelConfig, found: WeightFormat | None) -> str:
    """What ``--weight-dtype`` calls a format that ``format_of`` found."""
    return plain_format(model) if found is None else found.name


def plain_format(model: ModelConfig) -> str:
    """What ``--weight-dtype`` calls the model's own dtype."""
    return PLAIN_DTYPES[model.dtype]


def _exact_total(model: ModelConfig, weight_dtype: str | None) -> int:
    """Checkpoint bytes an engine loads: what the files hold less the MTP modules, which wait for speculation."""
    exact = model.exact_weights
    assert exact is not None
    if exact.tensors:
        skipped = set(range(model.num_layers, model.num_layers + 64))
        return sum(size for name, size, _ in exact.tensors if not _is_mtp(name, skipped))
    mtp = sum(_stored_bytes(model, w, None, weight_dtype) for w in model.mtp_weights)
    return max(exact.total_bytes - mtp, 0)


def _is_mtp(name: str, skipped: set[int]) -> bool:
    if name.startswith("mtp.") or ".mtp." in name:
        return True
    parts = name.split(".")
    if "layers" not in parts:
        return False
    position = parts.index("layers") + 1
    return position < len(parts) and parts[position].isdigit() and int(parts[position]) in skipped


def _rank_bytes(model: ModelConfig, weight_dtype: str | None, ranks: _Ranks, padding: ExpertPadding, low: int,
                high: int, first: bool, last: bool) -> tuple[int, dict[str, int]]:  # fmt: skip
    """(bytes, bytes by role) of the layers ``[low, high)`` on one TP rank, with what the first and last rank add."""
    roles: dict[str, int] = {}
    for weight in model.outer_weights:
        if not (last if weight.role in ("lm_head", "norm") else first) and not _is_tied_head(model, weight, last):
            continue
        roles[weight.role] = roles.get(weight.role, 0) + _stored_bytes(
            model, _shard(model, weight, ranks), None, weight_dtype
        )
    memo: dict[tuple[int, int], dict[str, int]] = {}
    per_module = _is_per_module(model.quantization) and weight_dtype is None
    for index in range(low, high):
        layer = model.layers[index]
        key = (id(layer), index if per_module else -1)
        found = memo.get(key)
        if found is None:
            found = {}
            for weight in layer.weights:
                stored = _stored_bytes(model, _shard(model, weight, ranks), index, weight_dtype, padding)
                found[weight.role] = found.get(weight.role, 0) + stored
            memo[key] = found
        for role, value in found.items():
            roles[role] = roles.get(role, 0) + value
    return sum(roles.values()), roles


def _is_tied_head(model: ModelConfig, weight: Weight, last: bool) -> bool:
    """A tied embedding sits on the last pipeline rank too, as its LM head."""
    return last and weight.role == "embedding" and not any(w.role == "lm_head" for w in model.outer_weights)


def _shard(model: ModelConfig, weight: Weight, ranks: _Ranks) -> Weight:
    """The part of ``weight`` one rank holds."""
    if max(ranks) == 1:
        return weight
    shape, tp = weight.shape, ranks.tp
    if weight.sharding == "column":
        return replace(weight, shape=(ceil_div(shape[0], tp), *shape[1:]))
    if weight.sharding == "row" and len(shape) > 1:
        return replace(weight, shape=(shape[0], ceil_div(shape[1], tp), *shape[2:]))
    if weight.sharding == "vocab":
        return replace(weight, shape=(round_up(shape[0], VOCAB_PADDING) // tp, *shape[1:]))
    if weight.sharding == "kv":
        return replace(weight, shape=(max(ceil_div(shape[0], tp), _kv_row_floor(model, weight)), *shape[1:]))
    if weight.sharding == "expert":
        if ranks.ep > 1:
            return replace(weight, copies=ceil_div(weight.copies, ranks.ep))
        if len(shape) == 1:
            return replace(weight, shape=(ceil_div(shape[0], ranks.moe_tp),))
        axis = 1 if weight.name.endswith("down_proj") else 0
        split = list(shape)
        split[axis] = ceil_div(split[axis], ranks.moe_tp)
        return replace(weight, shape=tuple(split))
    return weight


def _kv_row_floor(model: ModelConfig, weight: Weight) -> int:
    """Rows of one KV head: a rank never holds less than one whole head."""
    for layer in model.layers:
        if weight in layer.weights:
            for cache in layer.caches:
                heads = getattr(cache, "num_kv_heads", None)
                if heads:
                    return weight.shape[0] // int(heads)
    return 1


def _is_per_module(quantization: Quantization | None) -> bool:
    return quantization is not None and bool(quantization.excluded or quantization.per_module)


def _stored_bytes(model: ModelConfig, weight: Weight, layer: int | None, weight_dtype: str | None,
                  padding: ExpertPadding = UNPADDED) -> int:  # fmt: skip
    fmt = format_of(model, weight, layer, weight_dtype)
    if fmt is None:
        return weight.num_parameters * SCALAR_BYTES[model.dtype]
    rows, columns = weight.shape
    if weight.role == "expert" and fmt.name == "mxfp4":
        to_rows, to_columns = padding if weight.name.endswith("down_proj") else reversed(padding)
        rows, columns = round_up(rows, to_rows), round_up(columns, to_columns)
    return fmt.matrix_bytes(rows, columns) * weight.copies


def format_of(
    model: ModelConfig, weight: Weight, layer: int | None, weight_dtype: str | None = None
) -> WeightFormat | None:
    """The format a weight is stored in; None for the model's own 16-bit dtype.

    Embeddings, norms, routers and vision towers stay in 16 bits, the LM head too unless the checkpoint lists it.
    """
    if not weight.linear or len(weight.shape) != 2 or weight.role in NEVER_QUANTISED:
        return None
    if weight_dtype is not None:
        asked = weight_format(weight_dtype)
        if asked.bits >= 16 or weight.role == "lm_head":
            return None if asked.bits == SCALAR_BYTES[model.dtype] * 8 or weight.role == "lm_head" else asked
        return asked if asked.name != "mxfp4" or weight.role == "expert" else None
    quantization = model.quantization
    if quantization is None:
        return None
    return _checkpoint_format(quantization, weight, layer)


@lru_cache(maxsize=256)
def _modules_by_format(quantization: Quantization) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(format, module patterns) of a mixed checkpoint."""
    found: dict[str, list[str]] = {}
    for pattern, fmt in quantization.per_module:
        found.setdefault(fmt, []).append(pattern)
    return tuple((fmt, tuple(patterns)) for fmt, patterns in found.items())


def _checkpoint_format(quantization: Quantization, weight: Weight, layer: int | None) -> WeightFormat | None:
    module = weight.name if layer is None else f"layers.{layer}.{weight.name}"
    name = dict(quantization.role_formats).get(weight.role, quantization.weight_format)
    named = next((fmt for fmt, patterns in _modules_by_format(quantization) if matches(module, patterns)), None)
    if named is not None:
        name = named
    elif weight.role == "lm_head" or matches(module, quantization.excluded):
        return None
    if name == "bf16":
        return None
    found = WEIGHT_FORMATS[name]
    if quantization.group is not None and found.group is not None and quantization.group != found.group:
        found = replace(found, group=quantization.group)
    return found
