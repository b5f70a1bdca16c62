"""The typer application and its commands."""

from __future__ import annotations

from typing import Annotated

import typer

import kvplan
from kvplan.cli.calibrate import calibrate_command
from kvplan.cli.check import check_command
from kvplan.cli.itl import itl_command
from kvplan.cli.listing import dtypes_command, gpus_command, models_command
from kvplan.cli.measure import measure_command
from kvplan.cli.profiles import profiles_app
from kvplan.cli.report import report_command
from kvplan.cli.size import size_command

app = typer.Typer(
    name="kvplan",
    help="Plan KV-cache memory of LLM servers, exact to the block, with a source for every number.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine · 1 the answer is no (--check) · 2 usage or input error · 3 out of tolerance · "
    "4 hardware or dependency missing · 130 interrupted.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kvplan {kvplan.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("size")(size_command)
app.command("itl")(itl_command)
app.command("check")(check_command)
app.command("measure")(measure_command)
app.command("report")(report_command)
app.command("calibrate")(calibrate_command)
app.command("models")(models_command)
app.command("gpus")(gpus_command)
app.command("dtypes")(dtypes_command)
app.add_typer(profiles_app, name="profiles")
