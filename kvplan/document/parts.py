"""The parts of a report: what each number is, and in which unit.

Bytes and tokens are whole numbers, times and rates floats in SI units, with the unit in the name. Unknown is None.
Floats keep six significant digits, so that a report made on another machine is the same to the byte. Text has no
control or bidi characters left in it, so that no form of a report can be made to show something else.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FiniteFloat

from kvplan.memory.request import Source

MAX_TEXT_CHARS = 2000


def printable(value: object) -> object:
    """Text with every control, format (bidi) and unpaired character replaced, cut to ``MAX_TEXT_CHARS``."""
    if not isinstance(value, str):
        return value
    text = "".join(ch if ch.isprintable() else "\ufffd" for ch in value[: MAX_TEXT_CHARS + 1])
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 1] + "…"


def six_digits(value: float) -> float:
    """``value`` to six significant digits."""
    return float(f"{value:.6g}")


Text = Annotated[str, BeforeValidator(printable)]
Real = Annotated[FiniteFloat, AfterValidator(six_digits)]


class Part(BaseModel):
    """A part of a document: immutable, and no field that the schema does not have."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Deployment(Part):
    """What is served, on what, and for whom. ``num_users`` is None when no number was asked for."""

    model: Text
    architecture: Text
    num_parameters: int
    weight_format: Text
    gpu: Text
    gpu_name: Text
    num_gpus: int
    layout: Text
    engine: Text
    engine_version: Text
    rules: Literal["exact", "approximation"]
    kv_cache_dtype: Text
    context_tokens: int
    num_users: int | None
    input_tokens: int
    output_tokens: int
    lengths_given: bool


class Interval(Part):
    """A predicted time in seconds with its 80% interval."""

    value_s: Real
    low_s: Real
    high_s: Real


class Latency(Part):
    """Predictions for one number of users.

    Attributes:
        itl: one decode step when every user is at ``context_tokens``.
        tpot, ttft: under a closed loop of that many users with the report's prompt and answer lengths.

    """

    label: Text
    num_users: int
    context_tokens: int
    itl: Interval
    tpot: Interval
    ttft: Interval
    tokens_per_s_per_user: Real
    tokens_per_s_per_gpu: Real


class LatencyBasis(Part):
    """Where predictions come from, or why there are none (``problem``)."""

    source: Source | None
    detail: Text
    interval_note: Text
    problem: Text | None


class Answers(Part):
    """The numbers to sign. Counts are over all replicas, bytes of one GPU; None is unknown."""

    fits: bool
    headline: Text
    sentences: list[Text]
    max_users: int
    max_context_tokens: int | None
    kv_cache_bytes: int | None
    kv_needed_bytes: int
    kv_headroom_bytes: int | None
    now: Latency | None
    limit: Latency | None
    basis: LatencyBasis


SegmentKind = Literal["reserve", "weights", "engine", "kv", "scales", "waste", "headroom", "short"]


class Segment(Part):
    """A share of one GPU's memory. The segments of a report add up to the GPU's memory."""

    name: Text
    label: Text
    kind: SegmentKind
    bytes: int
    source: Source | None
    detail: Text
    override: Text


class Precision(Part):
    """One KV format. ``forbidden`` says what rules it out, ``latency_problem`` why no time is predicted.

    Attributes:
        capacity_gain: bytes of a 16-bit request over bytes of this one: scales, padding and blocks included.
        claimed_gain: what people quote: 16 bits over the bits of an element.
        slope_ratio: growth of ITL with context over that of 16 bits, kernel included.
        bytes_ratio: the same if only bytes counted: what a perfect kernel reaches.
        measured_slope_ratio: of kvplan's own kernels, from the run folder given.
        break_even_tokens: users × context below which it saves less than 2% of ITL; None when it never does.

    """

    kv_cache_dtype: Text
    is_chosen: bool
    forbidden: Text | None = None
    bytes_per_token: int | Real | None = None
    scale_bytes_per_token: int | Real | None = None
    scale_share: Real | None = None
    block_size_tokens: int | None = None
    capacity_tokens: int | None = None
    max_users: int | None = None
    max_context_tokens: int | None = None
    capacity_gain: Real | None = None
    claimed_gain: Real | None = None
    intercept_s: Real | None = None
    slope_s_per_token: Real | None = None
    slope_ratio: Real | None = None
    bytes_ratio: Real | None = None
    slope_ratio_source: Source | None = None
    slope_ratio_detail: Text | None = None
    measured_slope_ratio: Real | None = None
    break_even_tokens: int | None = None
    latency_problem: Text | None = None


