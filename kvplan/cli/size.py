"""``kvplan size``: options to requests, requests to plans, plans to the terminal or JSON."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan.cli import options
from kvplan.cli.lists import contexts, counts, named, size_bytes, tokens
from kvplan.cli.stated import refuse_beside_cases, stated
from kvplan.errors import AnswerIsNo, InputError, KvplanError, UnknownNameError, shorten

if TYPE_CHECKING:
    from kvplan.memory.plan import SizePlan

MAX_SWEEP = 1000
DEFAULTED = {
    "engine": "engine", "ep": "ep", "prefix_caching": "enable_prefix_caching", "kv_cache_dtype": "kv_cache_dtype",
    "tp": "tp_size", "pp": "pp_size", "dp": "dp_size", "dcp": "dcp_size",
}  # fmt: skip
"""Options with a default, and the request fields they set."""

Gpu = Annotated[
    str | None,
    options.GPU.many(help=f"{options.GPU.about}. Without it: what each GPU could hold. A list sweeps."),
]

Planner = Callable[[dict[str, Any], bool], "SizePlan"]
"""From options to a plan; the flag asks for comparison and advice too."""


def size_command(
    context: typer.Context,
    model: options.Model = None,
    from_log: options.FromLog = None,
    ctx: options.Context = None,
    batch: options.Batch = None,
    kv_cache_dtype: options.KvCacheDtype = "auto",
    weight_dtype: options.WeightDtype = None,
    gpu: Gpu = None,
    gpu_memory: options.GpuMemory = None,
    tp: options.TensorParallel = "1",
    pp: options.PipelineParallel = "1",
    dp: options.DataParallel = "1",
    dcp: options.DecodeContextParallel = "1",
    ep: options.ExpertParallel = False,
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
    weights_memory: options.WeightsMemory = None,
    activation_memory: options.ActivationMemory = None,
    graph_memory: options.GraphMemory = None,
    overhead_memory: options.OverheadMemory = None,
    layers: options.Layers = None,
    kv_heads: options.KvHeads = None,
    head_dim: options.HeadDim = None,
    params: options.Params = None,
    window: options.Window = None,
    cases: options.Cases = None,
    as_json: options.Json = False,
    explain: options.Explain = False,
    check: options.Check = False,
) -> None:
    """Size the KV cache: does it fit, how many users, and what does FP8 really buy?

    Examples: kvplan size --model 70b --ctx 32k · kvplan size --from-log vllm.log --kv-cache-dtype fp8 ·
    kvplan size --model qwen3-235b-a22b --gpu h100 --tp 8 --ctx 128k --batch 64 --kv-cache-dtype fp8
    """
    if cases is not None:
        from kvplan.cli.cases import run_size_cases

        refuse_beside_cases(context)
        run_size_cases(cases)
        return
    fixed: dict[str, Any] = {
        "model": model,
        "weight_dtype": weight_dtype,
        "gpu_memory_bytes": size_bytes(gpu_memory, "--gpu-memory"),
        "ep": ep,
        "engine": engine,
        "engine_version": engine_version,
        "block_size_tokens": block_size,
        "max_model_len_tokens": tokens(max_model_len, "--max-model-len"),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": tokens(max_num_batched_tokens, "--max-num-batched-tokens"),
        "enable_prefix_caching": prefix_caching,
        "swa_full_tokens_ratio": swa_ratio,
        "mamba_full_memory_ratio": mamba_ratio,
        "gpu_memory_utilization": utilization,
        "kv_cache_memory_bytes": size_bytes(kv_cache_memory, "--kv-cache-memory-bytes"),
        "weights_bytes": size_bytes(weights_memory, "--weights-memory"),
        "activation_bytes": size_bytes(activation_memory, "--activation-memory", zero=True),
        "graph_bytes": size_bytes(graph_memory, "--graph-memory", zero=True),
        "overhead_bytes": size_bytes(overhead_memory, "--overhead-memory", zero=True),
        "num_layers": layers,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "num_parameters": _parameters(params),
        "window_tokens": tokens(window, "--window"),
    }
    lists: dict[str, list[Any]] = {
        "gpu": named(gpu, "--gpu"),
        "tp_size": counts(tp, "--tp"),
        "pp_size": counts(pp, "--pp"),
        "dp_size": counts(dp, "--dp"),
        "dcp_size": counts(dcp, "--dcp"),
        "kv_cache_dtype": named(kv_cache_dtype, "--kv-cache-dtype"),
        "context_tokens": contexts(ctx, "--ctx"),
        "batch_size": [] if batch is None else counts(batch, "--batch"),
    }
    planner = _planner(from_log, context, fixed, lists)
    varied = [name for name, values in lists.items() if len(values) > 1]
    if varied:
        if explain and not as_json:
            raise InputError("--explain is of one plan, and lists make several", hint="give one value of each option")
        _sweep(planner, fixed, lists, varied, as_json, check)
    else:
        single = {name: values[0] for name, values in lists.items() if values}
        _one(planner({**fixed, **single}, True), as_json, explain, check)


def _planner(from_log: Path | None, context: typer.Context, fixed: dict[str, Any], lists: dict[str, list[Any]]
             ) -> Planner:  # fmt: skip
    """What makes a plan of options: a request of its own, or changes to a server that reported itself in a log."""
    from kvplan.api import size, size_from_log

    if from_log is None:
        return lambda request, compare: size(compare=compare, **request)
    written = stated(context)
    for parameter, name in DEFAULTED.items():  # what was not asked for is as the server has it
        if parameter not in written:
            fixed.pop(name, None)
            lists.pop(name, None)
    from kvplan.check.log import read_log

    report = read_log(from_log)  # once, also for a sweep and for stdin
    return lambda request, compare: size_from_log(report, compare=compare, **request)


def _one(plan: SizePlan, as_json: bool, explain: bool, check: bool) -> None:
    if as_json:
        sys.stdout.write(plan.to_json(indent=2) + "\n")
    else:
        from kvplan.memory.explain import explained
        from kvplan.terminal.console import make_console
        from kvplan.terminal.size_view import show_size

        if explain:
            plan = explained(plan)
        show_size(make_console(), plan, explain=explain)
    if check and not plan.verdict:
        no = plan.verdict is False
        raise AnswerIsNo("it does not fit" if no else "cannot tell whether it fits: no GPU was named",
                         hint=None if no else "add --gpu")  # fmt: skip


def _sweep(planner: Planner, fixed: dict[str, Any], lists: dict[str, list[Any]], varied: list[str], as_json: bool,
           check: bool) -> None:  # fmt: skip
    names = [name for name, values in lists.items() if values]
    count = 1
    for name in names:
        count *= len(lists[name])
    if count > MAX_SWEEP:
        raise InputError(
            f"the lists make {count:,} combinations", hint=f"a sweep takes {MAX_SWEEP:,} at most; use --cases"
        )
    plans, failures, first_error = [], [], None
    for values in itertools.product(*(lists[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        try:
            plans.append(planner({**fixed, **chosen}, False))
        except UnknownNameError:  # a slip of the pen, not an answer
            raise
        except KvplanError as error:
            first_error = first_error or error
            failures.append(({name: chosen[name] for name in varied}, error))
    if not plans and first_error is not None:
        raise first_error
    if as_json:
        from kvplan.memory.plan import SCHEMA_VERSION

        rows: list[Any] = [plan.as_dict() for plan in plans]
        errors = [{"request": chosen, "error": error.as_dict()} for chosen, error in failures]
        sys.stdout.write(
            json.dumps({"schema_version": SCHEMA_VERSION, "plans": rows, "errors": errors}, indent=2) + "\n"
        )
    else:
        from kvplan.terminal.console import make_console
        from kvplan.terminal.sweep_view import show_sweep

        show_sweep(make_console(), plans, varied, [(chosen, error.message) for chosen, error in failures])
    if check and (failures or not all(plan.verdict for plan in plans)):
        raise AnswerIsNo("not every combination fits")


def _parameters(text: str | None) -> int | None:
    """``70B``, ``70e9`` or ``70553706496`` as a count."""
    if text is None:
        return None
    factors = {"b": 10**9, "m": 10**6, "t": 10**12}
    word = text.strip().lower()
    factor = factors.get(word[-1:], 1)
    try:
        value = float(word[:-1] if factor > 1 else word) * factor
    except ValueError:
        value = -1.0
    if not 1 <= value <= 2**60:
        raise InputError(f"--params {shorten(text, 20)!r} is not a parameter count", hint="write 70B or 70e9")
    return int(value)
