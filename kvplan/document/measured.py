"""What a run of ``kvplan measure`` says about a deployment: points beside its lines, and kernel slope ratios."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplan.document.parts import Measured, MeasuredPoint
from kvplan.document.precisions import Format
from kvplan.errors import InputError, KvplanError, shorten
from kvplan.latency.planner import plan_points
from kvplan.latency.request import Point
from kvplan.latency.served import Served
from kvplan.model_config import resolve_model
from kvplan.model_config.types import AttentionCache, LatentCache
from kvplan.samples import Sample, read_samples


@dataclass(frozen=True)
class Run:
    """A run folder that was read: where and when it was taken, its samples and its whole steps.

    ``model`` and ``weight_dtype`` are those of the whole steps; ``num_corrupt`` is the number of lines in its sample
    file that hold none.
    """

    path: Path
    environment: dict[str, Any]
    model: str | None
    weight_dtype: str
    samples: list[Sample]
    num_corrupt: int
    steps: list[dict[str, Any]]


def read_run(path: Path, gpu_name: str) -> Run:
    """The run in ``path``, which must have been taken on ``gpu_name``.

    Raises:
        InputError: there is no run, it holds nothing measured, or it was taken elsewhere.

    """
    from kvplan.measure.run_folder import RunFolder

    folder = RunFolder(path)
    try:
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not JSON"
        raise InputError(f"{path} is no run of kvplan measure (environment.json: {why})",
                         hint="--measured takes the folder that `kvplan measure -o` wrote") from error  # fmt: skip
    gpu = environment.get("gpu") if isinstance(environment, dict) else None
    if gpu != gpu_name:
        cpu = "; a CPU is not a GPU" if isinstance(environment, dict) and environment.get("kind") == "cpu" else ""
        raise InputError(f"{path} was measured on {shorten(gpu, 40)}, not on {gpu_name}{cpu}",
                         hint=f"measure on {gpu_name}, or leave --measured out")  # fmt: skip
    found = read_samples(folder.samples_path)
    samples, steps = found.samples, folder.records("steps")
    if not samples and not steps:
        raise InputError(f"{path} holds no sample", hint="go on with `kvplan measure --resume`")
    return Run(path, environment, *_steps_of(path), samples, len(found.corrupt), steps)


def _steps_of(path: Path) -> tuple[str | None, str]:
    """The model that the run's whole steps are of, and the format of its weights."""
    from kvplan.measure.run_folder import read_request

    try:
        request = read_request(path)
        name = None if request.model is None else resolve_model(request.model).name
    except KvplanError:
        return None, "bf16"
    return name, request.step_weight_dtype


def slope_ratios(run: Run, shape: tuple[int, int, int] | None) -> dict[str, float]:
    """KV format → slope ratio of kvplan's kernels to bf16 on heads of ``shape``, at the largest batch measured."""
    from kvplan.measure.analysis import line_rows

    rows = line_rows([sample for sample in run.samples if _shape(sample) == shape and not sample.window_tokens], 1.0)
    found: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: row.batch_size):
        if row.slope_ratio is not None:
            found[row.kv_dtype] = row.slope_ratio
    return found


def _shape(sample: Sample) -> tuple[int, int, int]:
    return sample.num_q_heads, sample.num_kv_heads, sample.head_dim


