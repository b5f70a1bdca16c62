"""``kvplan measure``: options in, a run, its report to the terminal or JSON, and the exit code."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kvplan.cli import complete, options
from kvplan.cli.lists import counts, named
from kvplan.errors import InputError, OutOfTolerance, shorten
from kvplan.units import format_percent, parse_tokens

MEASURING = "How to measure"

QueryHeads = Annotated[
    int | None, typer.Option("--num-q-heads", help="Query heads of a rank.", rich_help_panel=options.SHAPE)
]
KvHeads = Annotated[
    int | None,
    typer.Option("--num-kv-heads", "--kv-heads", help="KV heads of a rank.", rich_help_panel=options.SHAPE),
]
Formats = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        help="bf16, fp16, fp8, fp8_e5m2, fp8_per_token_head, int8_per_token_head, fp8:head … "
        "Default: bf16,fp8,fp8_per_token_head; of latent attention all there are: bf16,fp8,fp8_ds_mla.",
        autocompletion=complete.kv_dtypes,
        rich_help_panel=options.MODEL,
    ),
]
Batches = Annotated[
    str | None, typer.Option("--batch", "--batch-size", help="Sequences; a list.", rich_help_panel=options.MODEL)
]
Contexts = Annotated[
    str | None,
    typer.Option("--ctx", "--context", help="Tokens of context; 4k is 4,096; a list.", rich_help_panel=options.MODEL),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick/--thorough",
        help="About a minute; or more contexts, more replays and a choice among kernel configurations.",
        rich_help_panel=MEASURING,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Time for the whole run, e.g. 60s or 10m; cells beyond it are skipped and listed. "
        "Default: 60s, thorough 600s.",
        rich_help_panel=MEASURING,
    ),
]
RunDir = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for the records. Default: kvplan-runs/…", rich_help_panel=MEASURING),
]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Go on with the run in this folder.", rich_help_panel=MEASURING)
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cuda, or cpu (the torch reference; no GPU needed).", rich_help_panel=MEASURING
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        help="Time others on the same cells: torch (SDPA), flashinfer (XQA), vllm (FlashAttention-3).",
        rich_help_panel=MEASURING,
    ),
]
Tolerance = Annotated[
    float,
    typer.Option("--tolerance", help="Median error in % of predictions; beyond it exit 3.", rich_help_panel=MEASURING),
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate/--no-calibrate",
        help="End by writing a calibration to the user's config folder.",
        rich_help_panel=MEASURING,
    ),
]
WholeStep = Annotated[
    bool,
    typer.Option(
        "--whole-step",
        help="Also time whole decode steps of a dense --model: random weights, real shapes, one CUDA graph.",
        rich_help_panel=MEASURING,
    ),
]
WeightDtype = Annotated[
    str | None,
    typer.Option("--weight-dtype", help="Of whole steps: bf16, or fp8 (sm89 and later). Default: bf16.",
                 rich_help_panel=MEASURING),
]  # fmt: skip
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the random data.", rich_help_panel=MEASURING)]


def measure_command(
    model: options.Model = None,
    tp: Annotated[
        int | None,
        typer.Option(
            "--tp", "--tensor-parallel-size", min=1, help="Ranks the model's heads are split over.",
            rich_help_panel=options.HARDWARE,
        ),
    ] = None,
    num_q_heads: QueryHeads = None,
    num_kv_heads: KvHeads = None,
    head_dim: options.HeadDim = None,
    kv_cache_dtype: Formats = None,
    batch: Batches = None,
    ctx: Contexts = None,
    quick: Quick = True,
    budget: Budget = None,
    output: RunDir = None,
    resume: Resume = None,
    whole_step: WholeStep = False,
    weight_dtype: WeightDtype = None,
    device: Device = "auto",
    compare: Compare = None,
    tolerance: Tolerance = 10.0,
    calibrate: Calibrate = True,
    seed: Seed = 0,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Measure this machine's GPU with kvplan's decode kernels, and hold predictions against it.

    Examples: kvplan measure · kvplan measure --model 70b --tp 8 --thorough ·
    kvplan measure --model deepseek-v3 --tp 8 · kvplan measure --device cpu --ctx 512,1k,2k --json
    """
    started_s = time.monotonic()
    if not 0 < tolerance < 1e6:
        raise InputError(f"--tolerance {tolerance:g} is not a positive percentage")
    fixed = {"--model": model, "--tp": tp, "--num-q-heads": num_q_heads, "--num-kv-heads": num_kv_heads,
             "--head-dim": head_dim, "--kv-cache-dtype": kv_cache_dtype, "--batch": batch, "--ctx": ctx,
             "--compare": compare, "--output": output, "--whole-step": whole_step or None,
             "--weight-dtype": weight_dtype, "--device": None if device == "auto" else device}  # fmt: skip
    given = [flag for flag, value in fixed.items() if value is not None]
    if resume is not None and given:
        raise InputError(f"--resume goes on with what the folder says: {given[0]} cannot change it",
                         hint=f"leave out {', '.join(given)}")  # fmt: skip
    if tp is not None and model is None:
        raise InputError("--tp splits a model's heads, and no --model was given", hint="add --model, or leave out --tp")
    from kvplan.measure.options import Options
    from kvplan.measure.run import measure

    report = measure(
        Options(
            model=model, tp_size=tp or 1, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            kv_dtypes=tuple(named(kv_cache_dtype, "--kv-cache-dtype")),
            batch_sizes=() if batch is None else tuple(counts(batch, "--batch")),
            context_tokens=tuple(parse_tokens(text, "--ctx") for text in named(ctx, "--ctx")),
            effort="quick" if quick else "thorough", budget_s=_seconds(budget), run_dir=output, resume=resume,
            device=device.strip().lower(), compare=tuple(named(compare, "--compare")), tolerance=tolerance / 100,
            calibrate=calibrate, seed=seed, whole_step=whole_step, weight_dtype=weight_dtype,
        ),
        say=_progress, started_s=started_s,
    )  # fmt: skip
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        from kvplan.terminal.console import make_console
        from kvplan.terminal.measure_view import show_measure

        show_measure(make_console(), report)
    sys.stdout.flush()
    if report.within_tolerance is False and report.prediction is not None:
        raise OutOfTolerance(
            f"predictions are off by {format_percent(report.prediction.median_error)} in the median, "
            f"{format_percent(report.tolerance)} is allowed",
            hint="the calibration just written takes their place" if report.calibration and report.calibration.path
            else "a calibration of this GPU would take their place",
        )  # fmt: skip


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _seconds(text: str | None) -> float | None:
    """``60``, ``60s``, ``10m`` or ``1h`` as seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(s|m|min|h)?", text.strip().lower()[:20])
    seconds = float(match[1]) * {"m": 60, "min": 60, "h": 3600}.get(match[2] or "s", 1) if match else 0.0
    if not 0 < seconds <= 86400:
        raise InputError(f"--budget {shorten(text, 20)!r} is not a time up to a day", hint="write 60s or 10m")
    return seconds
