"""``kvplan models``, ``gpus`` and ``dtypes``: what kvplan knows by name."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from kvplan import profiles
from kvplan.gpu import gpu_names, load_gpu

JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _emit(rows: list[dict[str, Any]]) -> None:
    sys.stdout.write(json.dumps(rows, indent=2) + "\n")


def models_command(as_json: JSON = False) -> None:
    """List the bundled models: name, parameters, longest context, aliases."""
    rows = []
    for name in profiles.names("models"):
        data = profiles.load("models", name)
        rows.append({"name": name, "num_parameters": data["num_parameters"], "aliases": data["aliases"],
                     "hf_ids": data["hf_ids"], "source": data["source"]})  # fmt: skip
    if as_json:
        _emit(rows)
        return
    from kvplan.terminal.console import add_row, make_console, make_table

    table = make_table("model", "parameters", "also called", right=(1,), wrap=(2,))
    for row in rows:
        add_row(table, row["name"], f"{row['num_parameters'] / 1e9:,.1f} B", ", ".join(row["aliases"]))
    make_console().print(table)


def gpus_command(as_json: JSON = False) -> None:
    """List the bundled GPUs: memory as the driver reports it, bandwidth, architecture, aliases."""
    rows = []
    for name in gpu_names():
        gpu = load_gpu(name)
        data = profiles.load("gpus", name)
        rows.append({"name": name, "display_name": gpu.display_name, "memory_bytes": gpu.memory_bytes,
                     "memory_bandwidth_bytes_per_s": gpu.memory_bandwidth_bytes_per_s, "architecture": gpu.architecture,
                     "aliases": data["aliases"], "facts": data["facts"]})  # fmt: skip
    if as_json:
        _emit(rows)
        return
    from kvplan.terminal.console import add_row, make_console, make_table

    table = make_table("GPU", "GiB", "TB/s", "arch", "also called", right=(1, 2), wrap=(4,))
    for row in rows:
        bandwidth = row["memory_bandwidth_bytes_per_s"]
        speed = f"{bandwidth / 1e12:.2f}" if bandwidth else "–"
        memory = f"{row['memory_bytes'] / 2**30:.1f}"
        add_row(table, row["name"], memory, speed, row["architecture"] or "–", ", ".join(row["aliases"]))
    make_console().print(table)


def dtypes_command(as_json: JSON = False) -> None:
    """List the KV-cache formats: bytes, scales, gain, measured slope, and the engines and GPUs that take them."""
    from dataclasses import asdict

    from kvplan.formats import format_facts
    from kvplan.measure.shipped import measured_slopes

    slopes, facts = measured_slopes(), format_facts()
    if as_json:
        _emit([
            fact.as_dict() | {"measured_slope": asdict(slopes[fact.name]) if fact.name in slopes else None}
            for fact in facts
        ])  # fmt: skip
        return
    from kvplan.terminal.dtypes_view import show_dtypes
    from kvplan.terminal.plain import Page

    show_dtypes(Page(), facts, slopes)
