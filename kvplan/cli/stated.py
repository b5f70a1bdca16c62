"""Which options were written on the command line, as opposed to left at their defaults."""

from __future__ import annotations

import typer

from kvplan.errors import InputError


def stated(context: typer.Context) -> dict[str, str]:
    """Parameter name → the flag's first spelling, of every option on the command line."""
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params if parameter.name}
    return {
        name: flags[name]
        for name in context.params
        if name in flags and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def refuse_beside_cases(context: typer.Context) -> None:
    """``--cases`` takes requests whole from its file: any other option beside it would be ignored.

    Raises:
        InputError: there is one; the message names it.

    """
    others = [flag for name, flag in stated(context).items() if name not in ("cases", "as_json")]
    if others:
        raise InputError(f"{', '.join(others)} beside --cases would be ignored",
                         hint="write it into each case; results are always JSON lines")  # fmt: skip
