"""``python -m kvplan.calibration.evaluate --data DIR``: how good kernel calibrations are, for docs/accuracy-kernels.md.

Each table of DIR/decode_attention is held out in turn: a few of its rows are drawn, fitted under priors from the
*other* tables only, and the rows that were not drawn are predicted. A second round lets the table's own shipped
calibration be one of the priors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplan.calibration.attention import AttentionCalibration
from kvplan.calibration.calibrate import (
    CONTEXT_TOKENS,
    LARGE_CONTEXT_TOKENS,
    LARGE_KV_BYTES,
    calibrate_points,
    kv_bytes,
)
from kvplan.calibration.derive import read_table
from kvplan.calibration.priors import shipped
from kvplan.calibration.samples import Points, Row, refuse_impossible
from kvplan.calibration.schema import attention_from_json
from kvplan.errors import InputError, KvplanError
from kvplan.gpu import GpuSpec

Array = NDArray[Any]
NUM_SAMPLES = 32
CORRUPTED = 3
DRAWS = ("whole table", "one dtype", "one dtype, D128")
HBM_BARS = (0.03, 0.12)
GDDR_BARS = (0.06, 0.20)
CONTEXT_BARS = (0.08, 0.25)
MOVE_BAR = 0.03


@dataclass(frozen=True)
class Draw:
    """One draw: errors of held-out rows, share of them in the interval, and how far corruption moves predictions."""

    large_median: float
    large_p90: float
    context_median: float
    context_p90: float
    covered: float
    covered_large: float
    moved_median: float
    moved_p90: float


def populations(points: Points) -> Iterator[tuple[str, str, Array]]:
    """(kind of draw, label, mask) of what is drawn from and judged on."""
    everything = np.ones(len(points), dtype=bool)
    yield DRAWS[0], "all", everything
    c = points.columns
    group = c["num_q_heads"] / c["num_kv_heads"]
    plain = (c["head_dim"] == 128) & (c["window_tokens"] == 0) & (group >= 2) & (group <= 16)
    for dtype in sorted(set(points.kv_dtype)):
        yield DRAWS[1], dtype, points.kv_dtype == dtype
    for dtype in sorted(set(points.kv_dtype)):
        yield DRAWS[2], dtype, (points.kv_dtype == dtype) & plain


def one_draw(points: Points, gpu: GpuSpec, seed: int, known: Sequence[AttentionCalibration]) -> Draw | None:
    """Calibrate on 32 random points and judge on the others; None when a dtype got fewer than 8."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(points), NUM_SAMPLES, replace=False)
    left = np.ones(len(points), dtype=bool)
    left[chosen] = False
    left &= points.columns["context_tokens"] >= CONTEXT_TOKENS
    test = points.take(left)
    factors = np.ones(NUM_SAMPLES)
    factors[generator.choice(NUM_SAMPLES, CORRUPTED, replace=False)] = np.exp(
        generator.uniform(np.log(0.3), np.log(3), CORRUPTED)
    )
    try:
        middle, half = _predict(points.take(chosen), test, gpu, known)
        moved, _ = _predict(_scaled(points.take(chosen), factors, gpu), test, gpu, known)
    except InputError:
        return None
    error = np.abs(middle / test.latency_s - 1)
    inside = np.abs(np.log(test.latency_s / middle)) <= half
    large = (test.columns["context_tokens"] >= LARGE_CONTEXT_TOKENS) & (kv_bytes(test) >= LARGE_KV_BYTES)
    move = np.abs(moved / middle - 1)
    return Draw(
        float(np.median(error[large])), float(np.quantile(error[large], 0.9)), float(np.median(error)),
        float(np.quantile(error, 0.9)), float(inside.mean()), float(inside[large].mean()),
        float(np.median(move)), float(np.quantile(move, 0.9)),
    )  # fmt: skip


def _predict(samples: Points, test: Points, gpu: GpuSpec, known: Sequence[AttentionCalibration]) -> tuple[Array, Array]:
    document = calibrate_points(
        samples, gpu, name="draw", engine=None, engine_version=None, sources=[{"name": "draw"}], date="now",
        calibrations=known,
    )  # fmt: skip
    calibration = attention_from_json(document, "draw")
    middle, half = np.empty(len(test)), np.empty(len(test))
    for dtype in set(test.kv_dtype):
        mine = test.kv_dtype == dtype
        cases = test.take(mine).geometry(dtype)
        middle[mine], half[mine] = calibration.predict(cases, dtype)
    return middle, half


def _scaled(points: Points, factors: Array, gpu: GpuSpec) -> Points:
    """``points`` with latencies multiplied, the impossible ones refused as ``kvplan calibrate`` does."""
    wrong = Points(np.arange(len(points)), points.kv_dtype, points.columns, points.latency_s * factors, points.kernel)
    return refuse_impossible(wrong, [Row(i, {}) for i in range(len(points))], gpu)


