"""What the kernels have to know of the GPU they run on, and of their own compiled code."""

import math
from dataclasses import dataclass

import torch
import triton

from .unpack import BITS, PLAIN, PTX

QUARTERS = 4
"""Partitions of a multiprocessor, each with a scheduler, to which warps are dealt for good."""
REGISTERS_PER_QUARTER = 16384
"""A warp's registers lie in one partition."""
CTA_RESERVED_SHARED_BYTES = 1024
TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2])
GLUON = TRITON >= (3, 6)
"""Whether Triton has the Gluon that kernels are written in, and launches before the last one has ended."""
MAX_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48}
MAX_CTAS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 103: 32, 120: 24}
SHARED_BYTES_PER_SM = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 103: 233472, 120: 102400}
"""Per multiprocessor: CUDA C++ Programming Guide, technical specifications per compute capability."""


def interpreting() -> bool:
    """True when Triton runs kernels in its CPU interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device | str) -> int | None:
    """Compute capability as an int (90 for sm_90); None on a CPU or under ROCm."""
    if torch.device(device).type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def unpack_mode(arch: int | None) -> int:
    """How 8-bit codes become float16 on `arch` (see `unpack`)."""
    if arch is None or interpreting():
        return PLAIN
    return PTX if arch >= 89 else BITS


def dependent_launch(arch: int | None) -> bool:
    """Whether kernels on `arch` may be launched while the one before them ends ("programmatic dependent launch")."""
    return arch is not None and arch >= 90 and GLUON and not interpreting()


@dataclass(frozen=True)
class KernelFacts:
    """Resources of one compiled kernel. `spills` counts spilled 4-byte registers a thread; None: not known."""

    name: str
    num_warps: int
    registers: int | None
    spills: int | None
    shared_bytes: int

    def fitting_per_sm(self, arch: int) -> int:
        """Programs that fit on one multiprocessor at a time by registers, shared memory and warps."""
        by_shared = SHARED_BYTES_PER_SM.get(arch, 102400) // (self.shared_bytes + CTA_RESERVED_SHARED_BYTES)
        by_warps = MAX_WARPS.get(arch, 48) // self.num_warps
        rounded = -(-(self.registers or 255) // 8) * 8
        by_registers = QUARTERS * (REGISTERS_PER_QUARTER // (rounded * 32)) // self.num_warps
        return max(1, min(by_shared, by_warps, by_registers, MAX_CTAS.get(arch, 16)))

    def ctas_per_sm(self, arch: int) -> int:
        """Programs that a multiprocessor shall hold: of small ones as many as give every scheduler as many warps.

        Equal work on unequal schedulers lasts as long as on the fullest (measured on an H200: 5 programs of one warp
        are slower than 4).
        """
        fitting = self.fitting_per_sm(arch)
        even = QUARTERS // math.gcd(QUARTERS, self.num_warps)
        return fitting - fitting % even if fitting > even else fitting


def loaded_facts(compiled: object) -> KernelFacts:
    """Facts of a kernel compiled for the GPU at hand; loads it."""
    compiled._init_handles()
    meta = compiled.metadata
    return KernelFacts(compiled.name, meta.num_warps, compiled.n_regs, compiled.n_spills, meta.shared)


def launches_evenly(facts: KernelFacts | None, arch: int | None, limit_per_sm: int | None = None) -> bool:
    """Whether a multiprocessor has room for whole launches only: for one (`resident_ctas`), or the next one as well.

    Where it has room for a part, the next launch's programs come up unevenly: fp8 of one sequence took 76 us on an H200
    instead of 71.
    """
    if facts is None or arch is None:
        return False
    planned = min(facts.ctas_per_sm(arch), limit_per_sm or MAX_CTAS.get(arch, 16))
    return facts.fitting_per_sm(arch) % planned == 0


def resident_ctas(
    facts: KernelFacts | None, arch: int | None, device: torch.device, limit_per_sm: int | None = None
) -> int:
    """Programs of a kernel that the whole GPU holds at a time (12 in the interpreter or on unknown hardware)."""
    if facts is None or arch is None:
        return 12
    per_sm = min(facts.ctas_per_sm(arch), limit_per_sm or MAX_CTAS.get(arch, 16))
    return torch.cuda.get_device_properties(device).multi_processor_count * per_sm
