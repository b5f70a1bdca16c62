"""Matrix and expert kernels: known kernels are found again, and the shipped fits say how wrong they are."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplan import profiles
from kvplan.calibration.derive import derive_other, main
from kvplan.calibration.matrix_kernels import GEMM, MOE, gemm_document, gemm_s, moe_document, moe_s
from kvplan.calibration.schema import check_other
from kvplan.calibration.store import find
from kvplan.gpu import load_gpu

H200 = load_gpu("h200")
ABOUT = {"name": "test", "aliases": [], "gpu": "h200", "engine": "vllm", "engine_version": "1", "date": "2026-11",
         "sources": []}  # fmt: skip
GEMM_TRUTH = {"launch_s": 4e-6, "bandwidth_fraction": 0.7, "flops_fraction": 0.5, "tile_rows": 16.0, "chain_s": 4e-7}
MOE_TRUTH = {"launch_s": 3e-5, "bandwidth_fraction": 0.6, "flops_fraction": 0.3, "tile_rows": 16.0,
             "routing_evenness": 0.8, "chain_s": 1e-7}  # fmt: skip
MOE_COLUMNS = ["kernel_source", "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts",
               "moe_tp_size", "moe_ep_size", "distribution", "latency_s"]  # fmt: skip
SIZES = st.integers(1, 65_536)


def theta(truth: dict[str, float]) -> np.ndarray[Any, Any]:
    return np.log(list(truth.values()))


def write(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def one(*values: float) -> tuple[np.ndarray[Any, Any], ...]:
    return tuple(np.array([float(value)]) for value in values)


def moe_shape(tokens: float, **changed: float) -> dict[str, np.ndarray[Any, Any]]:
    shape = {"num_tokens": tokens, "hidden_size": 4096, "inter_size": 1536, "topk": 8, "num_experts": 128,
             "moe_tp_size": 1, "moe_ep_size": 1} | changed  # fmt: skip
    return {name: np.array([float(value)]) for name, value in shape.items()}


def test_a_product_at_peak_takes_its_weights_and_nothing_else() -> None:
    # 8,192 × 8,192 in 16 bits at 70% of 4.8 TB/s: 39.9 µs; one token hides its FLOPs, 8 × 0.4 µs of chain and the rest
    seconds = float(gemm_s(theta(GEMM_TRUTH), *one(1, 8192, 8192), "bfloat16", H200)[0])
    assert seconds == pytest.approx(4e-6 + 2 * 8192**2 / (0.7 * 4.8e12), rel=0.02)


@given(SIZES, SIZES, SIZES, st.sampled_from(["m", "n", "k"]), st.sampled_from(["bfloat16", "fp8_block"]))
def test_larger_products_are_never_faster(m: int, n: int, k: int, grown: str, dtype: str) -> None:
    sizes = {"m": m, "n": n, "k": k}
    base = gemm_s(theta(GEMM_TRUTH), *one(*sizes.values()), dtype, H200)
    sizes[grown] *= 2
    assert gemm_s(theta(GEMM_TRUTH), *one(*sizes.values()), dtype, H200) >= base * (1 - 1e-12)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_more_tokens_never_make_experts_faster(tokens: int, more: int) -> None:
    few, many = (moe_s(theta(MOE_TRUTH), moe_shape(t), "fp8", H200) for t in (tokens, tokens + more))
    assert many >= few * (1 - 1e-12)


def test_a_gemm_kernel_is_found_again(tmp_path: Path) -> None:
    shapes = [
        (m, n, k) for m in (1, 4, 16, 64, 256, 1024, 4096) for n in (1024, 4096, 14336) for k in (1024, 4096, 8192)
    ]
    seconds = [gemm_s(theta(GEMM_TRUTH), *one(*shape), "fp8", H200)[0] for shape in shapes]
    rows = [["k", "fp8", *shape, float(s)] for shape, s in zip(shapes * 2, seconds * 2, strict=True)]
    path = write(tmp_path / "t.csv.gz", ["kernel_source", "gemm_dtype", "m", "n", "k", "latency_s"], rows)
    entry = gemm_document(path, ABOUT, H200)["entries"]["fp8"]
    assert entry["residuals"]["held_out_median_error"] < 0.01
    for name in ("launch_s", "bandwidth_fraction", "flops_fraction"):
        assert entry["parameters"][name]["value"] == pytest.approx(GEMM_TRUTH[name], rel=0.1)


def test_the_skew_of_a_moe_kernel_is_found_again(tmp_path: Path) -> None:
    rows = []
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        for experts, hidden, inter in ((128, 4096, 1536), (256, 7168, 2048), (64, 2048, 1408)):
            for ep in (1, 2, 4, 8):
                shape = moe_shape(tokens, num_experts=experts, hidden_size=hidden, inter_size=inter, moe_ep_size=ep)
                seconds = float(moe_s(theta(MOE_TRUTH), shape, "fp8", H200)[0])
                rows.append(["k", "fp8", tokens, hidden, inter, 8, experts, 1, ep, "power_law_1.2", seconds])
    document = moe_document(write(tmp_path / "t.csv.gz", MOE_COLUMNS, rows), ABOUT, H200)
    parameters = document["entries"]["k/fp8/power_law_1.2"]["parameters"]
    assert parameters["routing_evenness"]["value"] == pytest.approx(0.8, rel=0.15)
    assert parameters["bandwidth_fraction"]["value"] == pytest.approx(0.6, rel=0.1)


def test_shipped_fits_are_valid_and_say_how_wrong_they_are() -> None:
    """Held out by geometry: products within 16% in the median, experts within 36%; none outruns the datasheet."""
    for kind, count, worst, names in (("gemm", 5, 0.16, GEMM), ("moe", 4, 0.36, MOE)):
        shipped = [name for name in profiles.names("calibrations") if name.startswith(f"{kind}-")]
        assert len(shipped) == count
        for name in shipped:
            document = profiles.load("calibrations", name)
            check_other(document, name)
            found = find(kind, document["gpu"], document["engine"])
            assert found is not None and found.name == name
            for entry in document["entries"].values():
                assert set(entry["parameters"]) == {p.name for p in names}
                assert 0 < entry["residuals"]["held_out_median_error"] < worst
                assert entry["parameters"]["bandwidth_fraction"]["value"] <= 1
                assert entry["parameters"]["flops_fraction"]["value"] <= 1


def test_kernels_under_power_law_routing_touch_as_few_experts_as_serving_does() -> None:
    """Two independent sources: Triton and CUTLASS kernels timed under skewed routing, and whole deployments."""
    serving = profiles.load("calibrations", "serving")["common"]["routing_evenness"]
    kernels = [
        entry["parameters"]["routing_evenness"]["value"]
        for name in ("moe-h100-sxm-vllm", "moe-h200-vllm", "moe-b200-vllm")
        for label, entry in profiles.load("calibrations", name)["entries"].items()
        if "fused_moe" in label and "power_law" in label
    ]
    assert len(kernels) == 18
    assert 0.5 * min(kernels) < serving < 2 * max(kernels)


def test_the_same_table_gives_the_shipped_file(data: Path) -> None:
    path = data / "all_reduce" / "h200_sxm-vllm-0.19.0.csv.gz"
    derived = json.loads(json.dumps(derive_other(path, "all_reduce")))
    shipped = profiles.load("calibrations", "all-reduce-h200-vllm")
    for label, entry in shipped["entries"].items():
        for name, item in entry["parameters"].items():
            assert derived["entries"][label]["parameters"][name]["value"] == pytest.approx(item["value"], rel=1e-3)


def test_a_folder_without_tables_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--data", str(tmp_path), "--kind", "gemm", "--out", str(tmp_path / "out")])
    assert code == 2 and "no tables" in capsys.readouterr().err
