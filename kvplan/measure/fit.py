"""The calibration that a run ends with: the same fit as ``kvplan calibrate``, into the user's own folder.

Latent attention has a form of its own (``kvplan.calibration.latent``), fitted as that of engines' kernels is.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from kvplan.calibration import store
from kvplan.calibration.calibrate import calibrate_file
from kvplan.calibration.document import write_json
from kvplan.calibration.latent import latent_from_json, samples_document
from kvplan.calibration.schema import attention_from_json
from kvplan.errors import InputError, KvplanError
from kvplan.gpu import GpuSpec, load_gpu
from kvplan.measure.analysis import CalibrationResult, cell_rows, compare
from kvplan.measure.backend import Environment
from kvplan.measure.predict import ENGINE, LATENT_TILE_ROWS, attention_predictor, latent_predictor
from kvplan.measure.run_folder import RunFolder


def calibrate_run(folder: RunFolder, environment: Environment, roofline_bytes_per_s: float) -> CalibrationResult:
    """Fit the run's samples and write the calibration; a fit that cannot be made is a result that says why."""
    gpu = gpu_of(environment, roofline_bytes_per_s)
    samples = folder.samples()[0]
    latent_heads = next((sample.num_q_heads for sample in samples if sample.latent_dim), None)
    kind = "" if latent_heads is None else f"-latent-{latent_heads}"
    path = store.user_folder() / f"{gpu.name}-{ENGINE}{kind}.json"
    try:
        if latent_heads is not None:
            document = samples_document(samples, _about(path.stem, gpu, environment), gpu, LATENT_TILE_ROWS)
            fitted = latent_predictor(latent_from_json(document, str(path), store.MEASURED_HERE))
        else:
            document, _ = calibrate_file(
                folder.samples_path, gpu, name=path.stem, engine=ENGINE, engine_version=environment.kvplan
            )
            fitted = attention_predictor(attention_from_json(document, str(path), store.MEASURED_HERE))
        _make(path.parent)
        write_json(path, document, force=True)
    except KvplanError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return CalibrationResult(None, gpu.name, f"{error.message}{hint}", None)
    rows = cell_rows(samples, roofline_bytes_per_s, fitted.latency_s)
    return CalibrationResult(str(path), gpu.name, None, compare(rows, fitted.kind, fitted.source))


def _about(name: str, gpu: GpuSpec, environment: Environment) -> dict[str, Any]:
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"name": name, "aliases": [], "gpu": gpu.name, "engine": ENGINE, "engine_version": environment.kvplan,
            "date": today, "sources": [{"name": "kvplan measure", "file": "samples.jsonl"}]}  # fmt: skip


def gpu_of(environment: Environment, roofline_bytes_per_s: float) -> GpuSpec:
    """The profile of the device measured, or what the run itself found out about it."""
    if environment.profile:
        return load_gpu(environment.gpu)
    measured = {"source": "measured by this run: the read roofline"}
    return GpuSpec(
        environment.gpu, environment.device_name, {"cuda": "nvidia", "rocm": "amd"}.get(environment.kind, "cpu"),
        environment.architecture, environment.memory_bytes, roofline_bytes_per_s,
        l2_cache_bytes=environment.l2_cache_bytes, num_sms=environment.num_sms,
        facts={"memory_bandwidth_bytes_per_s": measured},
    )  # fmt: skip


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror or type(error).__name__})") from error
