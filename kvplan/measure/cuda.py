"""A CUDA GPU as a device to measure, with kvplan's decode kernels. Clocks, power and compute mode are never changed."""

from __future__ import annotations

import contextlib
import gc
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from kvplan import __version__
from kvplan.errors import shorten
from kvplan.gpu import profile_of_device
from kvplan.kernels.append_kv import append_kv
from kvplan.kernels.bench import decode_attention as plain
from kvplan.kernels.bench import mla_decode as latent
from kvplan.kernels.bench import peers, read_roofline
from kvplan.kernels.bench.choose import MEASURED_TOKENS, choose, default, is_default
from kvplan.kernels.bench.decode_attention import DecodeCell, graph_repeats
from kvplan.kernels.bench.mla_decode import MlaCell
from kvplan.kernels.bench.timing import time_calls
from kvplan.kernels.decode_attention import DecodePlan
from kvplan.kernels.latent_cache import SOFTMAX_SCALE, LatentCache
from kvplan.kernels.mla_decode import MlaPlan
from kvplan.kernels.paged_cache import PagedKvCache
from kvplan.measure.accuracy import Cache, format_error
from kvplan.measure.backend import (
    CellOutOfMemory,
    Defaults,
    Environment,
    Gate,
    KernelFailure,
    RooflinePoint,
    Timed,
    finite,
)
from kvplan.measure.dense_step import Attend, DenseStep
from kvplan.measure.family import Family
from kvplan.measure.plan import MAX_LAYERS, Cell
from kvplan.measure.step_plan import StepModel

DEVICE = "cuda"
BLOCK_SIZE_TOKENS = 64
ACCURACY_TOKENS = 4096
FILL_BYTES_PER_S = 1e11
TYPICAL_READ_BYTES_PER_S = 1e12
"""For the first estimate of a cell's cost only."""
SMI_FIELDS = ("driver_version", "clocks.max.sm", "clocks.mem", "power.limit")