def rank_shape(served: Served) -> tuple[int, int, int] | None:
    """Query heads, KV heads and head width of one rank; None unless every layer is the same full attention.

    Latent attention is one KV head as wide as its row.
    """
    model, tp = served.model, served.deployment.attention_tp_size
    caches = {cache for layer in model.layers for cache in layer.caches}
    cache = next(iter(caches)) if len(caches) == 1 else None
    if isinstance(cache, LatentCache) and cache.top_k_tokens is None:
        return max(1, cache.num_q_heads // tp), 1, cache.latent_dim + cache.rope_dim
    if not isinstance(cache, AttentionCache) or cache.window_tokens is not None or cache.head_dim != cache.head_dim_v:
        return None
    return max(1, cache.num_q_heads // tp), max(1, cache.num_kv_heads // tp), cache.head_dim


def measured_of(run: Run, formats: Sequence[Format]) -> Measured:
    """The run as the report states it: its points on the lines of ``formats``, and why others are not there."""
    served = {fmt.name: fmt.line.served for fmt in formats if fmt.line is not None}
    points: list[MeasuredPoint] = []
    notes = ["Measured with the kernels that kvplan bundles; an engine's own may be slower"]
    if run.num_corrupt:
        notes.append(f"{run.num_corrupt} lines of samples.jsonl hold no sample and are left out")
    if served:
        any_served = next(iter(served.values()))
        points += _whole_steps(run, served, any_served, notes)
        points += _kernels(run, served, any_served, notes)
    else:
        notes.append("nothing is predicted for this GPU, so nothing stands beside the measurements")
    errors = [abs(point.error) for point in points]
    environment = run.environment
    software = ", ".join(f"{name} {environment[name]}" for name in ("driver", "torch", "triton", "kvplan")
                         if environment.get(name))  # fmt: skip
    return Measured(
        run=run.path.name or str(run.path),
        device=str(environment.get("device_name") or environment.get("gpu")),
        software=software,
        taken=str(environment.get("time") or "unknown"),
        num_samples=len(run.samples) + len(run.steps),
        points=points,
        median_error=statistics.median(errors) if errors else None,
        notes=notes,
    )


def _whole_steps(run: Run, served: dict[str, Served], any_served: Served, notes: list[str]) -> list[MeasuredPoint]:
    if not run.steps:
        return []
    alone = any_served.deployment.num_gpus == 1 and any_served.traits.precision == run.weight_dtype
    if run.model != any_served.model.name or not alone:
        of = run.model or "a model not named"
        notes.append(f"{len(run.steps)} whole steps left out: they are of {of}, {run.weight_dtype} weights, on one GPU")
        return []
    return [
        _point("whole_step", record["kv_dtype"], record["batch_size"], record["context_tokens"], record["latency_s"],
               record["p10_s"], record["p90_s"], served[record["kv_dtype"]])
        for record in run.steps if record["kv_dtype"] in served
    ]  # fmt: skip


def _kernels(run: Run, served: dict[str, Served], any_served: Served, notes: list[str]) -> list[MeasuredPoint]:
    """Kernel samples of this rank's heads as ITL: the predicted step with its KV part replaced."""
    shape = rank_shape(any_served)
    mine = [sample for sample in run.samples if _shape(sample) == shape and not sample.window_tokens]
    if len(mine) < len(run.samples):
        heads = "of other heads than one rank's" if shape else "of full attention, which this model is not all of"
        notes.append(f"{len(run.samples) - len(mine)} kernel samples left out: {heads}")
    found = []
    ranks = any_served.deployment.attention_dp_size * any_served.deployment.num_replicas
    for sample in mine:
        target = served.get(sample.kv_dtype)
        if target is None:
            continue
        users = sample.batch_size * ranks * target.deployment.pp_size
        plan = plan_points(target, [Point(context_tokens=sample.context_tokens, batch_size=users)])[0]
        rest = plan.itl_s - plan.breakdown.kv_s
        layers = target.model.num_layers
        found.append(_point("kernel", sample.kv_dtype, users, sample.context_tokens, rest + layers * sample.latency_s,
                            rest + layers * sample.p10_s, rest + layers * sample.p90_s, target))  # fmt: skip
    return found


def _point(kind: str, kv_dtype: str, users: int, context: int, itl_s: float, low_s: float, high_s: float,
           served: Served) -> MeasuredPoint:  # fmt: skip
    predicted = plan_points(served, [Point(context_tokens=context, batch_size=users)])[0].itl_s
    return MeasuredPoint.model_validate({
        "kind": kind, "kv_cache_dtype": kv_dtype, "num_users": users, "context_tokens": context, "itl_s": itl_s,
        "low_s": low_s, "high_s": high_s, "predicted_s": predicted, "error": predicted / itl_s - 1,
    })  # fmt: skip
