"""What a report says: the types behind ``kvplan report --json``, versioned, with a published JSON Schema.

Write the schemas again with ``python -m kvplan.document.schema docs/schema``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from kvplan.document.parts import (
    Advice,
    Answers,
    Deployment,
    Figure,
    Fingerprint,
    KernelRatio,
    Launch,
    Measured,
    Part,
    Precision,
    Real,
    Segment,
    Text,
    Waste,
    WhatIf,
)


class Report(Part):
    """One deployment, whole. ``as_html``, ``as_markdown`` and ``as_json`` are its forms."""

    schema_version: Literal[1] = 1
    kvplan_version: Text
    date: Text
    name: Text
    inputs: dict[Text, Text | int | Real | bool | None]
    deployment: Deployment
    answers: Answers
    precisions: list[Precision]
    fp8_sentences: list[Text]
    kernels: list[KernelRatio]
    memory: list[Segment]
    waste: list[Waste]
    launch: list[Launch]
    what_if: WhatIf
    measured: Measured | None
    advice: list[Advice]
    notes: list[Text]
    audit: list[Figure]
    fingerprints: list[Fingerprint]

    def as_html(self) -> str:
        """One self-contained page."""
        from kvplan.document.render import report_html

        return report_html(self)

    def as_markdown(self) -> str:
        """The same for a pull request."""
        from kvplan.document.render import report_markdown

        return report_markdown(self)

    def as_json(self) -> str:
        """The document itself; ASCII only."""
        return to_json(self)


class FleetEntry(Part):
    """One deployment of a fleet: its answers, or the ``problem`` that kept it from being planned."""

    name: Text
    page: Text | None
    problem: Text | None = None
    hint: Text | None = None
    model: Text | None = None
    gpu: Text | None = None
    gpu_name: Text | None = None
    num_gpus: int | None = None
    engine: Text | None = None
    kv_cache_dtype: Text | None = None
    context_tokens: int | None = None
    num_users: int | None = None
    max_users: int | None = None
    fits: bool | None = None
    headline: Text | None = None
    itl_s: Real | None = None
    tpot_s: Real | None = None
    ttft_s: Real | None = None


class GpuTotal(Part):
    """GPUs of one kind over the fleet."""

    gpu: Text
    gpu_name: Text
    num_gpus: int
    num_deployments: int


class Fleet(Part):
    """The index of a fleet. ``is_complete`` is False when the run was interrupted."""

    schema_version: Literal[1] = 1
    kvplan_version: Text
    date: Text
    name: Text
    is_complete: bool
    entries: list[FleetEntry]
    totals: list[GpuTotal]
    num_gpus: int
    num_users: int
    num_fitting: int
    num_not_fitting: int
    num_failed: int
    fingerprints: list[Fingerprint]

    def as_html(self) -> str:
        """The index page."""
        from kvplan.document.render import fleet_html

        return fleet_html(self)

    def as_markdown(self) -> str:
        """The index for a pull request."""
        from kvplan.document.render import fleet_markdown

        return fleet_markdown(self)

    def as_json(self) -> str:
        """The index itself; ASCII only."""
        return to_json(self)


def to_json(document: Report | Fleet) -> str:
    """A document as indented JSON, ASCII only."""
    return json.dumps(document.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def schema_text(document: type[BaseModel]) -> str:
    """The published JSON Schema of a document."""
    return json.dumps(document.model_json_schema(mode="serialization"), indent=2) + "\n"


SCHEMAS: dict[str, type[BaseModel]] = {"report-v1.json": Report, "fleet-v1.json": Fleet}


def write_schemas(folder: Path) -> None:
    """Write every schema into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in SCHEMAS.items():
        (folder / name).write_text(schema_text(document), encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
