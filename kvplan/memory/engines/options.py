"""What a rule set is told, after defaults: plain values, no engine in them."""

from __future__ import annotations

from dataclasses import dataclass

from kvplan.gpu import GpuSpec


@dataclass(frozen=True)
class MemoryFraction:
    """An engine's memory fraction and how it comes about: a formula with numbers, and rules as in ``CachePlan``."""

    value: float
    formula: str = ""
    rules: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class EngineOptions:
    """Options of one engine instance.

    ``version`` is a tuple such as ``(0, 33)``, or None for the rule set's own; ``ep`` says that experts are dealt whole
    to all ranks; ``tokens_in_flight`` is what vLLM calls ``max_in_flight_tokens``; ``batched_tokens`` is a stated
    ``max_num_batched_tokens``, 0 where none is; ``gpu`` is None when only the model's needs are asked for;
    ``running_limit`` is a stated ``max_num_seqs``, ``longest_tokens`` the longest request the server is told of; ratios
    of pools are SGLang's, ``kv_bytes`` the KV memory of one GPU where a pool of states depends on it.
    """

    kv_cache_dtype: str
    gpu: GpuSpec | None
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    dcp_size: int = 1
    ep: bool = False
    block_size_tokens: int | None = None
    enable_prefix_caching: bool = True
    tokens_in_flight: int = 0
    batched_tokens: int = 0
    max_num_seqs: int = 1024
    running_limit: int | None = None
    longest_tokens: int = 0
    kv_bytes: int | None = None
    swa_full_tokens_ratio: float | None = None
    mamba_full_memory_ratio: float | None = None
    version: tuple[int, ...] | None = None

    @property
    def sm(self) -> int | None:
        """CUDA compute capability (90 for Hopper), None when unknown or not NVIDIA."""
        return self.gpu.sm if self.gpu is not None else None

    @property
    def is_sm100_family(self) -> bool:
        """Datacentre Blackwell: B200, B300, GB200, GB300."""
        return self.sm is not None and 100 <= self.sm < 120
