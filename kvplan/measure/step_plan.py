"""The whole decode step: which models it runs, what it predicts, and the lines through what it measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvplan.errors import KvplanError, UnsupportedError
from kvplan.measure.analysis import robust_line
from kvplan.measure.backend import Environment
from kvplan.measure.family import Family, Shape
from kvplan.measure.plan import WEIGHT_BYTES, Cell
from kvplan.model_config import AttentionCache, resolve_model

LAYER_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DISTINCT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class StepModel:
    """What a decode step needs of a dense model, whole on one GPU."""

    name: str
    shape: Shape
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    weight_dtype: str = "bf16"

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: every layer and the LM head."""
        return self.stored_bytes(WEIGHT_BYTES["bf16"])

    def stored_bytes(self, bytes_per_wide_weight: int) -> int:
        """Bytes of weights on a device that keeps those in 16 bits at ``bytes_per_wide_weight``."""
        shape = self.shape
        heads = (2 * shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        per_weight = bytes_per_wide_weight if self.weight_dtype == "bf16" else WEIGHT_BYTES[self.weight_dtype]
        return per_weight * self.num_layers * layer + bytes_per_wide_weight * self.vocab_size * self.hidden_size


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step: measured and predicted (None: nothing was)."""

    kv_dtype: str
    batch_size: int
    context_tokens: int
    itl_s: float
    p10_s: float
    p90_s: float
    distinct_layers: int
    predicted_s: float | None
    prediction_error: float | None


@dataclass(frozen=True, slots=True)
class StepLine:
    """ITL = intercept + slope × context of one format; ``floor`` is the ratio of KV bytes to bf16's."""

    kv_dtype: str
    batch_size: int
    intercept_s: float
    slope_s_per_token: float
    r_squared: float
    slope_ratio: float | None
    floor: float
    num_points: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """The whole decode step of a model."""

    model: str
    weight_dtype: str
    weight_bytes: int
    source: str | None
    rows: list[StepRow]
    lines: list[StepLine]


def step_model(reference: str, weight_dtype: str = "bf16") -> StepModel:
    """The dense model called ``reference``, its layers' weights in ``weight_dtype``.

    Raises:
        UnsupportedError: it is not dense, not plain attention in every layer, or its layers differ.

    """
    config = resolve_model(reference)
    layers = {(layer.caches, layer.weights) for layer in config.layers}
    first = config.layers[0]
    linear = {w.name.rsplit(".", 1)[-1]: w.shape for w in first.weights if w.linear}
    cache = first.caches[0] if len(first.caches) == 1 else None
    full = isinstance(cache, AttentionCache) and cache.window_tokens is None and cache.head_dim == cache.head_dim_v
    if config.is_moe or len(layers) != 1 or sorted(linear) != sorted(LAYER_WEIGHTS) or not full:
        raise UnsupportedError(
            f"{config.name}: --whole-step runs dense models whose layers are all the same full attention and gated MLP",
            hint="try 8b; without --whole-step its attention alone is timed",
        )
    assert isinstance(cache, AttentionCache)
    shape = Shape(cache.num_q_heads, cache.num_kv_heads, cache.head_dim)
    return StepModel(
        config.name, shape, config.num_layers, config.hidden_size, linear["gate_proj"][0], config.vocab_size,
        weight_dtype,
    )  # fmt: skip


def distinct_layers(family: Family, batch: int, context: int, num_layers: int) -> int:
    """Caches that a step goes through: disjoint for 1 GiB or all layers, two at least."""
    one = batch * context * family.bytes_per_token
    return max(2, min(num_layers, -(-DISTINCT_BYTES // one)))


class StepPredictor:
    """``kvplan itl``'s terms for everything but attention, and the kernels' own calibration for attention."""

    def __init__(self, model: str, config: StepModel, environment: Environment,
                 attention: Callable[[Cell], float | None], attention_source: str) -> None:  # fmt: skip
        self.model, self.config, self.environment, self.attention = model, config, environment, attention
        self.source = f"kvplan itl without its KV term, and attention from {attention_source}"

    def itl_s(self, family: Family, batch: int, context: int) -> float | None:
        """Seconds of a step; None where ``kvplan itl`` has no answer."""
        from kvplan.latency.planner import plan_one

        try:
            plan = plan_one({"model": self.model, "gpu": self.environment.gpu, "context_tokens": context,
                             "batch_size": batch, "kv_cache_dtype": "bf16",
                             "weight_dtype": self.config.weight_dtype})  # fmt: skip
        except KvplanError:
            return None
        attention_s = self.attention(Cell(family, batch, context))
        if attention_s is None:
            return None
        return plan.itl_s - plan.breakdown.kv_s + self.config.num_layers * attention_s


def step_rows(
    records: Iterable[Mapping[str, Any]], families: Sequence[Family], predict: StepPredictor | None
) -> list[StepRow]:
    """One row a record, in the order of formats and contexts."""
    by_name = {family.kv_dtype: (number, family) for number, family in enumerate(families)}
    rows = []
    known = [r for r in records if r["kv_dtype"] in by_name]
    for r in sorted(known, key=lambda r: (by_name[r["kv_dtype"]][0], r["context_tokens"])):
        family, measured = by_name[r["kv_dtype"]][1], r["latency_s"]
        predicted = None if predict is None else predict.itl_s(family, r["batch_size"], r["context_tokens"])
        rows.append(
            StepRow(r["kv_dtype"], r["batch_size"], r["context_tokens"], measured, r["p10_s"], r["p90_s"],
                    r["distinct_layers"], predicted, None if predicted is None else predicted / measured - 1)
        )  # fmt: skip
    return rows


def step_lines(rows: Sequence[StepRow], families: Sequence[Family]) -> list[StepLine]:
    """A robust line a format through its contexts, with its coefficient of determination."""
    fits = {}
    for family in families:
        points = [(row.context_tokens, row.itl_s) for row in rows if row.kv_dtype == family.kv_dtype]
        if len({x for x, _ in points}) >= 2:
            fits[family] = (*robust_line(points), points)
    base = next((slope for family, (slope, _, _) in fits.items() if family.kv_dtype == "bfloat16"), None)
    found = []
    for family, (slope, intercept, points) in fits.items():
        mean = sum(y for _, y in points) / len(points)
        spread = sum((y - mean) ** 2 for _, y in points)
        left = sum((y - intercept - slope * x) ** 2 for x, y in points)
        floor = family.bytes_per_token / Family(family.shape, "bfloat16").bytes_per_token
        found.append(
            StepLine(family.kv_dtype, rows[0].batch_size, intercept, slope, 1 - left / spread if spread else 1.0,
                     slope / base if base and base > 0 else None, floor, len(points))
        )  # fmt: skip
    return found
