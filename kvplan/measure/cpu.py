"""The torch reference on a CPU as a device to measure: every step of a run, really timed, at sizes that suit a test."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from kvplan import __version__
from kvplan.errors import shorten
from kvplan.kernels.bench.timing import time_calls
from kvplan.kernels.latent_cache import SOFTMAX_SCALE, LatentCache, random_latent_caches
from kvplan.kernels.paged_cache import PagedKvCache, random_caches
from kvplan.kernels.reference.append_kv import append_kv
from kvplan.kernels.reference.decode_attention import decode_attention, relative_error
from kvplan.kernels.reference.mla_decode import mla_decode
from kvplan.measure.accuracy import Cache, format_error
from kvplan.measure.backend import CellOutOfMemory, Defaults, Environment, Gate, RooflinePoint, Timed, finite
from kvplan.measure.dense_step import Attend, DenseStep
from kvplan.measure.family import Family
from kvplan.measure.plan import Cell
from kvplan.measure.step_plan import StepModel

GATE_LENGTHS = (300, 17, 64, 1)
TOLERANCE = 1e-4
"""Largest relative error of an output row: float32 against float64 on the same codes."""
ACCURACY_TOKENS = 1024
BLOCK_SIZE_TOKENS = 16
READ_SIZES_BYTES = (1 << 24, 1 << 26, 1 << 27)
ELEMENTS_PER_S = 2e8
"""Cached elements the reference gets through in a second, for the first estimate only."""


class CpuBackend:
    """The CPU at hand; see ``backend.Backend``."""

    defaults = Defaults(
        num_q_heads=8, num_kv_heads=2, head_dim=64, batch_sizes=(1, 4), quick_contexts=(256, 512, 1024, 2048),
        thorough_contexts=(256, 512, 1024, 2048, 4096, 8192),
        step_contexts=(64, 128, 256, 512), step_bytes_per_weight=4, max_layers=2, setup_s=0.5, family_s=0.2,
    )  # fmt: skip

    def __init__(self) -> None:
        name = _cpu_name()
        self.environment = Environment(
            kind="cpu",
            gpu="cpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60],
            profile=False,
            device_name=name,
            architecture=platform.machine(),
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            num_sms=torch.get_num_threads(),
            l2_cache_bytes=_last_cache_bytes(),
            driver=None,
            max_sm_clock_hz=None,
            memory_clock_hz=None,
            power_limit_w=None,
            torch=torch.__version__,
            triton=None,
            kvplan=__version__,
            python=platform.python_version(),
        )

    def free_bytes(self) -> int:
        """Memory the system calls available."""
        try:
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        except (OSError, ValueError, IndexError):
            pass
        return self.environment.memory_bytes // 2

    def estimate_s(self, cell: Cell, replays: int) -> float:
        """A guess from the number of elements."""
        elements = cell.batch_size * cell.context_tokens * cell.family.shape.numbers_per_token
        return 0.01 + cell.layers * elements / ELEMENTS_PER_S * (min(replays, 5) + 3)

    def read_roofline(self) -> list[RooflinePoint]:
        """A sum over int64, the plainest read torch has."""
        points = []
        for size in READ_SIZES_BYTES:
            data = torch.ones(size // 8, dtype=torch.int64)
            points.append(RooflinePoint(size, time_calls([data.sum], device="cpu").median_s))
        return points

    def gate(self, family: Family, seed: int) -> Gate:
        """Float32 against float64 on the same codes."""
        cache = _caches(family, list(GATE_LENGTHS), 1, seed)[0]
        q = _queries(family, len(GATE_LENGTHS), seed)
        window = family.shape.window_tokens
        out = self.attend(q, cache, window)
        error = relative_error(out, _reference(q, cache, window, torch.float64))
        lost = format_error(family, self.attend, device="cpu", tokens=ACCURACY_TOKENS, q_dtype=torch.float32, seed=seed)
        return Gate(family.kv_dtype, family.scale_granularity, family.shape.describe(), finite(error), TOLERANCE,
                    finite(lost))  # fmt: skip

    def time(self, cell: Cell, *, replays: int, seed: int, tune: bool) -> Timed:
        """Rounds over the layers, one call each; there is nothing to tune."""
        window = cell.family.shape.window_tokens
        try:
            caches = _caches(cell.family, [cell.context_tokens] * cell.batch_size, cell.layers, seed)
            q = _queries(cell.family, cell.batch_size, seed)
            calls = [lambda cache=cache: self.attend(q, cache, window) for cache in caches]
            timing = time_calls(calls, device="cpu", samples=replays)
        except (MemoryError, RuntimeError) as error:
            raise _out_of_memory(error) from error
        return Timed(
            timing.median_s, timing.p10_s, timing.p90_s, timing.samples, cell.read_bytes, None,
            cell.family.shape.layout, BLOCK_SIZE_TOKENS, {"name": "torch reference, float32"},
        )  # fmt: skip

    def peer_missing(self, name: str) -> str | None:
        """Only torch runs on a CPU."""
        return None if name == "torch" else "it needs a CUDA GPU"

    def time_peer(self, name: str, cell: Cell, *, replays: int, seed: int) -> Timed:
        """Torch's attention in float32: 16-bit is not what CPUs are fast at."""
        from kvplan.measure.torch_peer import dense_calls

        try:
            calls, read = dense_calls(cell, device="cpu", dtype=torch.float32, seed=seed)
            timing = time_calls(calls, device="cpu", samples=replays)
        except (MemoryError, RuntimeError) as error:
            raise _out_of_memory(error) from error
        return Timed(timing.median_s, timing.p10_s, timing.p90_s, timing.samples, read, None, "dense",
                     cell.context_tokens, {"dtype": "float32"})  # fmt: skip

    def open_step(self, model: StepModel, seed: int) -> _CpuStep:
        """The model in float32, attention and append as their references."""
        return _CpuStep(self, model, seed)

    def attend(self, q: torch.Tensor, cache: Cache, window_tokens: int | None) -> torch.Tensor:
        """What is timed."""
        return _reference(q, cache, window_tokens, torch.float32)


