"""What changed between vLLM versions that moves a KV capacity, by the first version that has it.

Read from released wheels 0.17 to 0.33; where a change fell between two wheels that were read, the later is named.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplan.gpu import GpuSpec
from kvplan.units import GIB

OLDEST_READ, CURRENT = (0, 17), (0, 33)
CHECKPOINTS_SINCE = {"mamba2": (0, 32), "gdn": (0, 33)}
"""First versions whose layers of a state set ``num_prefill_checkpoint_blocks`` (read in wheels 0.29 to 0.33)."""


@dataclass(frozen=True)
class VersionRules:
    """The formulas of one version.

    Attributes:
        request_based_tokens: logged tokens are ``int(max_concurrency × max_model_len)``; before, ``num_blocks // groups
            × block`` (0.20.0 has the old form, a log of 0.20.2 the new).
        async_in_flight: windows reserve the tokens of all batches in flight; before, of one (0.24 old, 0.26 new).
        reserves_null_block: the start-up check leaves the null block out (0.26 no, 0.29 yes).
        large_gpu_tier: 16,384 batched tokens from 160 GiB on (0.26 no, 0.29 yes).
        hybrid_prefix_caching: prefix caching is on by default for hybrids (0.23 off, 0.26 on).
        subtracts_graphs: the CUDA-graph estimate is taken off the KV budget (since 0.21).
        default_fraction: ``gpu_memory_utilization`` (0.19 has 0.90, 0.20 has 0.92).

    """

    version: tuple[int, ...]

    @property
    def nearest_read(self) -> tuple[int, ...] | None:
        """The version whose wheel stands in for one that was not read; None where this one was."""
        near = min(max(self.version[:2], OLDEST_READ), CURRENT)
        return None if self.version[:2] == near else near

    @property
    def request_based_tokens(self) -> bool:  # noqa: D102
        return self.version >= (0, 20, 2)

    @property
    def async_in_flight(self) -> bool:  # noqa: D102
        return self.version >= (0, 25)

    @property
    def reserves_null_block(self) -> bool:  # noqa: D102
        return self.version >= (0, 27)

    @property
    def large_gpu_tier(self) -> bool:  # noqa: D102
        return self.version >= (0, 27)

    def keeps_checkpoints(self, family: str) -> bool:
        """Whether prefix caching of these states may hold a checkpoint block: KDA's 0.26 no, 0.29 yes."""
        return self.version >= CHECKPOINTS_SINCE.get(family, (0, 27))

    @property
    def hybrid_prefix_caching(self) -> bool:  # noqa: D102
        return self.version >= (0, 24)

    @property
    def subtracts_graphs(self) -> bool:  # noqa: D102
        return self.version >= (0, 21)

    @property
    def default_fraction(self) -> float:  # noqa: D102
        return 0.92 if self.version >= (0, 20) else 0.9

    def default_batched_tokens(self, gpu: GpuSpec | None) -> int:
        """``max_num_batched_tokens`` of the API server (``engine/arg_utils.py``); an unknown GPU is taken for 80 GiB.

        ≥ 160 GiB 16,384; ≥ 70 GiB and not an A100 8,192; else 2,048.
        """
        if gpu is None:
            return 8192
        if self.large_gpu_tier and gpu.memory_bytes >= 160 * GIB:
            return 16384
        return 8192 if gpu.memory_bytes >= 70 * GIB and "a100" not in gpu.name else 2048

    def default_num_seqs(self, gpu: GpuSpec | None) -> int:
        """``max_num_seqs``: 1,024 from 70 GiB on and not an A100, else 256."""
        return 1024 if self.default_batched_tokens(gpu) > 2048 else 256

    def tokens_in_flight(self, batched_tokens: int, pp_size: int) -> int:
        """F: tokens scheduled and not settled; one batch per pipeline stage and one more under async scheduling."""
        return batched_tokens * (pp_size + 1) if self.async_in_flight else batched_tokens
