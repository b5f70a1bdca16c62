"""``kvplan profiles``: the calibrations that ship and those measured here, and what one of them says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan import profiles
from kvplan.cli import complete
from kvplan.errors import UnknownNameError

if TYPE_CHECKING:
    from kvplan.calibration.store import Found

GIVEN = "given"
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]

profiles_app = typer.Typer(help="List calibrations and explain one.", invoke_without_command=True)


@profiles_app.callback()
def profiles_command(context: typer.Context, as_json: JSON = False) -> None:
    """List calibrations: GPU, engine, samples, date, where from; and how many models and GPUs are bundled."""
    if context.invoked_subcommand is not None:
        return
    from kvplan.calibration import store

    rows: list[dict[str, Any]] = [
        {"name": found.name, "kind": found.data.get("kind"), "gpu": found.data.get("gpu"),
         "engine": found.data.get("engine"), "engine_version": found.data.get("engine_version"),
         "num_samples": found.data.get("num_samples", found.data.get("num_rows")), "date": found.data.get("date"),
         "origin": found.origin}
        for found in store.every()
    ]  # fmt: skip
    num_models, num_gpus = (len(profiles.names(kind)) for kind in ("models", "gpus"))
    if as_json:
        found = {"schema_version": 1, "calibrations": rows, "num_models": num_models, "num_gpus": num_gpus}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    from kvplan.terminal.plain import Page

    page = Page()
    table = []
    for row in rows:
        samples = row["num_samples"]
        count = f"{samples:,}" if isinstance(samples, int) else "–"
        version = str(row["engine_version"] or "–")
        table.append((row["name"], version, count, str(row["date"] or "–"), row["origin"]))
    page.table(("calibration", "version", "samples", "date", "from"), table, right=(2,))
    print(f"{num_models} models (`kvplan models`), {num_gpus} GPUs (`kvplan gpus`)")


@profiles_app.command("show")
def show_command(
    name: Annotated[
        str,
        typer.Argument(
            help="A calibration of `kvplan profiles`, or a file of one.", autocompletion=complete.calibrations
        ),
    ],
    as_json: JSON = False,
) -> None:
    """Explain one calibration: what was fitted, from what, how good it is, and where it holds."""
    from kvplan.calibration.schema import OTHER_KINDS, attention_from_json, check_other
    from kvplan.latency.parameters import PROFILE, calibration_from_profile
    from kvplan.terminal.calibration_view import show_attention, show_other, show_serving

    found = _found(name)
    kind = found.data.get("kind")
    if kind in OTHER_KINDS:
        show = show_other
        check_other(found.data, found.where)
    elif kind == PROFILE:
        show = show_serving
        calibration_from_profile(found.data, found.where)
    else:
        show = show_attention
        attention_from_json(found.data, found.where, found.origin)
    if as_json:
        sys.stdout.write(json.dumps(found.data, indent=2) + "\n")
        return
    from kvplan.terminal.console import make_console

    show(make_console(), found.data, found.origin)


def _found(name: str) -> Found:
    """The calibration called ``name``, or the one in the file ``name``."""
    from kvplan.calibration import store

    wanted = name.strip().lower().removesuffix(".json")
    known: dict[str, Found] = {}
    for found in store.every():
        known.setdefault(found.name.lower(), found)
    if wanted in known:
        return known[wanted]
    path = Path(name)
    if path.is_file():
        return store.Found(path.stem, store.read(path), name, GIVEN)
    raise UnknownNameError("calibration", name, known, hint="`kvplan profiles` lists them")
