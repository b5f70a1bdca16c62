"""KV formats side by side: capacity after scales and padding, slope after the kernel, and where each breaks even."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvplan.document.parts import KernelRatio, Precision
from kvplan.document.question import Question
from kvplan.dtypes import kv_format
from kvplan.errors import KvplanError
from kvplan.latency.kv import attention_calibration, is_latent
from kvplan.latency.lines import ItlLine, make_line
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.engines import ENGINES
from kvplan.memory.limits import longest_held
from kvplan.memory.plan import FormatRow
from kvplan.memory.request import FIELDS
from kvplan.memory.setup import Setup, cache_plan
from kvplan.search import compare_formats, compared_formats, with_format
from kvplan.units import ceil_div

USUAL = ("bfloat16", "float16", "fp8", "fp8_per_token_head", "fp8_ds_mla")
"""Formats compared when none are named; the formats of the model's attention decide which of them apply."""


@dataclass(frozen=True)
class Format:
    """A KV format with what was planned of it; ``plan`` is None when the engine refuses it.

    Attributes:
        line: ITL over context at the report's number of users; None, with ``problem``, when nothing is predicted.
        max_context_tokens: the longest context that many users hold at once.

    """

    name: str
    is_chosen: bool
    row: FormatRow
    plan: CachePlan | None
    line: ItlLine | None
    problem: str | None
    max_context_tokens: int | None

    @property
    def bits(self) -> int:
        """Bits of a K element."""
        return kv_format(self.name).key_bits


def formats_of(question: Question, setup: Setup, cache: CachePlan, available_bytes: int, contexts: Sequence[int]
               ) -> list[Format]:  # fmt: skip
    """The formats of the report, 16 bits first; the one the deployment uses among them."""
    chosen = cache.kv_cache_dtype
    rows = compare_formats(setup, _names(question, setup, chosen), available_bytes)
    users = setup.request.batch_size or 1
    found = []
    for row in rows:
        name = row.kv_cache_dtype
        if row.forbidden is not None:
            found.append(Format(name, name == chosen, row, None, None, None, None))
            continue
        plan = cache_plan(with_format(setup, name))
        line, problem = _line(question, setup, name, contexts, users)
        each = ceil_div(users, setup.num_replicas)
        longest = longest_held(setup, plan, available_bytes, each)
        found.append(Format(name, name == chosen, row, plan, line, problem, longest))
    return found


def _names(question: Question, setup: Setup, chosen: str) -> list[str]:
    usual = compared_formats(setup, chosen)
    names = list(question.compare) or [name for name in usual if name in USUAL or name == chosen]
    if not any(kv_format(name).key_bits == 16 for name in names):
        names.insert(0, usual[0])
    names += [name for name in (chosen, question.refused) if name is not None and name not in names]
    return sorted(names, key=lambda name: -kv_format(name).key_bits)


def _line(question: Question, setup: Setup, name: str, contexts: Sequence[int], users: int
          ) -> tuple[ItlLine | None, str | None]:  # fmt: skip
    left_out = ("context_tokens", "batch_size", "id")
    options = {key: getattr(setup.request, key) for key in FIELDS if key not in left_out}
    options = {key: value for key, value in options.items() if value is not None}
    options |= {"kv_cache_dtype": name, "calibration": question.calibration}
    stated = setup.request.max_num_seqs is not None
    if not stated and setup.default_num_seqs is not None:
        options["max_num_seqs"] = setup.options.max_num_seqs  # memory as it is planned
    if setup.request.gpu is None and setup.gpu is not None:
        return None, f"the bandwidth and compute of a {setup.gpu.display_name} are unknown"
    try:
        line = make_line(name, options, contexts, users)
        return line if stated else replace(line, served=replace(line.served, max_running=None)), None
    except KvplanError as error:
        return None, error.message


def precisions_of(formats: Sequence[Format], measured_ratios: dict[str, float]) -> list[Precision]:
    """The comparison as the report states it."""
    base = next((fmt for fmt in formats if fmt.bits == 16 and fmt.plan is not None), None)
    return [_precision(fmt, base, measured_ratios.get(fmt.name)) for fmt in formats]


def _bytes_ratio(fmt: Format, base: Format | None) -> float | None:
    """Bytes that one more token of context is read with, over those of 16 bits; of those it is stored with where no
    step is predicted. Index keys are as large in every format, and latents beyond the top are stored and not read.
    """
    if base is None:
        return None
    if fmt.line is None or base.line is None:
        mine, theirs = fmt.row.bytes_per_token, base.row.bytes_per_token
    else:
        mine, theirs = (
            float(line.served.traffic.kv_slope_bytes_per_token(line.plans[-1].context_tokens))
            for line in (fmt.line, base.line)
        )
    return mine / theirs if mine is not None and theirs else None


def _precision(fmt: Format, base: Format | None, measured_ratio: float | None) -> Precision:
    row, line = fmt.row, fmt.line
    if row.forbidden is not None:
        return Precision(kv_cache_dtype=fmt.name, is_chosen=fmt.is_chosen, forbidden=row.forbidden)
    is_base = base is not None and fmt.name == base.name
    return Precision(
        kv_cache_dtype=fmt.name,
        is_chosen=fmt.is_chosen,
        bytes_per_token=row.bytes_per_token,
        scale_bytes_per_token=row.scale_bytes_per_token,
        scale_share=row.scale_share,
        block_size_tokens=row.block_size_tokens,
        capacity_tokens=row.capacity_tokens,
        max_users=row.max_batch_at_context,
        max_context_tokens=fmt.max_context_tokens,
        capacity_gain=row.effective_gain,
        claimed_gain=row.advertised_gain,
        intercept_s=None if line is None else line.intercept_s,
        slope_s_per_token=None if line is None else line.slope_s_per_token,
        slope_ratio=1.0 if is_base and line is not None else None if line is None else line.slope_ratio,
        bytes_ratio=_bytes_ratio(fmt, base),
        slope_ratio_source="exact" if is_base else None if line is None else line.slope_ratio_source,
        slope_ratio_detail=None if line is None else line.slope_ratio_detail or None,
        measured_slope_ratio=measured_ratio,
        break_even_tokens=None if line is None else line.break_even_tokens,
        latency_problem=fmt.problem,
    )


def kernel_ratios(setup: Setup) -> list[KernelRatio]:
    """FP8 slope ratios of every engine whose attention kernels were calibrated on this GPU; none for latent caches."""
    if setup.gpu is None or is_latent(setup.model):
        return []
    found = []
    for engine in ENGINES:
        calibration = attention_calibration(setup.gpu.name, engine)
        ratio = None if calibration is None else calibration.slope_ratio("fp8")
        if ratio is not None and ratio.kind == "calibrated":
            found.append(KernelRatio(engine=engine, slope_ratio=ratio.value, low=ratio.low, high=ratio.high,
                                     source=ratio.source))  # fmt: skip
    return found


def small_format(precisions: Sequence[Precision]) -> Precision | None:
    """The format that "what FP8 buys" is about: the deployment's own when below 16 bits, else the first such."""
    small = [p for p in precisions if p.forbidden is None and kv_format(p.kv_cache_dtype).key_bits < 16]
    return next((p for p in small if p.is_chosen), small[0] if small else None)