def table_draws(path: Path, seeds: int, limit: int, own: bool) -> Iterator[tuple[str, str, list[Draw]]]:
    """Every kind of draw from one table; ``own``: whether its shipped calibration may be a prior."""
    points, gpu, engine, _ = read_table(path)
    known = shipped(exclude=() if own else {f"attention-{gpu.name}-{engine}"})
    for kind, label, mask in populations(points):
        part = points.take(mask)
        if len(part) > limit:
            part = part.take(np.random.default_rng(0).choice(len(part), limit, replace=False))
        draws = [one_draw(part, gpu, seed, known) for seed in range(seeds)]
        yield kind, label, [draw for draw in draws if draw is not None]


def report(data: Path, seeds: int, limit: int) -> str:
    """The page, in Markdown."""
    lines = [HEADER.format(samples=NUM_SAMPLES, seeds=seeds, limit=limit, corrupted=CORRUPTED)]
    for own, title in ((False, HELD_OUT), (True, AS_SHIPPED)):
        lines += ["", title, "", COLUMNS]
        for path in sorted((data / "decode_attention").glob("*.csv.gz")):
            for kind, label, draws in table_draws(path, seeds, limit, own):
                if draws:
                    lines.append(_line(path.name.removesuffix(".csv.gz"), kind, label, draws))
                    print(lines[-1], flush=True)
    return "\n".join([*lines, "", FOOTER, ""])


def _line(table: str, kind: str, label: str, draws: Sequence[Draw]) -> str:
    bars = HBM_BARS if table.startswith(("a100", "h100", "h200", "b200")) else GDDR_BARS
    figures = np.array([list(vars(draw).values()) for draw in draws])
    lm, lp, cm, cp, covered, large, mm, mp = np.median(figures, axis=0)
    cells = [
        table, kind, label, f"{_bar(lm, bars[0])} / {_bar(lp, bars[1])}", f"{figures[:, 0].max():.1%}",
        f"{_bar(cm, CONTEXT_BARS[0])} / {_bar(cp, CONTEXT_BARS[1])}", f"{covered:.0%} / {large:.0%}",
        f"{_bar(mm, MOVE_BAR)} / {_bar(mp, MOVE_BAR)}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _bar(value: float, bar: float) -> str:
    return f"{value:.1%}" if value <= bar else f"**{value:.1%}**"


HEADER = """# Accuracy of kernel calibrations

Generated by `python -m kvplan.calibration.evaluate --data DIR`; not edited by hand.

Protocol: {samples} rows drawn at random (contexts of any length) from a table of measured decode-attention
latencies, calibrated as `kvplan calibrate` does, judged on rows that were not drawn with context ≥ 128. Of
tables with more than {limit:,} rows a fixed random {limit:,} stand for the table. Figures are medians over
{seeds} draws; "worst" is the worst draw's median. "Whole table" draws both KV dtypes, every head_dim, window
and group size at once; "one dtype" all shapes of one dtype; "D128" head_dim 128, no window, 2 to 16 query heads
a KV head. "Large" is context ≥ 1k and KV ≥ 64 MB: the bars are 3% / 12% on A100, H100, H200 and B200, 6% / 20%
on L40S and RTX PRO; with context ≥ 128 they are 8% / 25%. **Bold** misses its bar. "Covered" is the share of
held-out rows inside the 80% interval (all / large). "Moved" is how far predictions move (median / p90 over
rows) when {corrupted} of the {samples} samples are multiplied by 0.3 to 3; the bar is 3%."""

HELD_OUT = """## Kernels that kvplan has never seen

Priors come from the other tables' shipped calibrations only."""

AS_SHIPPED = """## Kernels that kvplan knows

As installed: the table's own shipped calibration is one of the priors, so these figures are those of a user who
measures the same kernel again. They are not evidence about other kernels."""

COLUMNS = """| table | draw | rows | large: median / p90 | worst | context ≥ 128: median / p90 | covered | moved |
|---|---|---|---|---|---|---|---|"""

FOOTER = """The form of the model (its terms) and the constants of the interval were chosen with all of these tables
in view, so the figures say how well it fits kernels like these, not how it would do on a kernel of another kind.
In the first part parameters and priors never saw the held-out table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and write the page."""
    parser = argparse.ArgumentParser(prog="python -m kvplan.calibration.evaluate", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with decode_attention/*.csv.gz")
    parser.add_argument("--out", type=Path, default=Path("docs/accuracy-kernels.md"))
    parser.add_argument("--seeds", type=int, default=10, help="draws of each kind")
    parser.add_argument("--limit", type=int, default=6000, help="rows that stand for a larger table")
    options = parser.parse_args(arguments)
    if not any((options.data / "decode_attention").glob("*.csv.gz")):
        print(f"error: no tables in {options.data / 'decode_attention'}", file=sys.stderr)
        return 2
    options.out.write_text(report(options.data, options.seeds, options.limit), encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KvplanError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
