"""``kvplan dtypes`` on a terminal: what a format costs, what it has been measured to save, and where it can be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvplan.formats import FormatFacts
from kvplan.gpu import gpu_names, load_gpu
from kvplan.terminal.plain import Page
from kvplan.units import format_ratio

SHORT = {"tensorrt-llm": "trtllm"}


class Slope(Protocol):
    """A measured slope against 16 bits."""

    @property
    def ratio(self) -> float: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def source(self) -> str: ...  # noqa: D102


def show_dtypes(page: Page, facts: Sequence[FormatFacts], slopes: Mapping[str, Slope]) -> None:
    """A row a format, then where the slopes come from and what the formats are."""
    rows = []
    for fact in facts:
        scales = "–" if fact.scale_bytes is None else f"{fact.scale_bytes:g}"
        others = [SHORT.get(name, name) for name in fact.engines if name not in ("vllm", "generic")]
        slope = slopes.get(fact.name)
        rows.append((
            fact.name, f"{fact.bytes_per_element:g}", scales, format_ratio(fact.gain),
            "–" if slope is None else format_ratio(slope.ratio), _gpus(fact.engines.get("vllm", ())),
            ", ".join(others) or "–",
        ))  # fmt: skip
    columns = ("KV dtype", "B/elem", "scales", "gain", "slope", "vllm on", "also")
    page.table(columns, rows, right=(1, 2, 3, 4))
    page.line()
    page.line("scales: bytes a token and head, K and V, at head_dim 128. gain: bytes of 16 bits over bytes, before "
              "padding; latent rows (–) have the model's own size. also: engines whose rules here do not tell GPUs "
              "apart; the generic engine takes every format.", "dim")  # fmt: skip
    if slopes:
        one = next(iter(slopes.values()))
        page.line(f"slope: time per token of context over that of 16 bits, kvplan's own kernels on {one.device}, batch "
                  f"{one.batch_size} ({one.source}); engines' kernels differ:", "dim")  # fmt: skip
    for fact in facts:
        for found in fact.engine_slopes:
            engine = " ".join(part for part in (found.engine, found.engine_version) if part)
            ratio = format_ratio(found.ratio)
            page.line(f"  {fact.name} on {found.gpu}, {engine}: {ratio}, {found.source}", "dim")
    page.line()
    for fact in facts:
        page.line(f"  {fact.name}: {fact.note}", "dim")


def _gpus(taken: tuple[str, ...] | None) -> str:
    """Architectures rather than names: ``any``, ``sm89+, AMD``, ``sm100, sm103``."""
    if not taken:
        return "–"
    every = [load_gpu(name) for name in gpu_names()]
    if len(taken) == len(every):
        return "any"
    levels = sorted({gpu.sm for gpu in every if gpu.sm is not None})
    mine = sorted({gpu.sm for gpu in every if gpu.sm is not None and gpu.name in taken})
    parts = []
    if mine:
        upwards = mine == [sm for sm in levels if sm >= mine[0]]
        parts.append(f"sm{mine[0]}+" if upwards else ", ".join(f"sm{sm}" for sm in mine))
    if any(gpu.vendor == "amd" and gpu.name in taken for gpu in every):
        parts.append("AMD")
    return ", ".join(parts)
