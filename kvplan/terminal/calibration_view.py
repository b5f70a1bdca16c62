"""Calibrations on the terminal: what was fitted, from what, how good it is, and where it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kvplan.terminal.console import add_row, make_table
from kvplan.units import format_bytes_per_s, format_percent, format_seconds

if TYPE_CHECKING:
    from rich.console import Console


class Errors(Protocol):
    """Errors over a part of the cases."""

    @property
    def what(self) -> str: ...  # noqa: D102
    @property
    def count(self) -> int: ...  # noqa: D102
    @property
    def median(self) -> float: ...  # noqa: D102
    @property
    def p90(self) -> float: ...  # noqa: D102
    @property
    def covered(self) -> float: ...  # noqa: D102


def show_fit(console: Console, document: Mapping[str, Any]) -> None:
    """One line a KV dtype and kernel: samples, intercept, bandwidth, residuals; and what the other kernel is."""
    columns = ("KV dtype", "samples", "intercept", "bandwidth", "of peak", "from L2", "error", "p90")
    table = make_table(*columns, right=(1, 2, 3, 4, 5, 6, 7))
    peak = document["hardware"]["memory_bandwidth_bytes_per_s"]
    for name, entry in _kernels(document).items():
        bandwidth, residuals = entry["effective_bandwidth_bytes_per_s"], entry["residuals"] or {}
        add_row(
            table, name, f"{entry['num_samples']:,}", format_seconds(entry["intercept_s"]),
            format_bytes_per_s(bandwidth), format_percent(bandwidth / peak, 0),
            format_bytes_per_s(entry["l2_bandwidth_bytes_per_s"]),
            *(format_percent(residuals[key]) if residuals else "–" for key in ("median_error", "p90_error")),
        )  # fmt: skip
    console.print(table)
    others = [entry["other_kernel"] for entry in document["kv_dtypes"].values() if entry.get("other_kernel")]
    if others:
        unseen = (
            "" if all(entry["num_samples"] for entry in others) else "; without samples its figures are the prior's"
        )
        text = f"(2) is the engine's other kernel, for {_dispatched(document['other_kernel'])}{unseen}"
        console.print(text, markup=False)


def show_errors(console: Console, lines: Sequence[Errors]) -> None:
    """Median and p90 errors by part, and how often the 80% interval held."""
    table = make_table("cases", "count", "median error", "p90 error", "in 80% interval", right=(1, 2, 3, 4))
    for line in lines:
        add_row(table, line.what, f"{line.count:,}", format_percent(line.median), format_percent(line.p90),
                format_percent(line.covered, 0))  # fmt: skip
    console.print(table)


def show_attention(console: Console, document: Mapping[str, Any], origin: str) -> None:
    """Everything a calibration says of itself."""
    engine = " ".join(part for part in (document["engine"], document["engine_version"]) if part) or "engine not named"
    console.print(f"{document['name']}: decode attention on {document['gpu']}, {engine} ({origin})", markup=False)
    console.print(f"fitted on {document['num_samples']:,} samples, {document['num_refused']:,} refused, "
                  f"{document['date']}; prior: {document['prior']}", markup=False)  # fmt: skip
    for source in document["sources"]:
        console.print("source: " + ", ".join(str(value) for value in source.values()), markup=False)
    show_fit(console, document)
    entries = list(document["kv_dtypes"].values())
    _show_parameters(console, list(document["kv_dtypes"]), entries)
    if all(entry["other_kernel"] for entry in entries):
        _show_parameters(console, list(document["kv_dtypes"]), [entry["other_kernel"] for entry in entries])
    meanings = make_table("parameter", "what it is", wrap=(1,))
    for key, about in entries[0]["parameters"].items():
        add_row(meanings, key, about["meaning"])
    console.print(meanings)
    ranges = "; ".join(f"{key} {low:,.0f}–{high:,.0f}" for key, (low, high) in document["valid_range"].items())
    console.print(f"valid for {ranges}; outside it the interval widens by half", markup=False)


def _kernels(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was fitted, by label: each KV dtype, and its other kernel where the engine has one."""
    found = {}
    for name, entry in document["kv_dtypes"].items():
        found[name] = entry
        if entry.get("other_kernel"):
            found[f"{name} (2)"] = entry["other_kernel"]
    return found


