"""Which options were written on the command line, as opposed to left at their defaults."""

from __future__ import annotations

import re
from collections.abc import Sequence

import typer

from kvplan.errors import InputError

_FIELD = re.compile(r"(?<![\w./'\"-])[a-z]+(?:_[a-z]+)+(?![\w./'\"=-])")


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


def in_options(message: str, words: Sequence[str]) -> str:
    """``message`` with each request field that an option of the command line ``words`` set called as it was typed."""
    from kvplan.memory.request import OPTION_NAMES

    typed: dict[str, str] = {}
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
            name = option[2:].replace("-", "_")
            typed |= {name: option, OPTION_NAMES.get(name, name): option}
    return _FIELD.sub(lambda field: typed.get(field[0], field[0]), message)
