"""``kvplan report``: options to a document, the document to files or stdout, a scenario file to a folder of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan.cli import complete, options
from kvplan.cli.lists import size_bytes, tokens
from kvplan.errors import AnswerIsNo, InputError, shorten
from kvplan.units import format_bytes, format_count

if TYPE_CHECKING:
    from kvplan.document.schema import Fleet, FleetEntry

EVIDENCE = "What is known"

Scenario = Annotated[
    Path | None,
    typer.Argument(help="YAML or TOML with several deployments: a page each and an index, into the folder of -o."),
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        help="KV formats to set beside it; else the model's 16 bits and the usual FP8 formats.",
        autocompletion=complete.kv_dtypes,
        rich_help_panel=options.MODEL,
        show_default=False,
    ),
]
Measured = Annotated[
    str | None,
    typer.Option(
        "--measured", help="Folder of a `kvplan measure` run on this GPU: its points.", rich_help_panel=EVIDENCE
    ),
]
Name = Annotated[
    str | None, typer.Option("--name", help="What to call the deployment.", rich_help_panel=options.OUTPUT)
]
Output = Annotated[
    list[Path] | None,
    typer.Option(
        "--output", "-o", help="File: .html, .md or .json. Repeat for several.", rich_help_panel=options.OUTPUT
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format", help="Of the pages of a scenario: html (default), md, json. A list, or repeated.",
        rich_help_panel=options.OUTPUT,
    ),
]  # fmt: skip
Date = Annotated[
    str | None,
    typer.Option("--date", help="Date on the report; with it, the same bytes again.", rich_help_panel=options.OUTPUT),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.", rich_help_panel=options.OUTPUT)]


def report_command(
    scenario: Scenario = None,
    model: options.Model = None,
    ctx: options.OneContext = None,
    users: options.OneBatch = None,
    kv_cache_dtype: options.OneKvCacheDtype = "auto",
    compare: Compare = None,
    weight_dtype: options.WeightDtype = None,
    gpu: options.OneGpu = None,
    gpu_memory: options.GpuMemory = None,
    tp: options.OneTensorParallel = 1,
    pp: options.OnePipelineParallel = 1,
    dp: options.OneDataParallel = 1,
    dcp: options.OneDecodeContextParallel = 1,
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
    isl: options.InputTokens = None,
    osl: options.OutputTokens = None,
    calibration: options.Calibration = None,
    measured: Measured = None,
    name: Name = None,
    output: Output = None,
    formats: Formats = None,
    date: Date = None,
    force: Force = False,
    as_json: options.Json = False,
    check: options.Check = False,
) -> None:
    """A report to sign and to audit: does it fit, for whom, how fast, what FP8 buys, and how to launch it.

    Without -o, Markdown on stdout. A scenario file makes a folder of pages with an index; an entry that cannot be
    planned is named, the others are written, and the exit code is 2.

    Examples: kvplan report --model 70b --gpu h200 --tp 4 --ctx 32k --concurrency 64 -o report.html ·
    kvplan report fleet.yaml -o out/
    """
    request: dict[str, Any] = {
        "model": model,
        "context_tokens": tokens(ctx, "--ctx"),
        "concurrency": users,
        "kv_cache_dtype": kv_cache_dtype,
        "compare": compare,
        "weight_dtype": weight_dtype,
        "gpu": gpu,
        "gpu_memory_bytes": size_bytes(gpu_memory, "--gpu-memory"),
        "tp_size": tp,
        "pp_size": pp,
        "dp_size": dp,
        "dcp_size": dcp,
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
        "input_tokens": tokens(isl, "--isl"),
        "output_tokens": tokens(osl, "--osl"),
        "calibration": calibration,
        "measured": measured,
        "name": name,
    }
    if scenario is not None:
        _refuse_mixture(scenario, request)
        _fleet(scenario, output or [], formats or ["html"], date, force, as_json, check)
    else:
        if formats:
            raise InputError("--format is of the pages of a scenario", hint="-o report.json names the form, or --json")
        _one({**request, "date": date}, output or [], force, as_json, check)


def _one(request: dict[str, Any], output: list[Path], force: bool, as_json: bool, check: bool) -> None:
    from kvplan.api import report
    from kvplan.document.fleet import form_of, write_documents
    from kvplan.files import refuse_shared

    for path in output:
        form_of(path)
    model = None if request["model"] is None else Path(request["model"])
    refuse_shared(output, (model, model and model / "config.json", request["calibration"]))
    document = report(**request)
    write_documents(document, output, force=force)
    if output and not as_json:
        print(document.answers.headline, file=sys.stderr)
    for path in output:
        print(f"wrote {path} ({format_bytes(path.stat().st_size)})", file=sys.stderr)
    if as_json:
        sys.stdout.write(document.as_json())
    elif not output:
        sys.stdout.write(document.as_markdown())
    if check and not document.answers.fits:
        raise AnswerIsNo("it does not fit")


def _refuse_mixture(scenario: Path, request: dict[str, Any]) -> None:
    """Options of one deployment make no sense beside a file of several."""
    unset = {"kv_cache_dtype": "auto", "engine": "vllm", "enable_prefix_caching": True, "ep": False,
             "tp_size": 1, "pp_size": 1, "dp_size": 1, "dcp_size": 1}  # fmt: skip
    given = [name for name, value in request.items() if value is not None and value != unset.get(name)]
    if given:
        raise InputError(f"{shorten(str(scenario), 40)} and {given[0]} are both given",
                         hint="write it into the scenario, beside `deployments` for all of them")  # fmt: skip


def _fleet(scenario: Path, output: list[Path], formats: list[str], date: str | None, force: bool, as_json: bool,
           check: bool) -> None:  # fmt: skip
    from kvplan.api import fleet
    from kvplan.document.fleet import FORMATS, SUFFIXES

    words = list(dict.fromkeys(word.strip() for text in formats for word in text.split(",") if word.strip()))
    if not words or not set(words) <= set(FORMATS):
        raise InputError(
            f"--format {shorten(','.join(formats), 30)!r} is not of {', '.join(FORMATS)}", hint="--format html,json"
        )
    if len(output) > 1:
        raise InputError("a scenario goes into one folder", hint="-o out/; --format html,md,json picks the forms")
    if not output and not as_json:
        raise InputError("a scenario needs a folder for its pages", hint="add -o out/")
    folder = output[0] if output else None
    if folder is not None and (folder.suffix.lower() in SUFFIXES or (folder.exists() and not folder.is_dir())):
        raise InputError(f"{folder} is not a folder", hint="a scenario goes into a folder: -o out/")
    found = fleet(scenario, folder, formats=words, date=date, force=force, progress=_progress)
    if folder is not None:
        pages = sum(entry.problem is None for entry in found.entries)
        print(f"wrote {folder / 'index'}.{words[0]} and {format_count(pages, 'page')}", file=sys.stderr)
    if as_json:
        sys.stdout.write(found.as_json())
    _judge(found, check)


def _judge(found: Fleet, check: bool) -> None:
    failed = [entry.name for entry in found.entries if entry.problem is not None]
    if failed:
        names = shorten(", ".join(failed), 100)
        raise InputError(
            f"{len(failed)} of {len(found.entries)} deployments could not be planned: {names}",
            hint=f"{'the others are done; ' if len(failed) < len(found.entries) else ''}the lines above say why",
        )
    if check and found.num_not_fitting:
        raise AnswerIsNo(f"{found.num_not_fitting} of {len(found.entries)} deployments do not fit")


def _progress(number: int, total: int, entry: FleetEntry) -> None:
    hint = f" ({entry.hint})" if entry.hint else ""
    said = entry.headline or f"not planned: {entry.problem}{hint}"
    print(f"[{number}/{total}] {shorten(entry.name, 40)}: {said}", file=sys.stderr)
