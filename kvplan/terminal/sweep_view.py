"""A sweep of ``kvplan size`` on a terminal: one row a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplan.memory.plan import SizePlan
from kvplan.terminal.console import add_row, make_table, print_line
from kvplan.terminal.size_view import per_token
from kvplan.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

SHORT_NAMES = {
    "tp_size": "tp", "pp_size": "pp", "dp_size": "dp", "dcp_size": "dcp", "kv_cache_dtype": "KV", "batch_size": "batch",
    "context_tokens": "ctx",
}  # fmt: skip


def show_sweep(
    console: Console, plans: list[SizePlan], varied: list[str], failures: list[tuple[dict[str, object], str]]
) -> None:
    """One row a plan: what varied, and the answers."""
    if plans and plans[0].model is not None:
        print_line(
            console, f"{plans[0].model.name} · {plans[0].kv_cache.engine} {plans[0].kv_cache.engine_version}", "bold"
        )
        console.print()
    columns = [SHORT_NAMES.get(name, name) for name in varied]
    budgeted = any(plan.memory.kv_cache_bytes is not None for plan in plans)
    columns += ["KV GiB", "capacity", "max batch", "max ctx", "fits"] if budgeted else ["B/token", "request", "KV"]
    table = make_table(*columns, right=tuple(range(len(columns))))
    for plan in plans:
        values = [getattr(plan.request, name) for name in varied]
        cells = [f"{value:,}" if isinstance(value, int) else str(value) for value in values]
        add_row(table, *cells, *(_held(plan) if budgeted else _needed(plan)))
    console.print(table)
    if plans and not budgeted:
        print_line(console, "  B/token and request: on one GPU; KV: of all requests, on all GPUs", "dim")
    alike: dict[str, list[dict[str, object]]] = {}
    for chosen, message in failures:
        alike.setdefault(message, []).append(chosen)
    for message, combinations in alike.items():
        common = ((name, value) for name, value in combinations[0].items()
                  if all(each[name] == value for each in combinations))  # fmt: skip
        shown = ", ".join(f"{SHORT_NAMES.get(name, name)} {value}" for name, value in common)
        count = f" ({len(combinations):,} combinations)" if len(combinations) > 1 else ""
        print_line(console, f"  {shown or 'all'}{count}: no: {message}", "dim")


def _held(plan: SizePlan) -> list[str]:
    """What the memory of one GPU holds."""
    answers, kv = plan.answers, plan.memory.kv_cache_bytes
    return [
        "–" if kv is None else f"{kv / 2**30:,.2f}" if kv > 0 else "none",
        "–" if plan.kv_cache.capacity_tokens is None else f"{plan.kv_cache.capacity_tokens:,}",
        "–" if answers.max_batch_at_context is None else f"{answers.max_batch_at_context:,}",
        "–" if answers.max_context_at_batch_tokens is None else f"{answers.max_context_at_batch_tokens:,}",
        {True: "yes", False: "no", None: "?"}[plan.verdict],
    ]


def _needed(plan: SizePlan) -> list[str]:
    """What is needed whatever the GPU: bytes of a token and of a request, and of all requests."""
    cache = plan.kv_cache
    return [
        per_token(cache.bytes_per_token).removesuffix(" B"),
        format_bytes(cache.bytes_per_request),
        format_bytes(plan.answers.kv_needed_bytes),
    ]
