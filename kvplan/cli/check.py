"""``kvplan check``: a plan against a server's log or its metrics."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvplan.cli import options
from kvplan.cli.lists import size_bytes, tokens
from kvplan.cli.stated import stated
from kvplan.errors import AnswerIsNo, InputError, OutOfTolerance

SERVER = "The server"
PLANNED = "What was planned"

Log = Annotated[
    Path | None,
    typer.Option("--log", help="Start-up log of vLLM, SGLang or TensorRT-LLM (- reads stdin).", rich_help_panel=SERVER),
]
Url = Annotated[
    str | None,
    typer.Option("--url", help="A running vLLM or SGLang, e.g. http://host:8000.", rich_help_panel=SERVER),
]
Seconds = Annotated[
    float,
    typer.Option(
        "--seconds",
        min=0,
        max=3600,
        help="Read /metrics twice, so far apart; latency is of that time.",
        rich_help_panel=SERVER,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout", min=0.1, max=3600, help="Seconds one HTTP request may take in all.", rich_help_panel=SERVER
    ),
]
CaFile = Annotated[
    str | None, typer.Option("--ca-file", help="Certificates (PEM) to trust for https.", rich_help_panel=SERVER)
]
Scenario = Annotated[
    Path | None,
    typer.Option("--scenario", help="YAML or TOML with fields of the plan; flags win.", rich_help_panel=PLANNED),
]
Tolerance = Annotated[
    float,
    typer.Option(
        "--tolerance",
        help="Difference of memory and latency allowed, in %; of usable memory for rough estimates.",
        rich_help_panel=PLANNED,
    ),
]


COUNT: dict[str, Any] = {"min": 1, "rich_help_panel": PLANNED}


def check_command(
    context: typer.Context,
    log: Log = None,
    url: Url = None,
    seconds: Seconds = 0.0,
    timeout: Timeout = 20.0,
    ca_file: CaFile = None,
    scenario: Scenario = None,
    model: options.Model = None,
    gpu: Annotated[
        str | None, options.GPU.one(help="The GPU; a log may name its memory only.", rich_help_panel=PLANNED)
    ] = None,
    gpu_memory: options.GpuMemory = None,
    tp: Annotated[int | None, options.TP.one(**COUNT)] = None,
    pp: Annotated[int | None, options.PP.one(**COUNT)] = None,
    dp: Annotated[int | None, options.DP.one(**COUNT)] = None,
    kv_cache_dtype: Annotated[str | None, options.KV_CACHE_DTYPE.one(rich_help_panel=PLANNED)] = None,
    weight_dtype: options.WeightDtype = None,
    ctx: Annotated[str | None, options.CONTEXT.one(rich_help_panel=PLANNED)] = None,
    batch: Annotated[int | None, options.BATCH.one(**COUNT)] = None,
    engine_version: options.EngineVersion = None,
    max_model_len: options.MaxModelLen = None,
    utilization: options.MemoryFraction = None,
    tolerance: Tolerance = 5.0,
    as_json: options.Json = False,
) -> None:
    """Hold a plan against a server that runs: what drifted, why, and what to change.

    The server's own settings fill in what no flag and no scenario states. Exit 0 within tolerance, 3 drifted, 1
    inconclusive (nothing compared says how much KV memory there is), 2 not understood, 4 not reachable. KVPLAN_API_KEY
    is sent as a bearer token.

    Examples: kvplan check --log vllm.log --gpu h100 · kvplan check --url http://host:8000 --gpu h200 --tp 4
    """
    if (log is None) == (url is None):
        raise InputError("nothing to check" if log is None else "--log and --url are both given",
                         hint="give --log FILE or --url http://host:8000")  # fmt: skip
    of_url = {"seconds": "--seconds", "timeout": "--timeout", "ca_file": "--ca-file"}
    for name in of_url.keys() & stated(context).keys() if url is None else ():
        raise InputError(f"{of_url[name]} is of --url, and --log is given", hint=f"leave out {of_url[name]}")
    from kvplan.api import check_log, check_url

    flags: dict[str, Any] = {
        "model": model,
        "gpu": gpu,
        "gpu_memory_bytes": size_bytes(gpu_memory, "--gpu-memory"),
        "tp_size": tp,
        "pp_size": pp,
        "dp_size": dp,
        "kv_cache_dtype": kv_cache_dtype,
        "weight_dtype": weight_dtype,
        "context_tokens": tokens(ctx, "--ctx"),
        "batch_size": batch,
        "engine_version": engine_version,
        "max_model_len_tokens": tokens(max_model_len, "--max-model-len"),
        "gpu_memory_utilization": utilization,
    }
    given = _scenario(scenario) | {name: value for name, value in flags.items() if value is not None}
    if log is not None:
        result = check_log(log, tolerance=tolerance / 100, **given)
    else:
        token = os.environ.get("KVPLAN_API_KEY")
        result = check_url(url or "", tolerance=tolerance / 100, seconds=seconds, timeout_s=timeout, ca_file=ca_file,
                           token=token, **given)  # fmt: skip
    if as_json:
        sys.stdout.write(result.to_json(indent=2) + "\n")
    else:
        from kvplan.terminal.check_view import show_check
        from kvplan.terminal.plain import Page

        show_check(Page(), result)
    if result.verdict == "inconclusive":
        raise AnswerIsNo(
            "cannot tell whether the server is as planned: no KV memory, blocks or tokens were compared",
            hint="name the GPU with --gpu, or give the whole start-up log",
            code="inconclusive",
        )
    if result.drifted:
        names = ", ".join(term.label for term in result.drifted)
        raise OutOfTolerance(f"the server drifted from the plan: {names}")


def _scenario(path: Path | None) -> dict[str, Any]:
    """The fields of a plan in a scenario file; those of a report alone are no part of it.

    Raises:
        InputError: the file cannot be read, a field is unknown, or the lengths of a request are not its context.

    """
    if path is None:
        return {}
    from kvplan.document.question import LENGTHS, fields_of
    from kvplan.memory.request import make_request
    from kvplan.scenario import one_deployment

    given, own = fields_of(one_deployment(path).options)
    lengths, context = [own[name] for name in LENGTHS if name in own], given.get("context_tokens")
    if lengths and sum(lengths) > (make_request({"context_tokens": context}).context_tokens or 0):
        raise InputError(f"{path}: isl and osl are longer than the ctx of {context}", hint="leave ctx out")
    return given
