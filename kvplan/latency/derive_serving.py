"""Derive the serving calibration and its report: ``python -m kvplan.latency.derive_serving --data DIR``.

Writes ``profiles/calibrations/serving.json`` and ``docs/accuracy.md``. The table is NVIDIA AIConfigurator's public list
of measured deployments (Apache-2.0); only what was fitted on it is kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kvplan import profiles
from kvplan.latency.accuracy_report import accuracy_markdown
from kvplan.latency.fit import Observations, fit
from kvplan.latency.hierarchy import Design
from kvplan.latency.parameters import NAMES, PARAMETERS, PROFILE, SCHEMA_VERSION
from kvplan.latency.serving_rows import ServingRow
from kvplan.latency.validate import Validation, load_observations, residual_quantiles, validate
from kvplan.traffic import Floats

SOURCE = "NVIDIA AIConfigurator public serving measurements, mostly InferenceMAX"
MIN_OFFSET = 0.02
"""Offsets of a logarithm below this are left out of the file: they move nothing by more than 2%."""


def calibration_json(rows: tuple[ServingRow, ...], data: Observations, design: Design, beta: Floats,
                     residuals: dict[str, list[float]]) -> dict[str, Any]:  # fmt: skip
    """The calibration file's content."""
    offsets: dict[str, dict[str, dict[str, float]]] = {}
    for (level, name, parameter), value in zip(design.columns, beta, strict=True):
        if level != "common" and abs(value) >= MIN_OFFSET:
            offsets.setdefault(level, {}).setdefault(name, {})[parameter] = round(float(value), 4)
    common = {}
    for entry in PARAMETERS:
        value = float(beta[NAMES.index(entry.name)])
        common[entry.name] = float(f"{math.exp(value) if entry.is_log else value:.6g}")
    sound = [not row.is_suspect for row in rows]
    groups = Counter(t.group for t, ok in zip(data.traits, sound, strict=True) if ok)
    gpu_engines = Counter(f"{t.gpu}|{t.engine}" for t, ok in zip(data.traits, sound, strict=True) if ok)
    sequences, load = np.asarray(data.step.sequences), data.load
    context = np.asarray(load.input_tokens) + np.asarray(load.output_tokens) / 2
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "serving",
        "name": PROFILE,
        "aliases": [],
        "source": SOURCE,
        "date": datetime.date.today().isoformat(),
        "num_rows": len(rows),
        "num_rows_fitted": sum(sound),
        "meaning": {parameter.name: parameter.meaning for parameter in PARAMETERS},
        "common": common,
        "offsets": offsets,
        "groups": dict(sorted(groups.items())),
        "gpu_engines": dict(sorted(gpu_engines.items())),
        "residuals": residuals,
        "valid_range": {
            "sequences": [float(sequences.min()), float(sequences.max())],
            "context_tokens": [float(context.min()), float(context.max())],
        },
    }


def main() -> None:
    """Fit, validate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds serving_tpot.csv.gz")
    parser.add_argument("--docs", type=Path, default=Path("docs/accuracy.md"))
    parser.add_argument("--out", type=Path, default=profiles.ROOT / "calibrations" / f"{PROFILE}.json")
    arguments = parser.parse_args()
    rows, data = load_observations(arguments.data / "serving_tpot.csv.gz")
    design, beta = fit(data)
    validation: Validation = validate(rows, data)
    content = calibration_json(rows, data, design, beta, residual_quantiles(validation))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    arguments.docs.write_text(accuracy_markdown(validation, content), encoding="utf-8")


if __name__ == "__main__":
    main()