def _show_parameters(console: Console, names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    table = make_table("parameter", *names, "unit")
    for key, about in entries[0]["parameters"].items():
        fitted = [entry["parameters"][key] for entry in entries]
        cells = [f"{item['value']:.3g} ±{item['log_spread']:.0%}" for item in fitted]
        add_row(table, key, *cells, about["unit"])
    console.print(table)


def _dispatched(dispatch: Mapping[str, Any]) -> str:
    shapes = [
        f"head_dim {shape['head_dim']}{' windowed' if shape['windowed'] else ''}"
        + (f" with {group} query heads a KV head" if (group := shape["q_heads_per_kv_head"]) else "")
        for shape in dispatch["shapes"]
    ]
    return "; ".join([*shapes, *([f"what the rule {dispatch['rule']} says"] if dispatch["rule"] else [])])


def show_other(console: Console, document: Mapping[str, Any], origin: str) -> None:
    """A calibration of another kernel: one line an entry, its parameters and residuals."""
    engine = " ".join(part for part in (document["engine"], document["engine_version"]) if part)
    console.print(f"{document['name']}: {document['kind']} on {document['gpu']}, {engine} ({origin})", markup=False)
    console.print(f"fitted on {document['num_samples']:,} samples, {document['date']}", markup=False)
    for source in document["sources"]:
        console.print("source: " + ", ".join(str(value) for value in source.values()), markup=False)
    entries = document["entries"]
    table = make_table("entry", "samples", "median error", "p90 error", "parameter", "value", right=(1, 2, 3))
    for name, entry in entries.items():
        residuals = entry["residuals"]
        cells = [name, f"{entry['num_samples']:,}", format_percent(residuals["median_error"]),
                 format_percent(residuals["p90_error"])]  # fmt: skip
        for key, item in entry["parameters"].items():
            add_row(table, *cells, key, f"{item['value']:.3g} {item['unit']} ±{item['log_spread']:.0%}")
            cells = [""] * 4
    console.print(table)


def show_serving(console: Console, document: Mapping[str, Any], origin: str) -> None:
    """The calibration of served deployments: measurements by GPU and engine, common parameters, held-out errors."""
    from kvplan.latency.parameters import PARAMETERS

    console.print(
        f"{document.get('name', 'serving')}: decode steps and loads of served models ({origin})", markup=False
    )
    console.print(f"fitted on {document['num_rows']:,} measurements, {document.get('date', 'undated')}", markup=False)
    console.print(f"source: {document.get('source', 'not stated')}", markup=False)
    measured = make_table("GPU", "engine", "measurements", right=(2,))
    for name, count in document["gpu_engines"].items():
        add_row(measured, *name.split("|", 1), f"{count:,}")
    console.print(measured)
    common = make_table("parameter", "value", "what it is", right=(1,), wrap=(2,))
    for parameter in PARAMETERS:
        value = document["common"][parameter.name]
        shown = format_seconds(value) if parameter.name.endswith("_s") else f"{value:.3g}"
        add_row(common, parameter.name, shown, parameter.meaning)
    console.print(common)
    levels = ", ".join(f"{level} {len(names)}" for level, names in document["offsets"].items())
    console.print(f"offsets of the levels a deployment belongs to change these: {levels}", markup=False)
    errors = make_table("held out", "80% of predictions over measurements", right=(1,))
    for name, (low, high) in document["residuals"].items():
        add_row(errors, name, f"{math.exp(low):.2f} to {math.exp(high):.2f}")
    console.print(errors)
    ranges = "; ".join(f"{key} {low:,.0f}–{high:,.0f}" for key, (low, high) in document["valid_range"].items())
    console.print(f"valid for {ranges}; `--json` prints every offset", markup=False)
