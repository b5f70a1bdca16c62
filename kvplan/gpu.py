"""GPUs: memory as the driver reports it, bandwidth, compute, and what their architecture can store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from kvplan import profiles
from kvplan.errors import MissingDependencyError, ProfileError, UnknownNameError
from kvplan.units import format_gib

SCHEMA_VERSION = 1
LOCAL = "local"


@dataclass(frozen=True)
class GpuSpec:
    """One GPU model.

    Attributes:
        architecture: compute capability as ``sm90``, or ``gfx942`` on AMD; None when unknown.
        memory_bytes: total device memory programs see.
        memory_bandwidth_bytes_per_s: peak, from the datasheet.
        dense_flops_per_s: dense peak per dtype (``bf16``, ``fp8`` …); None where the hardware has no such unit.
        link_bytes_per_s: one direction of the GPU-to-GPU link.
        facts: field → where the figure comes from; a ``caveat`` of the memory says how it is not what programs see.
        smi_memory_bytes: the total that ``nvidia-smi`` shows, a little more; None where it is the same or not known.

    """

    name: str
    display_name: str
    vendor: str
    architecture: str | None
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float | None = None
    dense_flops_per_s: Mapping[str, float | None] = field(default_factory=dict)
    l2_cache_bytes: int | None = None
    num_sms: int | None = None
    link_kind: str | None = None
    link_bytes_per_s: float | None = None
    link_max_gpus: int | None = None
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    smi_memory_bytes: int | None = None

    @property
    def reported_memory_bytes(self) -> int:
        """The total that the driver's tools report, by which some engines set their defaults."""
        return self.smi_memory_bytes or self.memory_bytes

    @property
    def sm(self) -> int | None:
        """Compute capability as an integer (90, 100, 120), or None."""
        text = self.architecture or ""
        return int(text[2:]) if text.startswith("sm") and text[2:].isdigit() else None


def gpu_names() -> list[str]:
    """Every bundled GPU, sorted by name."""
    return list(profiles.names("gpus"))


def resolve_gpu(name: str, *, instead: str = "") -> GpuSpec:
    """The GPU called ``name`` (name or alias, any case), or this machine's own for ``local``.

    ``instead`` is what the caller takes in place of a name, for the hint.

    Raises:
        UnknownNameError: no such GPU; carries the closest names.
        MissingDependencyError: ``local`` and no NVIDIA driver or no NVML binding.

    """
    if name.strip().lower() == LOCAL:
        return local_gpu()
    key = name.strip().lower().replace(" ", "-")
    found = profiles.find("gpus", key.removeprefix("nvidia-").removeprefix("amd-"))
    if found is None:
        raise UnknownNameError("GPU", name, profiles.index("gpus"), hint=f"`kvplan gpus` lists them{instead}")
    return load_gpu(found)


@cache
def load_gpu(name: str) -> GpuSpec:
    """The bundled profile ``name`` (exact)."""
    return gpu_from_profile(profiles.load("gpus", name), f"GPU profile {name}")


def gpu_from_profile(data: Mapping[str, Any], where: str) -> GpuSpec:
    """A ``GpuSpec`` from a profile's JSON.

    Raises:
        ProfileError: a field is missing, of the wrong type, or impossible; the message names it.

    """
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ProfileError(f"{where}: schema_version must be {SCHEMA_VERSION}")
    links = data.get("links") or {}
    return GpuSpec(
        name=_text(data, "name", where),
        display_name=_text(data, "display_name", where),
        vendor=_text(data, "vendor", where),
        architecture=data.get("architecture"),
        memory_bytes=int(_positive(data, "memory_bytes", where, 2**50) or 0),
        memory_bandwidth_bytes_per_s=_positive(data, "memory_bandwidth_bytes_per_s", where, 1e15, optional=True),
        dense_flops_per_s=dict(data.get("dense_flops_per_s") or {}),
        l2_cache_bytes=_whole(_positive(data, "l2_cache_bytes", where, 2**40, optional=True)),
        num_sms=_whole(_positive(data, "num_sms", where, 2**16, optional=True)),
        link_kind=links.get("kind"),
        link_bytes_per_s=_positive(links, "bandwidth_bytes_per_s", where, 1e15, optional=True),
        link_max_gpus=_whole(_positive(links, "max_gpus", where, 2**16, optional=True)),
        facts=data.get("facts") or {},
        smi_memory_bytes=_whole(_positive(data, "smi_memory_bytes", where, 2**50, optional=True)),
    )


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value:
        raise ProfileError(f"{where}: {key} must be text")
    return value


def _positive(data: Mapping[str, Any], key: str, where: str, high: float, optional: bool = False) -> float | None:
    value = data.get(key)
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
        raise ProfileError(f"{where}: {key} must be a positive number up to {high:g}")
    return float(value)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def custom_gpu(memory_bytes: int) -> GpuSpec:
    """A GPU of which only the memory is known (``--gpu-memory``)."""
    return GpuSpec(
        name=f"custom-{format_gib(memory_bytes).replace(' ', '')}",
        display_name=f"GPU with {format_gib(memory_bytes)}",
        vendor="unknown",
        architecture=None,
        memory_bytes=memory_bytes,
        facts={"memory_bytes": {"source": "--gpu-memory"}},
    )


def local_gpu() -> GpuSpec:
    """The first GPU of this machine, read through NVML (``nvidia-ml-py``).

    Raises:
        MissingDependencyError: no binding, no driver or no GPU.

    """
    looked = "looked for an NVIDIA GPU through NVML"
    hint = "name one with --gpu (`kvplan gpus` lists them) or give --gpu-memory 80GiB"
    try:
        import pynvml
    except ImportError as error:
        raise MissingDependencyError(
            f"--gpu local: {looked}, but nvidia-ml-py is not installed", hint=f"pip install 'kvplan[nvml]', or {hint}"
        ) from error
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except Exception as error:  # pynvml raises its own class per failure
        raise MissingDependencyError(f"--gpu local: {looked}, found none ({error})", hint=hint) from error
    shown = name.decode() if isinstance(name, bytes) else str(name)
    known = profile_of_device(shown, total)
    facts = {"memory_bytes": {"source": "NVML on this machine"}}
    if known is None:
        return GpuSpec(LOCAL, shown, "nvidia", f"sm{major}{minor}", total, facts=facts)
    from dataclasses import replace

    return replace(
        known,
        memory_bytes=total,
        smi_memory_bytes=None,
        architecture=f"sm{major}{minor}",
        facts={**known.facts, **facts},
    )


def profile_of_device(device: str, memory_bytes: int) -> GpuSpec | None:
    """The bundled profile whose device name and memory match what the driver says."""
    words = device.lower().replace("nvidia", "").replace("-", " ").split()
    best: tuple[int, GpuSpec] | None = None
    for name in gpu_names():
        spec = load_gpu(name)
        if abs(spec.memory_bytes - memory_bytes) > 0.06 * memory_bytes:
            continue
        score = sum(word in spec.display_name.lower().replace("-", " ").split() for word in words)
        if score and (best is None or score > best[0]):
            best = (score, spec)
    return best[1] if best else None
