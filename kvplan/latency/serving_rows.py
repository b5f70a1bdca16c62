"""Measured deployments as requests: the columns of ``serving_tpot.csv.gz`` in the words of the JSON contract."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHT_DTYPES = {"fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4", "int4_wo": "int4", "bf16": "bf16"}
PRECISIONS = {"fp8": "fp8", "fp4": "nvfp4", "int4": "int4", "bf16": "bf16"}


@dataclass(frozen=True, slots=True)
class ServingRow:
    """One measured deployment.

    Attributes:
        case: the request, by the keys ``kvplan itl --cases`` takes.
        is_suspect: the table's own mark for labels that look wrong.

    """

    case: dict[str, Any]
    tpot_s: float
    ttft_s: float
    is_suspect: bool


def case_of(row: dict[str, str]) -> dict[str, Any]:
    """The request of one row of the table; what the row does not state is left out."""
    attention_dp = _whole(row["attention_dp_size"])
    case: dict[str, Any] = {
        "id": row["id"],
        "model": row["model_path"],
        "gpu": row["system"],
        "engine": row["backend"],
        "engine_version": row["backend_version"] or None,
        "tp_size": _whole(row["tp_size"]) or 1,
        "pp_size": _whole(row["pp_size"]) or 1,
        "attention_dp_size": attention_dp,
        "moe_tp_size": _whole(row["moe_tp_size"]),
        "moe_ep_size": _whole(row["moe_ep_size"]),
        "weight_dtype": WEIGHT_DTYPES.get(row["gemm_quant_mode"]) or PRECISIONS.get(row["precision"]),
        "input_tokens": _whole(row["isl"]),
        "output_tokens": _whole(row["osl"]),
        "concurrency": (_whole(row["batch_size"]) or 1) * max(attention_dp or 1, 1),
    }
    if row["backend"] == "sglang":  # the benchmark's recipes start it with --disable-radix-cache
        case["enable_prefix_caching"] = False
    return {key: value for key, value in case.items() if value is not None}


def read_rows(path: Path) -> Iterator[ServingRow]:
    """Every row of the table."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield ServingRow(
                case_of(row),
                float(row["silicon_tpot_ms"]) / 1e3,
                float(row["silicon_ttft_ms"]) / 1e3,
                row["suspect_row"] not in ("", "0"),
            )


def _whole(text: str) -> int | None:
    return int(float(text)) if text else None
