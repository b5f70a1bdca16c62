"""The calibration that a run ends with: the same fit as ``kvplan calibrate``, into the user's own folder.

Latent attention has a form of its own (``kvplan.calibration.latent``), fitted as that of engines' kernels is.
"""

from __future__ import annotations

import datetime
from typing import Any

from kvplan.calibration import store
from kvplan.calibration.calibrate import calibrate_file
from kvplan.calibration.document import write_json
from kvplan.calibration.latent import latent_from_json, samples_document
from kvplan.calibration.schema import attention_from_json
from kvplan.errors import KvplanError
from kvplan.gpu import GpuSpec, load_gpu
from kvplan.measure.analysis import CalibrationResult, cell_rows, compare
from kvplan.measure.backend import Environment
from kvplan.measure.predict import ENGINE, LATENT_TILE_ROWS, Predictor, attention_predictor, latent_predictor
from kvplan.measure.run_folder import RunFolder


def calibrate_run(folder: RunFolder, environment: Environment, roofline_bytes_per_s: float) -> CalibrationResult:
    """Fit the run's samples and write the calibration; a fit that cannot be made is a result that says why.

    Raises:
        InputError: the run's own folder cannot be written.

    """
    gpu = gpu_of(environment, roofline_bytes_per_s)
    try:
        document, predictor = fit_run(folder, gpu, environment.kvplan)
        path = store.user_folder() / f"{document['name']}.json"
        write_json(path, document, force=True)
    except KvplanError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return CalibrationResult(None, gpu.name, f"{error.message}{hint}", None)
    folder.add("calibrations", {"path": str(path)})
    rows = cell_rows(folder.samples()[0], roofline_bytes_per_s, predictor.latency_s)
    return CalibrationResult(str(path), gpu.name, None, compare(rows, predictor.kind, predictor.source))


def fit_run(folder: RunFolder, gpu: GpuSpec, version: str) -> tuple[dict[str, Any], Predictor]:
    """The calibration document of the run's samples, and what it predicts; ``version`` is that of the kernels.

    Latent attention is calibrated for one number of query heads: what others take is not told by it.

    Raises:
        InputError: too few samples of a KV dtype, or none that a fit comes of.

    """
    samples = folder.samples()[0]
    name = f"{gpu.name}-{ENGINE}"
    latent_heads = next((sample.num_q_heads for sample in samples if sample.latent_dim), None)
    if latent_heads is None:
        document, _ = calibrate_file(folder.samples_path, gpu, name=name, engine=ENGINE, engine_version=version)
        return document, attention_predictor(attention_from_json(document, name, store.MEASURED_HERE))
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    about = {"name": f"{name}-latent-{latent_heads}", "aliases": [], "gpu": gpu.name, "engine": ENGINE,
             "engine_version": version, "date": today,
             "sources": [{"name": "kvplan measure", "file": folder.samples_path.name}]}  # fmt: skip
    document = samples_document(samples, about, gpu, LATENT_TILE_ROWS)
    return document, latent_predictor(latent_from_json(document, name, store.MEASURED_HERE))


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