class CudaBackend:
    """The first CUDA (or ROCm) GPU; see ``backend.Backend``."""

    defaults = Defaults(
        num_q_heads=64, num_kv_heads=8, head_dim=128, batch_sizes=(1, 8, 32), quick_contexts=(4096, 16384, 65536),
        thorough_contexts=(2048, 4096, 8192, 16384, 32768, 65536, 131072),
        step_contexts=(2048, 4096, 8192, 16384, 32768, 65536), step_bytes_per_weight=2,
        max_layers=MAX_LAYERS, setup_s=3.0, family_s=2.0,
    )  # fmt: skip

    def __init__(self) -> None:
        self._gated: set[DecodeCell] = set()
        props = torch.cuda.get_device_properties(0)
        rocm = torch.version.hip is not None
        profile = profile_of_device(props.name, props.total_memory)
        smi = {} if rocm else _smi()
        major, minor = torch.cuda.get_device_capability(0)
        slug = re.sub(r"[^a-z0-9]+", "-", props.name.lower()).strip("-")
        self.environment = Environment(
            kind="rocm" if rocm else "cuda",
            gpu=slug if profile is None else profile.name,
            profile=profile is not None,
            device_name=props.name,
            architecture=str(getattr(props, "gcnArchName", "")) if rocm else f"sm{major}{minor}",
            memory_bytes=props.total_memory,
            num_sms=props.multi_processor_count,
            l2_cache_bytes=getattr(props, "L2_cache_size", None),
            driver=smi.get("driver_version"),
            max_sm_clock_hz=_scaled(smi.get("clocks.max.sm"), 1e6),
            memory_clock_hz=_scaled(smi.get("clocks.mem"), 1e6),
            power_limit_w=_scaled(smi.get("power.limit"), 1.0),
            torch=torch.__version__,
            triton=triton.__version__,
            kvplan=__version__,
            python=platform.python_version(),
        )

    def free_bytes(self) -> int:
        """Device memory nobody has taken."""
        _release()
        return int(torch.cuda.mem_get_info()[0])

    def estimate_s(self, cell: Cell, replays: int) -> float:
        """Filling the caches, then warm-up and replays."""
        total = cell.layers * cell.layer_bytes
        replayed = total * int(graph_repeats(total, DEVICE))
        return 0.1 + total / FILL_BYTES_PER_S + (replays + 10) * replayed / TYPICAL_READ_BYTES_PER_S

    def read_roofline(self) -> list[RooflinePoint]:
        """The read kernel's best configuration at each size that the memory has room for."""
        room = int(self.free_bytes() * 0.5)
        sizes = tuple(size for size in read_roofline.SIZES_BYTES if size <= room) or (max(1 << 26, room // 2),)
        with _guarded():
            records = read_roofline.measure(sizes_bytes=sizes, device=DEVICE)
        return [RooflinePoint(int(r["read_bytes"]), float(r["time_s"])) for r in records]

    def gate(self, family: Family, seed: int) -> Gate:
        """The family's kernel on awkward lengths against float64 on the same codes."""
        with _guarded():
            bench = latent if family.shape.latent_dim else plain
            record = bench.gate(_bench_cell(family, (1, 1)), device=DEVICE, seed=seed)
            q_dtype = torch.float16 if family.element == "fp16" else torch.bfloat16
            lost = format_error(family, _attend, device=DEVICE, tokens=ACCURACY_TOKENS, q_dtype=q_dtype, seed=seed)
        return Gate(family.kv_dtype, family.scale_granularity, family.shape.describe(),
                    finite(float(record["error"])), float(record["tolerance"]), finite(lost))  # fmt: skip

    def time(self, cell: Cell, *, replays: int, seed: int, tune: bool) -> Timed:
        """One CUDA graph over the cell's layers; split and combine counted together."""
        decode = _bench_cell(cell.family, (cell.context_tokens,) * cell.batch_size)
        bench = latent if isinstance(decode, MlaCell) else plain
        with _guarded():
            if isinstance(decode, DecodeCell):
                pick = default
                if tune and self.free_bytes() > 4 * MEASURED_TOKENS * cell.family.bytes_per_token:
                    pick = choose
                decode = replace(decode, config=pick(decode, device=DEVICE))
                self._gate_choice(decode, seed)
            r = bench.measure(decode, layers=cell.layers, device=DEVICE, samples=replays, seed=seed)
        names = ("config", "num_chunks", "registers", "spills", "shared_bytes")
        return Timed(float(r["time_s"]), float(r["p10_s"]), float(r["p90_s"]), int(r["samples"]), int(r["read_bytes"]),
                     r["sm_clock_hz"], cell.family.shape.layout, BLOCK_SIZE_TOKENS,
                     {name: r[name] for name in names})  # fmt: skip

    def _gate_choice(self, cell: DecodeCell, seed: int) -> None:
        """Compare with the reference, once, before it is timed, what the gate did not have: batches of one, and
        configurations that are no default.
        """
        chosen = replace(cell, seq_lens=(1,) * min(2, len(cell.seq_lens)))
        if is_default(chosen, DEVICE) or chosen in self._gated:
            return
        record = plain.gate(chosen, device=DEVICE, seed=seed)
        if not record["passed"]:
            raise KernelFailure(
                f"{cell.kv_dtype} with {cell.config}: error {record['error']:.1e}, {record['tolerance']:.0e} allowed"
            )
        self._gated.add(chosen)

    def open_step(self, model: StepModel, seed: int) -> _CudaStep:
        """The model in bf16."""
        return _CudaStep(model, seed)

    def peer_missing(self, name: str) -> str | None:
        """Torch is here; the others where they are installed."""
        return None if name == "torch" else peers.missing(name)

    def time_peer(self, name: str, cell: Cell, *, replays: int, seed: int) -> Timed:
        """Torch's attention in bf16 on a dense cache; another's on the blocks that ours reads."""
        if name != "torch":
            decode = _bench_cell(cell.family, (cell.context_tokens,) * cell.batch_size)
            with _guarded():
                r = peers.measure(name, decode, layers=cell.layers, device=DEVICE, samples=replays, seed=seed)
            return Timed(float(r["time_s"]), float(r["p10_s"]), float(r["p90_s"]), int(r["samples"]),
                         int(r["read_bytes"]), r["sm_clock_hz"], cell.family.shape.layout, BLOCK_SIZE_TOKENS,
                         {"version": r["version"], "error": finite(float(r["error"]))})  # fmt: skip
        from kvplan.measure.torch_peer import dense_calls

        with _guarded():
            calls, read = dense_calls(cell, device=DEVICE, dtype=torch.bfloat16, seed=seed)
            calls = calls * graph_repeats(read * cell.layers, DEVICE)
            timing = time_calls(calls, device=DEVICE, samples=replays)
        return Timed(timing.median_s, timing.p10_s, timing.p90_s, timing.samples, read, timing.sm_clock_hz,
                     "dense", cell.context_tokens, {"dtype": "bfloat16"})  # fmt: skip


class _CudaStep:
    """Whole decode steps on the GPU; see ``backend.StepTimer``."""

    def __init__(self, model: StepModel, seed: int) -> None:
        with _guarded():
            self.step = DenseStep(
                model, device=DEVICE, dtype=torch.bfloat16, make_attend=_planned, append=append_kv, seed=seed
            )

    def time(self, family: Family, batch: int, context: int, *, layers: int, replays: int) -> Timed:
        """One step as one CUDA graph."""
        with _guarded():
            return self.step.time(
                family, batch, context, layers=layers, block_size_tokens=BLOCK_SIZE_TOKENS, replays=replays
            )


def _planned(cache: PagedKvCache, num_q_heads: int, dtype: torch.dtype) -> Attend:
    plan = DecodePlan(cache, num_q_heads=num_q_heads, q_dtype=dtype)
    return lambda q, cache: plan.run(q, cache)


def _bench_cell(family: Family, seq_lens: tuple[int, ...]) -> DecodeCell | MlaCell:
    """The family at these lengths, as the benchmark of its kernel takes it."""
    shape = family.shape
    if shape.latent_dim:
        return MlaCell(seq_lens, family.element, num_heads=shape.num_q_heads, block_size_tokens=BLOCK_SIZE_TOKENS)
    return DecodeCell(
        seq_lens, family.element, family.scale_granularity, layout=shape.layout, block_size_tokens=BLOCK_SIZE_TOKENS,
        num_kv_heads=shape.num_kv_heads, group_size=shape.group_size, head_dim=shape.head_dim,
        window_tokens=shape.window_tokens,
    )  # fmt: skip


def _attend(q: torch.Tensor, cache: Cache, window_tokens: int | None) -> torch.Tensor:
    plan: DecodePlan | MlaPlan
    if isinstance(cache, LatentCache):
        plan = MlaPlan(cache, num_heads=q.shape[1], softmax_scale=SOFTMAX_SCALE)
    else:
        plan = DecodePlan(cache, num_q_heads=q.shape[1], q_dtype=q.dtype, window_tokens=window_tokens)
    out: torch.Tensor = plan.run(q, cache)
    return out


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Everything that CUDA or Triton raises, as what a backend raises; memory handed back either way."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise CellOutOfMemory(shorten(". ".join(str(error).split(". ")[:2]), 120)) from None
    except (RuntimeError, ValueError, ImportError, triton.TritonError) as error:
        raise KernelFailure(shorten(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", 160)) from error
    finally:
        with contextlib.suppress(RuntimeError):
            _release()


def _smi() -> dict[str, str]:
    """What ``nvidia-smi`` says of the first GPU; nothing where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(SMI_FIELDS, values, strict=False))


def _scaled(text: Any, factor: float) -> float | None:
    try:
        return float(text) * factor
    except (TypeError, ValueError):
        return None
