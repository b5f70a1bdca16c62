"""``kvplan size`` on a terminal: the answer first, then where the memory goes, then what else could be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplan.memory.budget import OUTSIDE
from kvplan.memory.plan import FormatRow, SizePlan
from kvplan.terminal.console import add_row, make_table, print_line
from kvplan.units import format_bytes, format_count, format_gib, format_percent, format_ratio, format_tokens

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TERMS = (
    ("total_bytes", "total"),
    ("usable_bytes", "usable"),
    ("weights_bytes", "− weights"),
    ("activation_bytes", "− activation peak"),
    ("graph_bytes", "− CUDA graphs"),
    ("overhead_bytes", "− other"),
    ("kv_cache_bytes", "= KV cache"),
)
MIN_LEDGER_SHARE = 0.0005
SHORT_ALIAS_CHARS = 12


def show_size(console: Console, plan: SizePlan, *, explain: bool = False) -> None:
    """Print the whole answer."""
    _headline(console, plan)
    _verdict(console, plan)
    console.print()
    _cache(console, plan)
    if plan.memory.kv_cache_bytes is not None:
        _memory(console, plan)
    if plan.comparison:
        _comparison(console, plan)
    if plan.ledger and plan.ledger_requests:
        _ledger(console, plan)
    if plan.gpus:
        _gpus(console, plan)
    if plan.advice:
        _advice(console, plan)
    if explain:
        _explain(console, plan)


def describe_gpus(plan: SizePlan) -> str:
    """``4 × NVIDIA H100 SXM (TP 4)``, or what is missing."""
    request, count = plan.request, plan.answers.num_gpus
    layout = f" ({request.layout})" if request.layout else ""
    name = plan.memory.sources["total_bytes"].detail.split(", ")[0] if request.gpu else "no GPU named"
    return f"{count} × {name}{layout}" if request.gpu else f"{name}{layout}"


def _headline(console: Console, plan: SizePlan) -> None:
    model, cache = plan.model, plan.kv_cache
    if model is not None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in model.layer_kinds.items())
        size = f"{model.num_parameters / 1e9:,.1f} B parameters"
        asked = plan.request.model or ""
        alias = f" ({asked})" if asked.lower() != model.name and len(asked) <= SHORT_ALIAS_CHARS else ""
        print_line(console, f"{model.name}{alias} · {size} · {model.weight_format} weights · {kinds} layers", "bold")
    else:
        print_line(console, "custom model from flags", "bold")
    rules = "exact rules" if cache.rules == "exact" else "approximation"
    print_line(console, f"{describe_gpus(plan)} · {cache.engine} {cache.engine_version}, {rules}")
    print_line(console, f"KV {cache.kv_cache_dtype}, blocks of {format_count(cache.block_size_tokens, 'token')}")
    for note in model.notes if model is not None else ():
        print_line(console, f"note: {note}", "yellow")


def _verdict(console: Console, plan: SizePlan) -> None:
    answers, request = plan.answers, plan.request
    many = answers.batch_size is not None and answers.batch_size > 1
    who = format_count(answers.batch_size or 1, "request")
    what = f"{who} at {format_tokens(answers.context_tokens)} tokens"
    if plan.verdict is None:
        everywhere = format_bytes(answers.kv_needed_bytes)
        line = f"KV for {what}: {everywhere}"
        weights = plan.memory.weights_bytes
        if weights:
            whole = weights * request.tp_size * request.pp_size
            ratio = answers.kv_needed_bytes / whole
            said = f"{ratio:,.1f}×" if ratio >= 1 else f"{format_percent(ratio)} of"
            line += f", {said} the weights ({format_bytes(whole)})"
        print_line(console, line, "bold")
        return
    if plan.memory.excess_bytes:
        excess = format_gib(plan.memory.excess_bytes)
        print_line(
            console, f"DOES NOT FIT: the KV bytes set aside are {excess} more than each GPU has left", "bold red"
        )
    elif plan.fits:
        free = (plan.memory.kv_cache_bytes or 0) - answers.kv_needed_bytes_per_gpu
        print_line(console, f"FITS: {what}, with {format_gib(free)} of KV to spare on each GPU", "bold green")
    elif (plan.memory.kv_cache_bytes or 0) <= 0:
        print_line(console, "DOES NOT FIT: no memory is left for KV", "bold red")
    elif answers.num_waiting and not answers.kv_short_bytes_per_gpu:
        runs, waits = answers.max_running, answers.num_waiting
        told = f"--max-num-seqs {request.max_num_seqs} runs {runs:,} at once, {waits:,} wait"
        print_line(console, f"DOES NOT FIT: {what}: {told}", "bold red")
    elif plan.too_long_tokens is not None:
        longest = format_tokens(plan.too_long_tokens)
        print_line(console, f"DOES NOT FIT: {what} would, the longest request of {longest} tokens does not", "bold red")
    else:
        verb = "lack" if many else "lacks"
        short = format_gib(answers.kv_short_bytes_per_gpu)
        print_line(console, f"DOES NOT FIT: {what} {verb} {short} of KV on each GPU", "bold red")


def _cache(console: Console, plan: SizePlan) -> None:
    cache, answers = plan.kv_cache, plan.answers
    table = make_table("KV cache of one GPU", "", "", right=(1,), wrap=(2,))
    add_row(table, "per token of context", per_token(cache.bytes_per_token), _groups(plan))
    share = next((row.scale_share for row in plan.comparison if row.kv_cache_dtype == cache.kv_cache_dtype), None)
    add_row(table, "of which scales", per_token(cache.scale_bytes_per_token), f"{format_percent(share)} of a request")
    blocks = f"{cache.blocks_per_request:,} blocks of {format_bytes(cache.bytes_per_block)}"
    add_row(table, "per request", format_bytes(cache.bytes_per_request), blocks)
    if cache.num_blocks is not None:
        add_row(
            table, "blocks", f"{cache.num_blocks:,}", "one of them the null block" if cache.rules == "exact" else ""
        )
        exact = cache.rules == "exact"
        length = format_tokens(plan.request.max_model_len_tokens)
        logged = f"tokens the engine logs, at max_model_len {length}" if exact else "tokens"
        add_row(table, "capacity", format_tokens(cache.capacity_tokens), logged)
        add_row(
            table,
            "max concurrency",
            f"{cache.max_concurrency:,.2f}×",
            "as the engine logs it" if exact else f"requests of {length} tokens",
        )
        at = format_tokens(answers.context_tokens)
        told = answers.max_running_source == "given" and answers.max_batch_at_context == answers.max_running
        why = f"requests at {at} tokens, all replicas" + (": --max-num-seqs" if told else "")
        add_row(table, "largest batch", f"{answers.max_batch_at_context:,}", why)
        who = f"batch {answers.batch_size:,}" if answers.batch_size else "one request"
        longest = format_tokens(answers.max_context_at_batch_tokens) if answers.max_context_at_batch_tokens else "none"
        model_limit = plan.model.max_context_tokens if plan.model is not None else None
        limited = " (the model's limit)" if answers.max_context_at_batch_tokens == model_limit else ""
        add_row(table, "largest context", longest, f"tokens for {who}{limited}")
    console.print(table)
    console.print()


def per_token(value: float) -> str:
    """Bytes that a token takes, and a part of one where it takes less than whole bytes."""
    return f"{value:,} B" if value == int(value) else f"{value:,.1f} B"


def _groups(plan: SizePlan) -> str:
    parts = []
    for group in plan.kv_cache.groups:
        heads = f"{group.num_kv_heads_per_rank} heads" if group.num_kv_heads_per_rank > 1 else "1 head"
        parts.append(f"{group.num_layers} {group.kind}" + (f" × {heads}" if group.kind != "state" else ""))
    unique = list(dict.fromkeys(parts))
    counted = [f"{parts.count(part)} × ({part})" if parts.count(part) > 1 else part for part in unique]
    windows = {group.window_tokens for group in plan.kv_cache.groups if group.window_tokens}
    beyond = windows and not plan.kv_cache.bytes_per_token
    return (f"beyond windows of {max(windows):,} tokens; " if beyond else "") + "layers: " + ", ".join(counted)


def _memory(console: Console, plan: SizePlan) -> None:
    table = make_table("memory of one GPU", "GiB", "source", "how", right=(1,), wrap=(3,))
    for key, label in TERMS:
        value = getattr(plan.memory, key)
        term = plan.memory.sources[key]
        if value is None and term.source is None and plan.memory.total_bytes is None:
            continue
        style = "bold" if key == "kv_cache_bytes" else None
        if term.detail.startswith(OUTSIDE):
            label = label.replace("− ", "")
        shown = format_gib(value).removesuffix(" GiB")
        add_row(table, label, shown, term.source or "", term.detail, style=style)
    console.print(table)
    console.print()


def _comparison(console: Console, plan: SizePlan) -> None:
    sized = plan.kv_cache.num_blocks is not None
    blocks_differ = len({row.block_size_tokens for row in plan.comparison if row.forbidden is None}) > 1
    columns = ["KV precision", "B/token", "scales", *(["block"] if blocks_differ else [])]
    columns += ["capacity", "batch"] if sized else []
    columns += ["gain", "claimed"]
    table = make_table(*columns, right=tuple(range(1, len(columns))))
    forbidden = []
    for row in plan.comparison:
        if row.forbidden is not None:
            forbidden.append(row)
            continue
        _format_cells(table, plan, row, sized, blocks_differ)
    console.print(table)
    for row in forbidden:
        print_line(console, f"  {row.kv_cache_dtype}: no: {row.forbidden}", "dim")
    console.print()


def _format_cells(table: Table, plan: SizePlan, row: FormatRow, sized: bool, blocks_differ: bool) -> None:
    assert row.bytes_per_token is not None and row.block_size_tokens is not None
    cells = [row.kv_cache_dtype, per_token(row.bytes_per_token).removesuffix(" B"), format_percent(row.scale_share)]
    cells += [f"{row.block_size_tokens:,}"] if blocks_differ else []
    if sized:
        cells += [format_tokens(row.capacity_tokens), f"{row.max_batch_at_context:,}"]
    cells += [format_ratio(row.effective_gain), format_ratio(row.advertised_gain, 1)]
    add_row(table, *cells, style="bold" if row.kv_cache_dtype == plan.kv_cache.kv_cache_dtype else None)


def _ledger(console: Console, plan: SizePlan) -> None:
    total = sum(line.bytes for line in plan.ledger)
    shown = [line for line in plan.ledger if line.bytes >= total * MIN_LEDGER_SHARE or line.name == "live"]
    title = f"where the KV bytes of one GPU go, holding {format_count(plan.ledger_requests or 0, 'request')}"
    table = make_table(title, "GiB", "share", right=(1, 2))
    for line in shown:
        add_row(table, line.label, f"{line.bytes / 2**30:,.2f}", format_percent(line.bytes / total if total else 0))
    add_row(table, "total", f"{total / 2**30:,.2f}", "100.0%", style="bold")
    console.print(table)
    console.print()


def _gpus(console: Console, plan: SizePlan) -> None:
    table = make_table("GPU", "memory", "fewest", "as", "KV each", "requests", right=(1, 2, 4, 5))
    misfits = []
    for row in sorted(plan.gpus, key=lambda r: (r.num_gpus or 10**6, r.memory_bytes)):
        if row.smallest_tp_size is None:
            misfits.append(row)
            continue
        add_row(table, row.gpu, format_gib(row.memory_bytes), f"{row.num_gpus}", row.layout,
                format_gib(row.kv_cache_bytes), f"{row.max_batch_at_context:,}")  # fmt: skip
    if len(misfits) < len(plan.gpus):
        console.print(table)
    reasons: dict[str, list[str]] = {}
    for row in misfits:
        reasons.setdefault(row.reason or "no", []).append(row.gpu)
    for reason, names in reasons.items():
        print_line(console, f"  {reason}: {', '.join(names)}", "dim")
    console.print()


def _advice(console: Console, plan: SizePlan) -> None:
    print_line(console, "advice", "dim")
    for item in plan.advice:
        from rich.padding import Padding
        from rich.text import Text

        console.print(Padding(Text(f"• {item.message}"), (0, 0, 0, 2)))


def _explain(console: Console, plan: SizePlan) -> None:
    console.print()
    print_line(console, "how these numbers come about", "dim")
    for rule in plan.rules:
        print_line(console, f"  {rule.name}: {rule.formula}")
        print_line(console, f"      {rule.source}", "dim")