class KernelRatio(Part):
    """FP8 slope ratio of an engine's attention kernels on this GPU, with its 80% interval."""

    engine: Text
    slope_ratio: Real
    low: Real
    high: Real
    source: Text


class Waste(Part):
    """Bytes of one GPU that hold nothing useful, what wins them back, and what that adds at the report's context.

    ``wins_capacity`` is the growth of capacity before it is rounded down to whole users: 0.05 is 5%.
    """

    name: Text
    label: Text
    bytes: int
    share: Real
    note: Text
    fix: Text | None = None
    wins_users: int | None = None
    wins_capacity: Real | None = None


class Launch(Part):
    """How to start an engine with this plan; ``command`` is None where the engine cannot."""

    engine: Text
    version: Text
    command: Text | None
    notes: list[Text]
    source: Text


class MeasuredPoint(Part):
    """A measured time beside the prediction.

    ``whole_step`` is a decode step as measured; ``kernel`` is predicted ITL with its KV part replaced by the measured
    attention kernel times the layers.
    """

    kind: Literal["whole_step", "kernel"]
    kv_cache_dtype: Text
    num_users: int
    context_tokens: int
    itl_s: Real
    low_s: Real
    high_s: Real
    predicted_s: Real
    error: Real


class Measured(Part):
    """What a run of ``kvplan measure`` on this GPU adds."""

    run: Text
    device: Text
    software: Text
    taken: Text
    num_samples: int
    points: list[MeasuredPoint]
    median_error: Real | None
    notes: list[Text]


class Surface(Part):
    """One KV format over users × contexts. Lists of lists go by users, then by contexts.

    Attributes:
        max_users, bytes_per_request: at each context.
        limit_context_tokens: the longest context that so many users hold at once; None when not one token.
        itl_s, itl_low_s, itl_high_s, tpot_s, ttft_s: None where nothing is predicted.
        limit_itl_s, limit_low_s, limit_high_s: ITL at ``limit_context_tokens``.

    """

    kv_cache_dtype: Text
    max_users: list[int]
    bytes_per_request: list[int]
    limit_context_tokens: list[int | None]
    itl_s: list[list[Real]] | None = None
    itl_low_s: list[list[Real]] | None = None
    itl_high_s: list[list[Real]] | None = None
    tpot_s: list[list[Real]] | None = None
    ttft_s: list[list[Real]] | None = None
    limit_itl_s: list[Real | None] | None = None
    limit_low_s: list[Real | None] | None = None
    limit_high_s: list[Real | None] | None = None


class WhatIf(Part):
    """Everything the page's controls choose from. ``output_share`` of each context is the answer, the rest the prompt.

    ``kv_cache_bytes`` is of one GPU, ``users`` are over all ``num_replicas``.
    """

    users: list[int]
    contexts_tokens: list[int]
    output_share: Real
    kv_cache_bytes: int | None
    num_gpus: int
    num_replicas: int
    surfaces: list[Surface]


class Advice(Part):
    """Something worth doing or knowing."""

    code: Text
    message: Text


class Figure(Part):
    """A number of the report: where it comes from, how it was worked out, what is assumed and how to override it."""

    section: Text
    name: Text
    value: Text
    source: Text
    formula: Text
    assumption: Text


class Fingerprint(Part):
    """A file the report rests on."""

    kind: Text
    name: Text
    sha256: Text
