"""The commands, by name; an application with all of them, or with the one that is asked for.

Building every option of every command takes longer than most answers: a call that names its command builds that one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Annotated

import typer

import kvplan

COMMANDS = {
    "size": "kvplan.cli.size:size_command",
    "itl": "kvplan.cli.itl:itl_command",
    "check": "kvplan.cli.check:check_command",
    "measure": "kvplan.cli.measure:measure_command",
    "report": "kvplan.cli.report:report_command",
    "calibrate": "kvplan.cli.calibrate:calibrate_command",
    "models": "kvplan.cli.listing:models_command",
    "gpus": "kvplan.cli.listing:gpus_command",
    "dtypes": "kvplan.cli.listing:dtypes_command",
    "profiles": "kvplan.cli.profiles:profiles_app",
}
"""Name → module and function (or application, for a command with commands of its own), in the order of the help."""


def make_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The application with the commands ``names``."""
    app = typer.Typer(
        name="kvplan",
        help="Plan KV-cache memory of LLM servers, exact to the block, with a source for every number.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Exit codes: 0 fine · 1 the answer is no (--check) · 2 usage or input error · 3 out of tolerance · "
        "4 hardware, dependency or server missing · 130 interrupted.",
    )
    app.callback()(_root)
    for name in names:
        module, _, attribute = COMMANDS[name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kvplan {kvplan.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
