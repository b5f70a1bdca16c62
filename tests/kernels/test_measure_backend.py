"""The GPU backend of ``kvplan measure``, without a GPU: what it asks of the kernels, in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kvplan.measure import cuda
from kvplan.measure.backend import CellOutOfMemory, KernelFailure
from kvplan.measure.cuda import CudaBackend
from kvplan.measure.family import Family, Shape
from kvplan.measure.plan import Cell

FAMILY = Family(Shape(2, 1, 64), "fp8_per_token_head")
LATENT = Shape(4, 1, 576, latent_dim=512)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "ACCURACY_TOKENS", 100)
    for bench in (cuda.plain, cuda.latent):
        monkeypatch.setattr(bench, "gate", partial(bench.gate, seq_lens=(40, 7)))
    return object.__new__(CudaBackend)


def test_a_gate_compares_the_kernel_with_the_reference_and_the_format_with_what_it_came_from(
    backend: CudaBackend,
) -> None:
    gate = backend.gate(FAMILY, seed=0)
    assert gate.passed
    assert gate.error is not None
    assert gate.format_error is not None
    assert 0 < gate.error < 8e-3 < gate.format_error < 0.06


def test_a_cell_is_timed_and_says_what_ran(backend: CudaBackend) -> None:
    timed = backend.time(Cell(FAMILY, 2, 40), replays=2, seed=0, tune=False)
    assert timed.p10_s <= timed.latency_s <= timed.p90_s
    assert timed.read_bytes == 2 * 40 * FAMILY.bytes_per_token
    assert set(timed.kernel_facts) == {"config", "num_chunks", "registers", "spills", "shared_bytes"}
    assert timed.layout == "HND"


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "fp8_ds_mla"])
def test_latent_attention_is_gated_and_timed_with_its_own_kernel(backend: CudaBackend, kv_dtype: str) -> None:
    family = Family(LATENT, kv_dtype)
    gate = backend.gate(family, seed=0)
    assert gate.passed
    assert gate.shape == "4 query heads on a latent of 512 + 64"
    assert gate.format_error is not None
    assert 0 < gate.format_error < (8e-3 if kv_dtype == "bfloat16" else 0.06)
    timed = backend.time(Cell(family, 2, 40), replays=2, seed=0, tune=True)
    assert timed.read_bytes == 2 * 40 * family.bytes_per_token
    assert set(timed.kernel_facts) == {"config", "num_chunks", "registers", "spills", "shared_bytes"}
    assert timed.layout == "rows"


def test_torch_reads_a_dense_16_bit_cache(backend: CudaBackend) -> None:
    timed = backend.time_peer("torch", Cell(Family(FAMILY.shape, "bfloat16"), 2, 40), replays=2, seed=0)
    assert timed.latency_s > 0
    assert timed.read_bytes == 2 * 40 * 2 * 64 * 2


def test_what_cuda_and_triton_raise_is_told_apart(backend: CudaBackend) -> None:
    with pytest.raises(CellOutOfMemory, match="Tried to allocate"), cuda._guarded():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB. GPU 0 has less")
    with pytest.raises(KernelFailure, match="RuntimeError: CUDA error: an illegal memory access"), cuda._guarded():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")
    with pytest.raises(KernelFailure, match="InterpreterError"), cuda._guarded():
        raise cuda.triton.runtime.errors.InterpreterError("no")


def test_without_nvidia_smi_driver_and_clocks_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert cuda._smi() == {}
    assert cuda._scaled(None, 1e6) is None
    assert cuda._scaled("[N/A]", 1e6) is None
    assert cuda._scaled("1980", 1e6) == 1.98e9