class _CpuStep:
    """Whole decode steps on the CPU; see ``backend.StepTimer``."""

    def __init__(self, backend: CpuBackend, model: StepModel, seed: int) -> None:
        def make_attend(cache: PagedKvCache, num_q_heads: int, dtype: torch.dtype) -> Attend:
            return lambda q, cache: backend.attend(q, cache, None)

        try:
            self.step = DenseStep(
                model, device="cpu", dtype=torch.float32, make_attend=make_attend, append=append_kv, seed=seed
            )
        except (MemoryError, RuntimeError) as error:
            raise _out_of_memory(error) from error

    def time(self, family: Family, batch: int, context: int, *, layers: int, replays: int) -> Timed:
        """One step, called and timed in rounds."""
        try:
            return self.step.time(
                family, batch, context, layers=layers, block_size_tokens=BLOCK_SIZE_TOKENS, replays=replays
            )
        except (MemoryError, RuntimeError) as error:
            raise _out_of_memory(error) from error


def _caches(family: Family, seq_lens: list[int], layers: int, seed: int) -> list[Cache]:
    if family.shape.latent_dim:
        return list(random_latent_caches(
            seq_lens, kv_dtype=family.element, block_size_tokens=BLOCK_SIZE_TOKENS, num_layers=layers, device="cpu",
            seed=seed,
        ))  # fmt: skip
    return list(random_caches(
        seq_lens, kv_dtype=family.element, scale_granularity=family.scale_granularity, device="cpu",
        block_size_tokens=BLOCK_SIZE_TOKENS, num_kv_heads=family.shape.num_kv_heads, head_dim=family.shape.head_dim,
        num_layers=layers, seed=seed,
    ))  # fmt: skip


def _reference(q: torch.Tensor, cache: Cache, window_tokens: int | None, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(cache, LatentCache):
        return mla_decode(q, cache, softmax_scale=SOFTMAX_SCALE, dtype=dtype)
    return decode_attention(q, cache, window_tokens=window_tokens, dtype=dtype)


def _queries(family: Family, batch: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, family.shape.num_q_heads, family.shape.head_dim, generator=generator)


def _out_of_memory(error: Exception) -> Exception:
    text = str(error).lower()
    if isinstance(error, MemoryError) or "memory" in text or "alloc" in text:
        return CellOutOfMemory(shorten(str(error) or "out of memory", 100))
    return error


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except (OSError, IndexError):
        pass
    return platform.processor() or platform.machine()


def _last_cache_bytes() -> int | None:
    for index in (3, 2):
        try:
            text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size").read_text().strip()
            return int(text.rstrip("KM")) * {"K": 1024, "M": 1024**2}.get(text[-1], 1)
        except (OSError, ValueError, IndexError):
            continue
    return None
