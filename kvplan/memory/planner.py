"""From a ``SizeRequest`` to a ``SizePlan``: defaults, rule set, budget, answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvplan.errors import ConfigError
from kvplan.memory.budget import Budget
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.limits import longest_held, most_held
from kvplan.memory.pages import Group
from kvplan.memory.plan import Answers, CacheGroup, KvCache, Memory, ModelFacts, Rule, SizePlan, TermSource
from kvplan.memory.request import SizeRequest, Source
from kvplan.memory.setup import Setup, budget_of, weights_of
from kvplan.weights import stored_format

GROWING = ("full", "mla", "indexer")


def make_plan(setup: Setup, plan: CachePlan) -> SizePlan:
    """The core of the answer: cache, memory, fit. Comparison, ledger and advice are added by ``kvplan.search``."""
    if not plan.groups or plan.pool_bytes_per_block == 0:
        raise ConfigError(f"{setup.model.name} has no layer that caches anything: there is nothing to size")
    weights = weights_of(setup)
    budget = budget_of(setup, weights)
    return SizePlan(
        request=resolved_request(setup, plan),
        model=_facts(setup) if setup.has_model else None,
        kv_cache=kv_cache_of(setup, plan, budget.kv_bytes),
        memory=_memory(budget),
        fits=fits(setup, plan, budget),
        answers=answers_of(setup, plan, budget),
        rules=(
            *(Rule(name=n, formula=f, source=s) for n, f, s in (*plan.rules, *_engine_rules(setup, plan, budget))),
            *_block_rules(setup, plan),
        ),
    )


def _engine_rules(setup: Setup, plan: CachePlan, budget: Budget) -> Iterator[tuple[str, str, str]]:
    """How the memory fraction comes about, where it counts, and the requests at once, where they are derived."""
    if setup.request.kv_cache_memory_bytes is None:
        yield from setup.memory_fraction.rules
    if plan.pools and (pool := plan.pools[0]).share < 1 and budget.kv_bytes is not None:
        kv, size = max(budget.kv_bytes, 0), plan.pool_block_bytes(pool)
        rounded = f"{size:,} B in the pool of {pool.name} / its share, {pool.share:.6f}, rounded up"
        yield "bytes per block", f"{rounded} = {plan.pool_bytes_per_block:,} B", plan.engine
        room = f"{int(kv * pool.share):,} B of that pool"
        yield "num_blocks", f"⌊{room} / {size:,} B⌋ = {plan.num_blocks(kv):,}", plan.engine
    if (derived := _derived_limit(setup, plan, budget.kv_bytes)) is not None:
        yield "requests at once", *derived[1:]


def _block_rules(setup: Setup, plan: CachePlan) -> Iterator[Rule]:
    """How many blocks of each group one request of the context may hold; groups that are alike are said once."""
    source = "v1/kv_cache_interface.py" if plan.exact else plan.engine
    alike: dict[str, list[int]] = {}
    for number, group in enumerate(plan.groups):
        page = max((run.page for run in group.runs), key=lambda page: page.blocks(setup.context_tokens,
                   plan.tokens_in_flight, plan.dcp_size))  # fmt: skip
        formula = f"{page.kind}: {page.blocks_formula(setup.context_tokens, plan.tokens_in_flight, plan.dcp_size)}"
        alike.setdefault(formula, []).append(number)
    for formula, numbers in alike.items():
        which = f"group {numbers[0]}" if len(numbers) == 1 else f"each of groups {', '.join(map(str, numbers))}"
        yield Rule(name=f"blocks of {which}", formula=formula, source=source)


def resolved_request(setup: Setup, plan: CachePlan) -> SizeRequest:
    """The request as it was understood, defaults filled in; a limit of requests that is not known stays unstated."""
    known = setup.engine.default_num_seqs(setup.gpu, setup.options.version or ()) is not None
    return replace(
        setup.request,
        gpu=setup.gpu.name if setup.gpu is not None else None,
        gpu_memory_bytes=setup.gpu.memory_bytes if setup.gpu is not None else None,
        engine=setup.engine.name,
        engine_version=plan.version,
        kv_cache_dtype=plan.kv_cache_dtype,
        block_size_tokens=plan.block_size_tokens,
        ep=setup.split.ep,
        context_tokens=setup.context_tokens,
        max_model_len_tokens=setup.max_model_len_tokens,
        max_num_seqs=setup.options.max_num_seqs if known else setup.request.max_num_seqs,
        max_num_batched_tokens=setup.batched_tokens,
        gpu_memory_utilization=setup.fraction,
    )


def fits(setup: Setup, plan: CachePlan, budget: Budget) -> bool | None:
    """Whether the engine starts (one request of the longest length) and the batch asked for is held at once.

    KV bytes that were set beyond the GPU hold no load; without a load, the question is the allocator's alone.
    """
    available_bytes, request = budget.kv_bytes, setup.request
    if available_bytes is None:
        return None
    if budget.excess_bytes and (request.context_tokens is not None or request.batch_size is not None):
        return False
    starts = plan.fits_one(available_bytes, setup.max_model_len_tokens)
    if not starts or setup.request.batch_size is None:
        return starts
    return setup.runs_at_once and plan.max_batch(available_bytes, setup.context_tokens) >= setup.batch_per_replica


def per_token_bytes(plan: CachePlan) -> tuple[float, float]:
    """(all, scale) bytes one more token stores on the fullest rank, in the layers that grow with the context."""
    best = (0.0, 0.0)
    for groups in plan.rank_groups:
        total = scales = 0.0
        for group in groups:
            for run in group.runs:
                if run.page.kind in GROWING:
                    total += run.page.page_bytes * run.num_layers / run.page.block_size_tokens
                    scales += run.page.scale_bytes_per_page * run.num_layers / run.page.block_size_tokens
        best = max(best, (total / plan.dcp_size, scales / plan.dcp_size))
    return best


def _fullest_rank(plan: CachePlan) -> tuple[Group, ...]:
    """The groups of the pipeline rank whose blocks take the most bytes."""
    return max(plan.rank_groups, key=lambda groups: sum(group.bytes_per_block for group in groups))


def scale_bytes_per_request(plan: CachePlan, context_tokens: int) -> int:
    """Scale bytes in the blocks one request may hold, on the fullest rank."""
    return max(
        sum(
            group.blocks(context_tokens, plan.tokens_in_flight, plan.dcp_size)
            * run.page.scale_bytes_per_page
            * run.num_layers
            for group, mine in zip(plan.groups, groups, strict=True)
            for run in mine.runs
        )
        for groups in plan.rank_groups
    )


def whole(value: float) -> int | float:
    """An int when it is one."""
    return int(value) if value == int(value) else value


def kv_cache_of(setup: Setup, plan: CachePlan, available: int | None) -> KvCache:
    """The cache section of the answer."""
    per_token, scales = per_token_bytes(plan)
    known = available is not None
    budget = max(available or 0, 0)
    length = setup.max_model_len_tokens
    return KvCache(
        engine=plan.engine,
        engine_version=plan.version,
        rules="exact" if plan.exact else "approximation",
        kv_cache_dtype=plan.kv_cache_dtype,
        bytes_per_token=whole(per_token),
        scale_bytes_per_token=whole(scales),
        block_size_tokens=plan.block_size_tokens,
        bytes_per_block=plan.pool_bytes_per_block,
        bytes_per_request=plan.bytes_per_request(setup.context_tokens),
        scale_bytes_per_request=scale_bytes_per_request(plan, setup.context_tokens),
        blocks_per_request=plan.blocks_per_request(setup.context_tokens),
        num_blocks=plan.num_blocks(budget) if known else None,
        capacity_tokens=plan.capacity_tokens(budget, length) if known else None,
        max_concurrency=plan.max_concurrency(budget, length) if known else None,
        groups=tuple(
            CacheGroup(
                kind="sliding" if run.page.kind == "sliding_mla" else run.page.kind,
                num_layers=run.num_layers,
                page_bytes=run.page.page_bytes,
                scale_bytes_per_page=run.page.scale_bytes_per_page,
                block_size_tokens=run.page.block_size_tokens,
                num_kv_heads_per_rank=run.page.num_heads,
                window_tokens=run.page.window_tokens,
                padding_bytes_per_page=run.page.padding_bytes,
                group=number,
            )
            for number, group in enumerate(_fullest_rank(plan))
            for run in group.runs
        ),
    )


def answers_of(setup: Setup, plan: CachePlan, budget: Budget) -> Answers:
    """The questions people ask, answered; with KV bytes that were given, as the allocator would."""
    request, available = setup.request, budget.kv_bytes
    room = available if request.kv_cache_memory_bytes is not None else budget.room_bytes
    num_gpus = request.tp_size * request.pp_size * request.dp_size
    per_request = plan.bytes_per_request(setup.context_tokens)
    needed = per_request * setup.batch_per_replica
    ranks = range(len(plan.rank_groups))
    everywhere = sum(plan.rank_bytes_per_request(rank, setup.context_tokens) for rank in ranks)
    short = None
    max_batch = max_context = None
    if available is not None and room is not None:
        short = max(plan.bytes_to_hold(setup.batch_per_replica, setup.context_tokens) - max(available, 0), 0)
        max_batch = most_held(setup, plan, room) * request.dp_size
        max_context = longest_held(setup, plan, room, setup.batch_per_replica)
    running = request.max_num_seqs or setup.default_num_seqs
    source: Source = "given" if request.max_num_seqs is not None else "exact"
    if (derived := _derived_limit(setup, plan, available)) is not None:
        running, source = derived[0], "assumed"
    return Answers(
        context_tokens=setup.context_tokens,
        batch_size=request.batch_size,
        kv_needed_bytes=everywhere * request.tp_size * (request.batch_size or 1),
        kv_needed_bytes_per_gpu=needed,
        kv_short_bytes_per_gpu=short,
        max_batch_at_context=max_batch,
        max_context_at_batch_tokens=max_context,
        num_gpus=num_gpus,
        max_running=None if running is None else running * request.dp_size,
        max_running_source=None if running is None else source,
    )


def _derived_limit(setup: Setup, plan: CachePlan, available: int | None) -> tuple[int, str, str] | None:
    """Requests at once as the engine works them out from its cache, with the formula; None where it does not."""
    derive = setup.engine.derived_num_seqs
    if derive is None or setup.request.max_num_seqs is not None or available is None:
        return None
    return derive(plan, max(available, 0), setup.max_model_len_tokens)


def _memory(budget: Budget) -> Memory:
    names = ("total", "usable", "weights", "activation", "graphs", "overhead", "kv_cache")
    keys = {"graphs": "graph_bytes"}
    terms = {keys.get(name, f"{name}_bytes"): getattr(budget, name) for name in names}
    return Memory(
        **{key: term.value_bytes for key, term in terms.items()},
        excess_bytes=budget.excess_bytes,
        sources={
            key: TermSource(source=term.source, detail=term.detail, override=term.override)
            for key, term in terms.items()
        },
    )


def _facts(setup: Setup) -> ModelFacts:
    model = setup.model
    kinds: dict[str, int] = {}
    for layer in model.layers:
        for cache in layer.caches:
            kinds[cache.kind] = kinds.get(cache.kind, 0) + 1
    return ModelFacts(
        name=model.name,
        source=model.source,
        architecture=model.architecture,
        family=model.family,
        num_layers=model.num_layers,
        num_parameters=model.num_parameters,
        num_active_parameters=model.num_active_parameters,
        max_context_tokens=model.max_context_tokens,
        weight_format=stored_format(model, setup.request.weight_dtype),
        layer_kinds=kinds,
        notes=model.notes,
    )
