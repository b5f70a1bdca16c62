"""``--explain``: the formulas of a plan with its numbers in them."""

from __future__ import annotations

from dataclasses import replace

from kvplan.memory.plan import Rule, SizePlan
from kvplan.units import format_count


def explained(plan: SizePlan) -> SizePlan:
    """The plan with every formula behind its numbers, the rule set's own first."""
    return replace(plan, rules=(*plan.rules, *_cache_rules(plan), *_memory_rules(plan)))


def _cache_rules(plan: SizePlan) -> list[Rule]:
    cache, request = plan.kv_cache, plan.request
    rules = []
    for group in cache.groups:
        if group.kind == "state":
            formula = f"{group.page_bytes:,} B a layer, {group.padding_bytes_per_page:,} of them padding"
        else:
            slot = (group.page_bytes - group.padding_bytes_per_page) / (
                group.num_kv_heads_per_rank * group.block_size_tokens
            )
            formula = (
                f"{format_count(group.num_kv_heads_per_rank, 'head')} × "
                f"{format_count(group.block_size_tokens, 'token')} × {slot:g} B = "
                f"{group.page_bytes - group.padding_bytes_per_page:,} B a layer"
                + (f" + {group.padding_bytes_per_page:,} padding" if group.padding_bytes_per_page else "")
                + (f", of which scales {group.scale_bytes_per_page:,}" if group.scale_bytes_per_page else "")
            )
        rules.append(Rule(name=f"page of {group.num_layers} {group.kind} layers (group {group.group})", formula=formula,
                          source="v1/kv_cache_interface.py" if cache.rules == "exact" else cache.engine))  # fmt: skip
    source = "v1/core/kv_cache_planning.py" if cache.rules == "exact" else cache.engine
    of = "num_blocks / blocks" if cache.rules == "exact" else "KV memory / bytes of a request"
    widest = "pages of the widest group" if cache.rules == "exact" else "pages of the layers that count"
    rules.append(Rule(name="bytes per block", formula=f"{widest} = {cache.bytes_per_block:,} B", source=source))
    rules.append(Rule(name="blocks per request", source=source,
                      formula=f"{cache.blocks_per_request:,} at {plan.answers.context_tokens:,} tokens"))  # fmt: skip
    if cache.num_blocks is not None:
        kv, length = plan.memory.kv_cache_bytes, request.max_model_len_tokens
        concurrency = f"{cache.max_concurrency:.4f}"
        by_blocks = cache.capacity_tokens == cache.num_blocks * cache.block_size_tokens
        tokens = f"{cache.num_blocks:,} × {cache.block_size_tokens:,}" if by_blocks else f"⌊{concurrency} × {length:,}⌋"
        for name, formula in (
            ("num_blocks", f"⌊{kv:,} / {cache.bytes_per_block:,}⌋ = {cache.num_blocks:,}"),
            ("max concurrency", f"{of} of {length:,} tokens = {concurrency}"),
            ("capacity", f"{tokens} = {cache.capacity_tokens:,} tokens"),
        ):
            rules.append(Rule(name=name, formula=formula, source=source))
    told = {rule.name for rule in plan.rules}
    return [rule for rule in rules if rule.name not in told]


def _memory_rules(plan: SizePlan) -> list[Rule]:
    rules = []
    for key, term in plan.memory.sources.items():
        value = getattr(plan.memory, key)
        if value is not None:
            rules.append(
                Rule(name=key, formula=f"{value:,} B: {term.detail}", source=f"{term.source}; override {term.override}")
            )
    return rules
