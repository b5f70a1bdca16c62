"""``kvplan calibrate``: measured attention latencies in, a calibration file (and predictions) out."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvplan.cli import complete
from kvplan.errors import InputError

if TYPE_CHECKING:
    from kvplan.calibration.calibrate import ErrorLine, Predictions


def calibrate_command(
    samples: Annotated[Path, typer.Argument(help="CSV, CSV.gz, or JSONL of `kvplan measure`.")],
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu", help="The GPU the samples were measured on (`kvplan gpus`).", autocompletion=complete.gpus
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the calibration goes (JSON).")],
    engine: Annotated[str | None, typer.Option("--engine", help="The engine whose kernels these are.")] = None,
    engine_version: Annotated[str | None, typer.Option("--engine-version", help="Its version.")] = None,
    evaluate: Annotated[
        Path | None, typer.Option("--evaluate", help="Cases to predict and compare, in the samples' form.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="CSV of those cases with predicted_s, low_s, high_s.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the calibration and its errors as one object.")
    ] = False,
) -> None:
    """Fit a kernel-level attention calibration from a few samples and predict the rest.

    Columns: batch_size, context_tokens, num_q_heads, num_kv_heads, head_dim, window_tokens, kv_dtype, latency_s;
    optional head_dim_v, scale_granularity, kernel_source. At least 8 samples a KV dtype; 32 spread over batches and
    contexts are good. Put the file in ~/.config/kvplan/calibrations to use it; of several there for one GPU and engine,
    the newest is used and the others are named.

    Example: kvplan calibrate samples.csv --gpu h200 -o h200.json --evaluate all.csv --predictions out.csv
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy loads: on small matrices its threads only wait
    from kvplan.calibration import calibrate as work
    from kvplan.calibration.document import write_json
    from kvplan.calibration.store import canonical_engine
    from kvplan.files import refuse_shared, write_text
    from kvplan.gpu import resolve_gpu

    if predictions is not None and evaluate is None:
        raise InputError("--predictions needs cases", hint="add --evaluate CASES.csv")
    written = [path for path in (output, predictions) if path is not None]
    refuse_shared(written, (samples, evaluate))
    for path in written:
        if path.exists() and not force:
            raise InputError(f"{path} exists", hint="choose another name or add --force")
    spec = resolve_gpu(gpu)
    document, points = work.calibrate_file(
        samples, spec, name=output.stem, engine=None if engine is None else canonical_engine(engine),
        engine_version=engine_version,
    )  # fmt: skip
    found = None if evaluate is None else work.predict_file(evaluate, document)
    write_json(output, document, force)
    if predictions is not None and found is not None:
        write_text(predictions, work.predictions_csv(found), force)
    for line in work.refused_lines(points):
        print(line, file=sys.stderr)
    lines = None if found is None else work.errors(found)
    if as_json:
        errors = None if lines is None else [asdict(line) for line in lines]
        sys.stdout.write(json.dumps({"schema_version": 1, "calibration": document, "errors": errors}, indent=2) + "\n")
    else:
        _show(document, lines, found)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)


def _show(document: dict[str, object], lines: list[ErrorLine] | None, found: Predictions | None) -> None:
    from kvplan.calibration.calibrate import UNITS, USELESS_ERROR
    from kvplan.terminal.calibration_view import show_errors, show_fit
    from kvplan.terminal.console import make_console

    console = make_console()
    show_fit(console, document)
    if lines is None or found is None:
        return
    if lines:
        show_errors(console, lines)
        if lines[0].median > USELESS_ERROR:
            text = f"half of the cases are off by {lines[0].median:.1%} or more: other kernels, or other units? {UNITS}"
            console.print(text, markup=False)
    else:
        print("the cases carry no latency_s: predicted, not compared")
    lost, assumed, outside = len(found.points.refused), int(found.assumed.sum()), int((~found.in_range).sum())
    if lost:
        print(f"{lost:,} cases could not be read and are left empty; the first: {found.points.refused[0]}")
    if assumed:
        print(f"{assumed:,} cases have a KV dtype without samples: another's parameters, interval twice as wide")
    if outside:
        print(f"{outside:,} cases lie outside the range of the samples: interval half as wide again")
