"""``kvplan itl``: options to requests, requests to lines or loads, and those to the terminal or JSON."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan.cli import complete, options
from kvplan.cli.lists import contexts, counts, named, size_bytes, tokens
from kvplan.cli.stated import refuse_beside_cases, stated
from kvplan.errors import InputError, KvplanError, UnknownNameError, shorten
from kvplan.units import parse_tokens

if TYPE_CHECKING:
    from kvplan.latency.lines import ItlLine

MAX_LINES = 64
MAX_BATCH = 2**24
MAX_CONTEXTS = 200
DEFAULT_CONTEXTS = "1k..128k"

Contexts = Annotated[
    str | None,
    typer.Option(
        "--ctx",
        "--context",
        help="Tokens of context: 32k, an ascending list 1k,8k,64k, or a range 1k..64k (doubling). "
        f"Default: {DEFAULT_CONTEXTS}.",
        rich_help_panel=options.MODEL,
        show_default=False,
    ),
]
Batch = Annotated[
    str,
    typer.Option(
        "--batch", "--batch-size", help="Requests in a decode step. A list sweeps.", rich_help_panel=options.MODEL
    ),
]
KvCacheDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        help="bf16, fp8, fp8_per_token_head … (`kvplan dtypes`), or auto. A list compares. Default: what deployments "
        "of these weights on this engine usually run.",
        autocompletion=complete.kv_dtypes,
        rich_help_panel=options.MODEL,
    ),
]
AttentionDp = Annotated[
    int | None,
    typer.Option(
        "--attention-dp", "--attention-dp-size", help="Attention data parallel ranks.", rich_help_panel=options.HARDWARE
    ),
]
Concurrency = Annotated[
    str | None,
    typer.Option("--concurrency", help="Clients of the closed loop. A list sweeps.", rich_help_panel=options.LOAD),
]
LengthSpread = Annotated[
    float | None,
    typer.Option(
        "--length-spread",
        help="How far below nominal lengths are drawn: 0.2 is 0.8–1.0 of nominal, 0 is exact. Default: 0.95 of "
        "nominal on average.",
        rich_help_panel=options.LOAD,
    ),
]


def itl_command(
    context: typer.Context,
    model: options.Model = None,
    ctx: Contexts = None,
    batch: Batch = "1",
    kv_cache_dtype: KvCacheDtype = None,
    weight_dtype: options.WeightDtype = None,
    gpu: options.Gpu = None,
    tp: options.TensorParallel = "1",
    pp: options.PipelineParallel = "1",
    dp: options.DataParallel = "1",
    dcp: options.DecodeContextParallel = "1",
    ep: options.ExpertParallel = False,
    attention_dp: AttentionDp = None,
    engine: options.Engine = "vllm",
    engine_version: options.EngineVersion = None,
    block_size: options.BlockSize = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    prefix_caching: options.PrefixCaching = True,
    swa_ratio: options.SwaRatio = None,
    mamba_ratio: options.MambaRatio = None,
    utilization: options.MemoryFraction = None,
    kv_cache_memory: options.KvCacheMemory = None,
    calibration: options.Calibration = None,
    isl: options.InputTokens = None,
    osl: options.OutputTokens = None,
    concurrency: Concurrency = None,
    length_spread: LengthSpread = None,
    cases: options.Cases = None,
    as_json: options.Json = False,
    explain: options.Explain = False,
) -> None:
    """Predict latency: ITL as intercept + slope × context, TPOT and TTFT under load, and what FP8 KV buys.

    Examples: kvplan itl --model 70b --gpu h200 --tp 4 --batch 32 --ctx 1k..128k --kv-cache-dtype bf16,fp8 ·
    kvplan itl --model qwen3-32b --gpu h100 --tp 2 --isl 8k --osl 1k --concurrency 16,64
    """
    if cases is not None:
        refuse_beside_cases(context)
        _run_cases(cases)
        return
    fixed: dict[str, Any] = {
        "model": model,
        "weight_dtype": weight_dtype,
        "ep": ep,
        "attention_dp_size": attention_dp,
        "engine": engine,
        "engine_version": engine_version,
        "block_size_tokens": block_size,
        "max_model_len_tokens": tokens(max_model_len, "--max-model-len"),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": tokens(max_num_batched_tokens, "--max-num-batched-tokens"),
        "enable_prefix_caching": prefix_caching,
        "swa_full_tokens_ratio": swa_ratio,
        "mamba_full_memory_ratio": mamba_ratio,
        "calibration": calibration,
        "gpu_memory_utilization": utilization,
        "kv_cache_memory_bytes": size_bytes(kv_cache_memory, "--kv-cache-memory-bytes"),
    }
    lists: dict[str, list[Any]] = {
        "gpu": named(gpu, "--gpu"),
        "tp_size": counts(tp, "--tp", MAX_BATCH),
        "pp_size": counts(pp, "--pp", MAX_BATCH),
        "dp_size": counts(dp, "--dp", MAX_BATCH),
        "dcp_size": counts(dcp, "--dcp", MAX_BATCH),
        "kv_cache_dtype": named(kv_cache_dtype, "--kv-cache-dtype"),
    }
    load = (isl, osl, concurrency)
    if any(value is not None for value in load):
        if "batch" in stated(context):
            raise InputError("--batch and a load are both given", hint="--concurrency says how many clients there are")
        _load(fixed, lists, load, ctx, length_spread, as_json, explain)
    elif length_spread is not None:
        raise InputError("--length-spread is of a load", hint="add --isl 8k --osl 1k --concurrency 64")
    else:
        lists["batch_size"] = counts(batch, "--batch", MAX_BATCH)
        most = fixed["max_model_len_tokens"]
        usual = [tokens for tokens in _ascending(DEFAULT_CONTEXTS) if most is None or tokens <= most] or [most]
        _lines(fixed, lists, usual if ctx is None else _ascending(ctx), as_json, explain)


def _ascending(text: str) -> list[int]:
    """The contexts of a line, from small to large.

    Raises:
        InputError: not token counts, out of order, or too many.

    """
    found = contexts(text, "--ctx")
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise InputError(
            f"--ctx {shorten(text, 40)} does not ascend", hint="write contexts from small to large, each once"
        )
    if len(found) > MAX_CONTEXTS:
        raise InputError(f"--ctx names {len(found):,} contexts", hint=f"at most {MAX_CONTEXTS}; use --cases for more")
    from kvplan.latency.request import MAX_CONTEXT_TOKENS

    if found[-1] > MAX_CONTEXT_TOKENS:
        raise InputError(f"--ctx {found[-1]:,} is beyond any server", hint=f"at most {MAX_CONTEXT_TOKENS:,} tokens")
    return found


def _lines(
    fixed: dict[str, Any], lists: dict[str, list[Any]], contexts: list[int], as_json: bool, explain: bool
) -> None:
    from kvplan.latency.lines import make_line

    lines: list[ItlLine] = []
    failures: list[tuple[str, KvplanError]] = []
    for label, chosen in _combinations(lists):
        batch = chosen.pop("batch_size")
        try:
            lines.append(make_line(label, {**fixed, **chosen}, contexts, batch))
        except UnknownNameError:  # a slip of the pen, not an answer
            raise
        except KvplanError as error:
            failures.append((label, error))
    if not lines:
        raise failures[0][1]
    lines = [_labelled(line) for line in lines]
    if as_json:
        _print_json(lines, failures, contexts)
        return
    from kvplan.terminal.itl_view import show_lines
    from kvplan.terminal.plain import Page

    show_lines(Page(), lines, [(label, error.message) for label, error in failures], explain=explain)


def _labelled(line: ItlLine) -> ItlLine:
    """A line nothing was varied for is called by its KV format."""
    from dataclasses import replace

    return line if line.label else replace(line, label=str(line.plans[0].facts.request["kv_cache_dtype"]))


def _print_json(lines: list[ItlLine], failures: list[tuple[str, KvplanError]], contexts: list[int]) -> None:
    from kvplan.latency.lines import with_detail
    from kvplan.latency.plan import DEFINITIONS, SCHEMA_VERSION

    if len(lines) == 1 and not failures and len(contexts) == 1:
        found = with_detail(lines[0]).as_dict()
    else:
        errors = [{"label": label, "error": error.as_dict()} for label, error in failures]
        found = {"schema_version": SCHEMA_VERSION, "lines": [line.as_dict() for line in lines], "errors": errors}
    sys.stdout.write(json.dumps(found | {"definitions": DEFINITIONS}, indent=2, ensure_ascii=False) + "\n")


def _load(fixed: dict[str, Any], lists: dict[str, list[Any]], load: tuple[str | None, str | None, str | None],
          ctx: str | None, spread: float | None, as_json: bool, explain: bool) -> None:  # fmt: skip
    from kvplan.latency.plan import DEFINITIONS, SCHEMA_VERSION
    from kvplan.latency.planner import plan_points
    from kvplan.latency.request import make_itl_request, make_point
    from kvplan.latency.serve import serve

    flags = ("--isl", "--osl", "--concurrency")
    missing = [flag for flag, value in zip(flags, load, strict=True) if value is None]
    if missing:
        raise InputError(f"a load needs {' and '.join(missing)} too", hint="--isl 8k --osl 1k --concurrency 64")
    if ctx is not None:
        raise InputError("--ctx and a load are both given", hint="under load the context follows from --isl and --osl")
    isl, osl, concurrency = load
    point = {"input_tokens": parse_tokens(isl or "", "--isl"), "output_tokens": parse_tokens(osl or "", "--osl"),
             "length_spread": spread}  # fmt: skip
    lists["concurrency"] = counts(concurrency or "", "--concurrency", MAX_BATCH)
    plans, failures = [], []
    for label, chosen in _combinations(lists):
        clients = chosen.pop("concurrency")
        try:
            served = serve(make_itl_request({**fixed, **chosen}))
            plan = plan_points(served, [make_point({**fixed, **point, "concurrency": clients})])[0]
        except UnknownNameError:
            raise
        except KvplanError as error:
            failures.append((label, error))
            continue
        plans.append((label or f"{clients:,} clients", plan, served))
    if not plans:
        raise failures[0][1]
    if as_json:
        rows = [plan.as_dict() | {"definitions": DEFINITIONS} for _, plan, _ in plans]
        errors = [{"label": label, "error": error.as_dict()} for label, error in failures]
        several = {"schema_version": SCHEMA_VERSION, "plans": rows, "errors": errors}
        found: Any = rows[0] if len(rows) == 1 and not errors else several
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return
    from kvplan.terminal.itl_view import show_load
    from kvplan.terminal.plain import Page

    show_load(Page(), plans, explain=explain)
    for label, problem in failures:
        typer.echo(f"{label}: no: {problem.message}")


def _combinations(lists: dict[str, list[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(label, chosen values) of every combination; the label names what varies."""
    names = [name for name, values in lists.items() if values]
    varied = [name for name in names if len(lists[name]) > 1]
    found = []
    for values in itertools.product(*(lists[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        short = {
            "tp_size": "TP ",
            "pp_size": "PP ",
            "dp_size": "DP ",
            "dcp_size": "DCP ",
            "batch_size": "batch ",
            "concurrency": "clients ",
        }
        found.append((", ".join(f"{short.get(name, '')}{chosen[name]}" for name in varied), chosen))
    if len(found) > MAX_LINES:
        raise InputError(
            f"the lists make {len(found):,} combinations", hint=f"at most {MAX_LINES}; use --cases for more"
        )
    return found


def _run_cases(path: Path) -> None:
    from kvplan.cli.cases import failure, read_cases, report_failed
    from kvplan.latency.planner import plan_cases

    cases = list(read_cases(path))
    good = [case for case in cases if not isinstance(case, KvplanError)]
    answers = iter(plan_cases(good))
    failed = 0
    for case in cases:
        answer = case if isinstance(case, KvplanError) else next(answers)
        failed += isinstance(answer, KvplanError)
        found = failure(case, answer) if isinstance(answer, KvplanError) else answer.as_dict()
        sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
    report_failed(failed, len(cases))
