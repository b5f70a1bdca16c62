"""What a device offers a run, and how the device is chosen."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kvplan.errors import InputError, MissingDependencyError, shorten
from kvplan.measure.family import Family
from kvplan.measure.plan import Cell

if TYPE_CHECKING:
    from kvplan.measure.step_plan import StepModel

DEVICES = ("auto", "cuda", "cpu")
INSTALL = "pip install 'kvplan[measure]'"


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a run is taken and with what. None: not known.

    Attributes:
        kind: ``cuda``, ``rocm`` or ``cpu``.
        gpu: the name of the profile of this GPU, or one made from the device's own name.
        profile: whether ``gpu`` is a profile that ships.

    """

    kind: str
    gpu: str
    profile: bool
    device_name: str
    architecture: str | None
    memory_bytes: int
    num_sms: int | None
    l2_cache_bytes: int | None
    driver: str | None
    max_sm_clock_hz: float | None
    memory_clock_hz: float | None
    power_limit_w: float | None
    torch: str
    triton: str | None
    kvplan: str
    python: str

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def brief(self) -> dict[str, Any]:
        """What each sample carries."""
        names = ("gpu", "device_name", "driver", "torch", "triton", "kvplan")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one call: median and percentiles over ``num_replays``; how the cache lay and what ran."""

    latency_s: float
    p10_s: float
    p90_s: float
    num_replays: int
    read_bytes: int
    sm_clock_hz: float | None
    layout: str
    block_size_tokens: int
    kernel_facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RooflinePoint:
    """Bytes read once by the plainest kernel, and how long it took."""

    read_bytes: int
    latency_s: float

    @property
    def bytes_per_s(self) -> float:
        """Read rate."""
        return self.read_bytes / self.latency_s


@dataclass(frozen=True, slots=True)
class Gate:
    """A family against the float64 reference on the same codes, and against unquantised data.

    Attributes:
        error: largest relative error of an output row, None where a row is not finite; ``tolerance`` is what it may be.
        format_error: relative L2 error of the output against attention over the values before they were quantised
            (standard normal K and V): what the format costs, kernel included.

    """

    kv_dtype: str
    scale_granularity: str
    shape: str
    error: float | None
    tolerance: float
    format_error: float | None

    @property
    def passed(self) -> bool:
        """Whether the family may be timed."""
        return self.error is not None and self.error <= self.tolerance


def finite(value: float) -> float | None:
    """``value``, or None where it is infinite or not a number."""
    return value if math.isfinite(value) else None


class CellOutOfMemory(Exception):
    """The device has no memory left for a cell; the run goes on with the next one."""


class KernelFailure(Exception):
    """A kernel did not compile or run; the message is its first line."""


class Backend(Protocol):
    """A device to measure. Everything it raises on purpose is ``CellOutOfMemory`` or ``KernelFailure``."""

    @property
    def environment(self) -> Environment:
        """Where and with what."""

    @property
    def defaults(self) -> Defaults:
        """What to measure when the caller does not say."""

    def free_bytes(self) -> int:
        """Memory left for caches."""

    def estimate_s(self, cell: Cell, replays: int) -> float:
        """Roughly how long ``time`` takes; the run corrects it by what it sees."""

    def read_roofline(self) -> list[RooflinePoint]:
        """The best read rate of the device, at several sizes."""

    def gate(self, family: Family, seed: int) -> Gate:
        """Compare the family's kernel with the reference."""

    def time(self, cell: Cell, *, replays: int, seed: int, tune: bool) -> Timed:
        """Time a cell; ``tune`` picks the best of a few kernel configurations first."""

    def open_step(self, model: StepModel, seed: int) -> StepTimer:
        """Fill the weights of a model; times whole decode steps of it."""

    def peer_missing(self, name: str) -> str | None:
        """Why the peer ``name`` cannot be timed here; None when it can be tried."""

    def time_peer(self, name: str, cell: Cell, *, replays: int, seed: int) -> Timed:
        """Time another implementation on a cell: ``torch`` on a dense 16-bit cache, the rest on the cell's own."""


class StepTimer(Protocol):
    """Times whole decode steps of one model; raises what a backend raises."""

    def time(self, family: Family, batch: int, context: int, *, layers: int, replays: int) -> Timed:
        """One step over ``layers`` distinct caches."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Shapes and sizes that suit a device, bytes of a 16-bit weight in whole steps, seconds that setting up takes."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    batch_sizes: tuple[int, ...]
    quick_contexts: tuple[int, ...]
    thorough_contexts: tuple[int, ...]
    step_contexts: tuple[int, ...]
    step_bytes_per_weight: int
    max_layers: int
    setup_s: float
    family_s: float


def open_backend(device: str) -> Backend:
    """The backend for ``--device``.

    Raises:
        InputError: no such device.
        MissingDependencyError: torch or triton is not installed, or there is no GPU.

    """
    if device not in DEVICES:
        raise InputError(f"--device {shorten(device, 20)!r} is not one of {', '.join(DEVICES)}")
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("kvplan measure needs torch, which is not installed", hint=INSTALL)
    if device == "cpu":
        from kvplan.measure.cpu import CpuBackend

        return CpuBackend()
    import torch

    if not torch.cuda.is_available():
        raise MissingDependencyError(
            f"no GPU found: looked for a CUDA device through torch {torch.__version__}",
            hint=f"--device cpu runs the same steps on the torch reference; a build of torch with CUDA: {INSTALL}",
        )
    if importlib.util.find_spec("triton") is None:
        raise MissingDependencyError("the GPU kernels need triton, which is not installed", hint=INSTALL)
    from kvplan.measure.cuda import CudaBackend

    return CudaBackend()
