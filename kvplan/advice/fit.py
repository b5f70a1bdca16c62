"""What to change where a request does not fit, or the scheduler lets fewer run than there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import floor
from typing import Any

from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.engines.sglang_memory import FREE_AFTER_START_BYTES, LEAST_RUNNING
from kvplan.memory.limits import kv_bytes_for, most_held, planned_with
from kvplan.memory.plan import Advice, SizePlan
from kvplan.memory.planner import fits
from kvplan.memory.setup import Setup, set_up
from kvplan.units import format_count, format_gib, format_tokens


def does_not_fit(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """What is missing, what fits instead, and under what the request would."""
    if answer.fits is not False or answer.memory.excess_bytes:
        return
    memory, answers = answer.memory, answer.answers
    if answers.num_waiting and not answers.kv_short_bytes_per_gpu:
        return
    remedy, longest = _what_would_fit(setup, plan, answer), _longest_that_starts(setup, plan, answer)
    if memory.kv_cache_bytes is not None and memory.kv_cache_bytes <= 0:
        yield Advice(
            code="weights_do_not_fit",
            message=f"weights and the engine's own memory exceed usable memory by {format_gib(-memory.kv_cache_bytes)} "
            f"per GPU before any KV{remedy or '; use more GPUs or smaller weights (--weight-dtype)'}",
        )
        return
    if answer.too_long_tokens is not None:
        yield Advice(
            code="does_not_fit",
            message=f"the engine refuses to start: its longest request, {format_tokens(answer.too_long_tokens)} "
            f"tokens, is more than the KV memory holds; --max-model-len {longest} would do{remedy}",
        )
        return
    parts = []
    if answers.max_batch_at_context:
        held = format_count(answers.max_batch_at_context, "request")
        parts.append(f"{held} at {format_tokens(answers.context_tokens)} tokens")
    if answers.max_context_at_batch_tokens:
        who = f"batch {answers.batch_size}" if answers.batch_size else "one request"
        parts.append(f"{who} at {format_tokens(answers.max_context_at_batch_tokens)} tokens")
    starting = "" if longest is None else f", with --max-model-len {longest}"
    room = f"; what fits{starting}: {' or '.join(parts)}" if parts else ""
    short = format_gib(answers.kv_short_bytes_per_gpu)
    yield Advice(code="does_not_fit", message=f"KV is short by {short} per GPU{room}{remedy}")


def _longest_that_starts(setup: Setup, plan: CachePlan, answer: SizePlan) -> int | None:
    """The longest request with which the engine starts; None where the one it was told of does, or none would."""
    available = kv_bytes_for(setup, setup.batch_per_replica, answer.memory.kv_cache_bytes or 0)
    told = setup.request.max_model_len_tokens
    return None if told is None or plan.fits_one(available, told) else plan.max_context(available, 1, told)


def _what_would_fit(setup: Setup, plan: CachePlan, answer: SizePlan) -> str:
    """DCP over the same GPUs, the smallest larger TP, and the KV formats, under which the request fits."""
    options = []
    copies = plan.num_copies
    if copies > 1 and setup.engine.splits_contexts and _fits_with(setup, dcp_size=plan.dcp_size * copies):
        options.append(f"--dcp {plan.dcp_size * copies}")
    larger = (tp for tp in (2, 4, 8, 16) if tp > setup.options.tp_size and _fits_with(setup, tp_size=tp))
    options += [f"--tp {tp}" for tp in itertools.islice(larger, 1)]
    available = answer.memory.kv_cache_bytes
    if available is not None and available > 0:
        rows = (row for row in answer.comparison if row.forbidden is None and (row.effective_gain or 0) > 1)
        held = (r.kv_cache_dtype for r in rows if _fits_with(setup, kv_cache_dtype=r.kv_cache_dtype))
        options += [f"--kv-cache-dtype {name}" for name in itertools.islice(held, 1)]
    return f"; it would fit with {' or '.join(options)}" if options else ""


def _fits_with(setup: Setup, **fields: Any) -> bool:
    """Whether the request fits with some of its fields changed."""
    found = planned_with(setup, fields)
    return found is not None and not found[2].excess_bytes and fits(*found) is True


def scheduler(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """Requests that wait, or would, because the engine runs fewer at once than there are or are held."""
    if answer.fits is None:
        return
    answers, replicas = answer.answers, setup.num_replicas
    each = " on each replica" if replicas > 1 else ""
    if answers.num_waiting:
        yield Advice(
            code="max_num_seqs",
            message=f"--max-num-seqs {setup.request.max_num_seqs} lets {answers.max_running:,} of "
            f"{format_count(answers.batch_size or 1, 'request')} run at once, and the rest wait"
            f"{_higher_limit(setup, plan, answer)}",
        )
        return
    stated, most = setup.request.max_num_seqs, max(answers.batch_size or 0, answers.max_batch_at_context or 0)
    if stated is not None or answers.max_running is None or answer.verdict is False or most <= answers.max_running:
        return
    default = answers.max_running // replicas
    runs = f"{plan.engine} {plan.version} runs {format_count(default, 'request')} at once{each} unless told"
    if setup.batch_per_replica > default:
        wanted = f"this plan takes --max-num-seqs {setup.batch_per_replica}"
    else:
        wanted = f"more, up to the {most:,} that are held, take --max-num-seqs"
    yield Advice(code="max_num_seqs", message=f"{runs}: {wanted}")


def _higher_limit(setup: Setup, plan: CachePlan, answer: SizePlan) -> str:
    """The limit that would let all requests run, or as many as KV memory holds; empty where that is no more."""
    unlimited = set_up(replace(setup.request, max_num_seqs=None))
    held = most_held(unlimited, plan, answer.memory.kv_cache_bytes or 0)
    limit = min(held, setup.batch_per_replica)
    running = min(limit * setup.num_replicas, setup.request.batch_size or 1)
    if limit <= (setup.request.max_num_seqs or 0) or not _fits_with(setup, max_num_seqs=limit, batch_size=running):
        return ""
    who = "all of them" if held >= setup.batch_per_replica else f"{running:,}, as many as the KV memory holds"
    return f"; --max-num-seqs {limit} would let {who}"


def budget(setup: Setup, plan: CachePlan, answer: SizePlan) -> Iterator[Advice]:
    """A budget that was given and cannot be, or that leaves out a term."""
    memory = answer.memory
    if memory.excess_bytes:
        room = (memory.kv_cache_bytes or 0) - memory.excess_bytes
        most = f"; at most {format_gib(room)} would do" if room > 0 else ""
        if room > 0 and setup.request.kv_cache_memory_bytes is None:
            usable = memory.usable_bytes or 1
            fraction = floor(setup.fraction * (usable - memory.excess_bytes) / usable * 100) / 100
            most = f"; at most {setup.engine.fraction_flag} {fraction:g} would do"
        told, table = setup.request.max_num_seqs is not None, setup.engine.table_bytes(setup.options)
        if (memory.activation_bytes or 0) >= memory.excess_bytes if told else table >= memory.excess_bytes:
            lower = "a lower --max-num-seqs" if told else f"a --max-num-seqs below {LEAST_RUNNING:,}"
            most += f"{' and' if most else ';'} {lower} takes less"
        yield Advice(
            code="budget_beyond_gpu",
            message=f"weights, the KV bytes set aside and the engine's own memory exceed the GPU's memory by "
            f"{format_gib(memory.excess_bytes)}: the engine would run out of memory{most}",
        )
        return
    if setup.engine.fraction_of == "static" and (memory.kv_cache_bytes or 0) > 0:
        yield from _free_after_start(setup, answer)
    if (
        setup.request.kv_cache_memory_bytes is None
        and memory.kv_cache_bytes is not None
        and memory.activation_bytes is None
    ):
        yield Advice(
            code="activation_unknown",
            message="activation peak unknown without an architecture and not taken off: give --activation-memory",
        )


def _free_after_start(setup: Setup, answer: SizePlan) -> Iterator[Advice]:
    """SGLang takes its fraction whole, whatever activations need later: too little beside it is said.

    That is less than its guide wants free, or than the logits of as many requests as it was told to run take.
    """
    memory, table = answer.memory, setup.engine.table_bytes(setup.options)
    started = [memory.weights_bytes, memory.kv_cache_bytes, memory.graph_bytes, memory.overhead_bytes, table]
    free = (memory.total_bytes or 0) - sum(size or 0 for size in started)
    peak = (memory.activation_bytes or 0) - table
    wanted = max(FREE_AFTER_START_BYTES, peak)
    if memory.total_bytes is None or free >= wanted:
        return
    usable, given = memory.usable_bytes or 1, setup.request.kv_cache_memory_bytes is None
    fraction = floor(setup.fraction * (usable - wanted + free) / usable * 100) / 100
    lower = f"; {setup.engine.fraction_flag} {fraction:g} would leave that" if given and fraction > 0 else ""
    if table >= FREE_AFTER_START_BYTES / 4:
        lower += f"; {format_gib(table)} are the table of requests and their tokens: a lower --max-num-seqs takes less"
    elif peak > FREE_AFTER_START_BYTES and setup.request.max_num_seqs is not None:
        lower += "; so would a lower --max-num-seqs" if lower else "; a lower --max-num-seqs takes less"
    why = "SGLang's guide wants 5 to 8 GB" if wanted > peak else f"they may take {format_gib(peak)}"
    yield Advice(
        code="little_left",
        message=f"{f'{format_gib(free)} are' if free > 0 else 'nothing is'} left for activations when the server has "
        f"started, and {why}: it may run out of memory under load{lower}",
    )
