"""Questions that take many plans: which precision, which GPU, how many of them, and what to change.

``size`` is the whole answer to a request: the core plan, a comparison of precisions, the waste ledger and advice, or,
when no GPU was named, the fewest of each GPU that hold what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

from kvplan.advice import advise
from kvplan.dtypes import KV_FORMATS, kv_format
from kvplan.errors import InputError, KvplanError, UnsupportedError
from kvplan.gpu import gpu_names, load_gpu
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.ledger import LABELS, waste_ledger
from kvplan.memory.limits import most_held
from kvplan.memory.plan import FormatRow, GpuRow, LedgerLine, SizePlan
from kvplan.memory.planner import make_plan, per_token_bytes, scale_bytes_per_request, whole
from kvplan.memory.request import SizeRequest
from kvplan.memory.setup import Setup, budget_of, cache_plan, set_up, weights_of
from kvplan.weights import WeightBytes

COMPARED = ("bfloat16", "fp8", "fp8_per_token_head", "int8_per_token_head", "int4_per_token_head", "nvfp4")
COMPARED_LATENT = ("bfloat16", "fp8", "fp8_ds_mla", "nvfp4_ds_mla")
TP_SIZES = (1, 2, 4, 8, 16)
MAX_GPUS = 128


def size(request: SizeRequest, *, compare: bool = True) -> SizePlan:
    """The whole answer to ``request``.

    Args:
        request: what to size.
        compare: also compare precisions, keep the ledger, search GPUs and give advice; False for bulk planning.

    Raises:
        KvplanError: the request cannot be understood, or the engine refuses it.

    """
    setup = set_up(request)
    cache = cache_plan(setup)
    plan = make_plan(setup, cache)
    if not compare:
        return plan
    available = plan.memory.kv_cache_bytes
    rows = compare_formats(setup, compared_formats(setup, cache.kv_cache_dtype), available)
    plan = replace(plan, comparison=rows)
    if available is None:
        plan = replace(plan, gpus=smallest_on_each_gpu(setup))
    elif available > 0 and not plan.memory.excess_bytes:
        held = most_held(setup, cache, available)
        count = held if request.batch_size is None else min(held, setup.batch_per_replica)
        ledger = waste_ledger(cache, available, setup.context_tokens, count)
        labels = LABELS if count == held else {**LABELS, "unused": "free blocks"}
        lines = tuple(LedgerLine(name=n, label=labels[n], bytes=b) for n, b in ledger.lines.items())
        plan = replace(plan, ledger=lines, ledger_requests=count)
    return replace(plan, advice=advise(setup, cache, plan))


def with_format(setup: Setup, name: str) -> Setup:
    """The same set-up with another KV format."""
    request = replace(setup.request, kv_cache_dtype=name)
    return replace(setup, request=request, options=replace(setup.options, kv_cache_dtype=name))


def compared_formats(setup: Setup, asked: str) -> list[str]:
    """Formats worth a row: the usual ones for this attention, and ``asked``, the one the request became."""
    kinds = setup.model.cache_kinds
    names = list(COMPARED_LATENT if "mla" in kinds else COMPARED)
    if "compressed" in kinds:
        names = ["bfloat16", "fp8_ds_mla"]
    if "mla" in kinds and "indexer" not in kinds:
        names = ["bfloat16", "fp8"]
    if setup.model.dtype == "float16":
        names[0] = "float16"
    if asked not in names:
        names.append(asked)
    return names


def compare_formats(setup: Setup, names: Sequence[str], available: int | None) -> tuple[FormatRow, ...]:
    """A row for each format of ``names``, against the first of 16 bits that the engine takes.

    A format that the engine may not run on this GPU counts as ruled out, unless it is the one asked for.
    """
    asked = cache_plan(setup).kv_cache_dtype
    baseline: int | None = None
    rows = []
    for name in names:
        try:
            plan = cache_plan(with_format(setup, name))
        except UnsupportedError as error:
            rows.append(FormatRow(kv_cache_dtype=name, forbidden=_short_reason(error)))
            continue
        if plan.doubt is not None and name != asked:
            rows.append(FormatRow(kv_cache_dtype=name, forbidden=plan.doubt))
            continue
        if kv_format(name).key_bits == 16 and baseline is None:
            baseline = plan.bytes_per_request(setup.context_tokens)
        rows.append(_format_row(setup, name, plan, available, baseline))
    return tuple(rows)


def _short_reason(error: KvplanError) -> str:
    return error.message.split(": ", 1)[-1]


def _format_row(setup: Setup, name: str, plan: CachePlan, available: int | None, baseline: int | None) -> FormatRow:
    context = setup.context_tokens
    request_bytes = plan.bytes_per_request(context)
    per_token, scales = per_token_bytes(plan)
    held = plan.held_bytes(context)
    share = scale_bytes_per_request(plan, context) / held if held else 0.0
    budget = None if available is None else max(available, 0)
    return FormatRow(
        kv_cache_dtype=name,
        bytes_per_token=whole(per_token),
        scale_bytes_per_token=whole(scales),
        scale_share=share,
        capacity_tokens=None if budget is None else plan.capacity_tokens(budget, setup.max_model_len_tokens),
        max_batch_at_context=None if budget is None else most_held(setup, plan, budget) * setup.num_replicas,
        advertised_gain=KV_FORMATS[name].advertised_gain if name in KV_FORMATS else kv_format(name).advertised_gain,
        effective_gain=baseline / request_bytes if baseline else None,
        block_size_tokens=plan.block_size_tokens,
    )


def smallest_on_each_gpu(setup: Setup) -> tuple[GpuRow, ...]:
    """For every bundled GPU, the fewest that hold the weights and the KV asked for, as TP and replicas."""
    weights: dict[tuple[int, int], WeightBytes | None] = {}
    plans: dict[Any, CachePlan] = {}
    return tuple(_fewest(setup, name, weights, plans) for name in gpu_names())


def _fewest(
    setup: Setup, name: str, weights: dict[tuple[int, int], WeightBytes | None], plans: dict[Any, CachePlan]
) -> GpuRow:
    """One row; ``weights`` remembers the weights at each (TP, DP) size, which do not depend on the GPU, and ``plans``
    the caches, which depend on its vendor and architecture only.

    Each layout takes as many servers as the batch needs; the fewest GPUs win, and among equals the larger TP.
    """
    gpu = load_gpu(name)
    row = GpuRow(gpu=name, display_name=gpu.display_name, memory_bytes=gpu.memory_bytes, smallest_tp_size=None)
    layouts = list(_layouts(setup))
    reason = f"one request does not fit on {max(tp * dp for tp, dp in layouts) * setup.request.pp_size} GPUs"
    best: GpuRow | None = None
    for tp, dp in layouts:
        gpus_each = tp * setup.request.pp_size * dp
        if best is not None and gpus_each > (best.num_gpus or 0):
            continue  # more GPUs with one server already
        request = replace(setup.request, gpu=name, tp_size=tp, dp_size=dp, gpu_memory_bytes=None)
        try:
            candidate = set_up(request)
            key = (gpu.vendor, gpu.architecture, replace(candidate.options, gpu=None))
            plan = plans.get(key) or plans.setdefault(key, cache_plan(candidate))
            if (tp, dp) not in weights:
                weights[tp, dp] = weights_of(candidate)
        except UnsupportedError as error:
            reason = _short_reason(error)
            continue
        except InputError:
            continue
        available = budget_of(candidate, weights[tp, dp]).kv_bytes
        if available is None:
            return replace(row, reason="weights unknown: give --params")
        held = most_held(candidate, plan, available)
        if not held or not plan.fits_one(available, candidate.max_model_len_tokens):
            continue
        servers = max(-(-(setup.request.batch_size or 1) // (held * dp)), -(-setup.request.dp_size // dp))
        num_gpus = gpus_each * servers
        if best is None or num_gpus <= (best.num_gpus or 0):
            best = replace(row, smallest_tp_size=tp, dp_size=dp, num_replicas=dp * servers, num_gpus=num_gpus,
                           kv_cache_bytes=available, max_batch_at_context=held * dp * servers)  # fmt: skip
    if best is not None and (best.num_gpus or 0) > MAX_GPUS:
        return replace(row, reason=f"more than {MAX_GPUS} GPUs")
    return best or replace(row, reason=reason)


def _layouts(setup: Setup) -> Iterator[tuple[int, int]]:
    """(TP, DP) sizes of one server: DP is 1, or, where replicas share the experts, what splits these evenly."""
    asked, ep = setup.request.dp_size, setup.request.ep
    experts = [w for layer in setup.model.layers for w in layer.weights if w.role == "expert" and len(w.shape) == 2]
    parts = gcd(*(w.copies if ep else w.shape[w.name.endswith("down_proj")] for w in experts))
    most = MAX_GPUS // setup.request.pp_size
    for tp in TP_SIZES:
        if not setup.shares_experts:
            yield tp, 1
            continue
        yield tp, asked
        yield from ((tp, dp) for dp in range(asked + 1, most // tp + 1) if parts % (tp * dp) == 0)
