"""The typer application with every command, for completion, documentation and tests."""

from __future__ import annotations

from kvplan.cli.commands import make_app

app = make_app()
