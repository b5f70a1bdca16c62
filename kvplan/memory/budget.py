"""From a GPU's memory to the bytes left for the KV cache, term by term, each with its source.

vLLM: ``ceil(total × utilisation) − weights − activation peak − CUDA graphs − other`` (``v1/worker/gpu_worker.py``
``determine_available_memory``). SGLang: ``(total − other) × mem-fraction-static − weights``, other being what is taken
before weights are loaded (``mem_cache/kv_cache_configurator.py`` ``_profile_available_bytes``). TensorRT-LLM:
``fraction × free``.
Activations, graphs and other memory depend on kernels and drivers and are estimates (``assumed``); each has a flag.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from kvplan.gpu import GpuSpec
from kvplan.memory.engines import Engine
from kvplan.memory.engines.options import MemoryFraction
from kvplan.memory.request import Source
from kvplan.model_config.types import ModelConfig
from kvplan.units import MIB, ceil_div, format_gib
from kvplan.weights import WeightBytes

GRAPH_BYTES_PER_LAYER = 14 * MIB
GRAPH_BYTES_BASE = 128 * MIB
CONTEXT_BYTES = 600 * MIB
COLLECTIVE_BYTES = 500 * MIB
SAMPLER_COPIES = 2


@dataclass(frozen=True)
class Term:
    """One term of the budget, in bytes on one GPU."""

    value_bytes: int | None
    source: Source | None
    detail: str
    override: str


@dataclass(frozen=True)
class Budget:
    """Memory of one GPU, in the order it is taken: usable − weights − activation − graphs − overhead = KV.

    ``kv_is_set`` says that KV bytes were given, or a fraction for weights and KV alone: the engine takes them as they
    are, room or not for the rest.
    """

    total: Term
    usable: Term
    weights: Term
    activation: Term
    graphs: Term
    overhead: Term
    kv_cache: Term
    kv_is_set: bool

    @property
    def kv_bytes(self) -> int | None:
        """Bytes for the KV cache; None when no GPU was named."""
        return self.kv_cache.value_bytes

    @property
    def excess_bytes(self) -> int:
        """What KV bytes that were set are, with all the rest, beyond the GPU's memory; 0 where not known to be."""
        total, kv = self.total.value_bytes, self.kv_bytes
        if total is None or kv is None or kv <= 0 or not self.kv_is_set:
            return 0
        rest = (self.weights, self.activation, self.graphs, self.overhead)
        return max(kv + sum(term.value_bytes or 0 for term in rest) - total, 0)

    @property
    def room_bytes(self) -> int | None:
        """Bytes for requests: those of KV, or, below 0, what is missing where the engine runs out of memory at once."""
        return -self.excess_bytes if self.excess_bytes else self.kv_bytes


@dataclass(frozen=True)
class BudgetInputs:
    """What the budget is made of besides the model: the engine's options and the user's overrides.

    ``num_ranks`` are those of one server, which talk to each other; ``ep`` says that they send tokens to experts.
    """

    gpu: GpuSpec | None
    engine: Engine
    fraction: MemoryFraction
    fraction_given: bool
    batched_tokens: int
    num_seqs: int
    tp_size: int
    num_ranks: int
    ep: bool = False
    subtracts_graphs: bool = True
    kept_share: float = 1.0
    table_bytes: int = 0
    num_layers: int = 0
    version: str = ""
    version_read: bool = True
    kv_cache_memory_bytes: int | None = None
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    graph_bytes: int | None = None
    overhead_bytes: int | None = None


def memory_budget(model: ModelConfig | None, weights: WeightBytes | None, inputs: BudgetInputs) -> Budget:
    """The budget of one GPU. Terms that cannot be known are None, and so is the result when the total is."""
    total = _total(inputs.gpu)
    activation = _given(inputs.activation_bytes, "--activation-memory") or _activation(model, inputs)
    graphs = _given(inputs.graph_bytes, "--graph-memory") or _graphs(inputs)
    overhead = _given(inputs.overhead_bytes, "--overhead-memory") or _overhead(inputs)
    weight = _given(inputs.weights_bytes, "--weights-memory") or _weights(weights)
    others = (weight.value_bytes or 0) + (activation.value_bytes or 0) + (graphs.value_bytes or 0)
    others += overhead.value_bytes or 0
    usable = _usable(inputs, total, overhead, others)
    static = inputs.engine.fraction_of == "static"
    beside = (total.value_bytes or 0) - (usable.value_bytes or 0) - (overhead.value_bytes or 0)
    taken_whole = static and (inputs.fraction_given or inputs.table_bytes > max(beside, 0))
    kv_is_set = inputs.kv_cache_memory_bytes is not None or taken_whole
    if inputs.kv_cache_memory_bytes is not None:
        kv = Term(inputs.kv_cache_memory_bytes, "given", "given; the budget is skipped", "--kv-cache-memory-bytes")
    elif usable.value_bytes is None or weight.value_bytes is None:
        kv = Term(
            None,
            None,
            "unknown: no GPU was named" if total.value_bytes is None else "unknown: weights unknown",
            "--gpu",
        )
    else:
        if static:
            activation, graphs, overhead = (_outside(term) for term in (activation, graphs, overhead))
            overhead = replace(overhead, detail=f"{overhead.detail}, taken before weights are loaded")
        left = usable.value_bytes - (weight.value_bytes if static else others)
        kv = Term(left, "assumed", "what is left of usable memory", "--kv-cache-memory-bytes")
    return Budget(total, usable, weight, activation, graphs, overhead, kv, kv_is_set)


OUTSIDE = "outside the fraction: "
"""What the detail of a term starts with when the engine's fraction does not have to hold it."""


def _outside(term: Term) -> Term:
    return replace(term, detail=OUTSIDE + term.detail)


def _given(value: int | None, flag: str) -> Term | None:
    return None if value is None else Term(value, "given", f"given with {flag}", flag)


def _total(gpu: GpuSpec | None) -> Term:
    if gpu is None:
        return Term(None, None, "no GPU named", "--gpu or --gpu-memory")
    fact = gpu.facts.get("memory_bytes", {})
    stated, caveat = fact.get("source", ""), fact.get("caveat")
    seen = f"{caveat or 'as programs see it'} (profile {gpu.name})"
    given = stated if stated == "--gpu-memory" or "NVML" in stated else seen
    return Term(gpu.memory_bytes, "exact" if caveat is None else "assumed", f"{gpu.display_name}, {given}",
                "--gpu-memory")  # fmt: skip


def _usable(inputs: BudgetInputs, total: Term, overhead: Term, others: int) -> Term:
    engine, fraction = inputs.engine, inputs.fraction.value
    flag = engine.fraction_flag
    if total.value_bytes is None:
        return Term(None, None, "no GPU named", flag)
    how = inputs.fraction.formula or engine.fraction_source
    why = "given" if inputs.fraction_given else f"default of {engine.name} {inputs.version}, {how}"
    source: Source = (
        "given" if inputs.fraction_given else ("exact" if engine.exact and inputs.version_read else "assumed")
    )
    if engine.fraction_of == "free":
        free = total.value_bytes - others
        usable = others + int(max(free, 0) * fraction)
        return Term(usable, source, f"everything else + {fraction:g} of the {format_gib(free)} left free ({why})", flag)
    if engine.fraction_of == "static":
        free = max(total.value_bytes - (overhead.value_bytes or 0), 0)
        kept = f" × {inputs.kept_share:g} on aiter" if inputs.kept_share != 1 else ""
        detail = f"{fraction:.4g}{kept} of the {format_gib(free)} free before weights, for weights and KV ({why})"
        return Term(int(free * fraction * inputs.kept_share), source, detail, flag)
    usable = ceil(total.value_bytes * fraction)
    return Term(usable, source, f"⌈{total.value_bytes:,} × {fraction:g}⌉ of total ({why})", flag)


def _weights(weights: WeightBytes | None) -> Term:
    if weights is None:
        return Term(None, None, "no model named: give --params or --weights-memory", "--weights-memory")
    source: Source = "exact" if weights.source == "exact" else "assumed"
    return Term(weights.total_bytes, source, weights.detail, "--weights-memory")


def _activation(model: ModelConfig | None, inputs: BudgetInputs) -> Term:
    """Peak of the profiling pass: the widest MLP over all batched tokens, or the sampler's FP32 logits.

    An MLP of experts holds what each token's experts return, of the hidden size on every rank (vLLM
    ``fused_moe/modular_kernel.py``).
    """
    flag = "--activation-memory"
    if model is None:
        return Term(None, None, "unknown without an architecture", flag)
    tokens, tp = inputs.batched_tokens, inputs.tp_size
    widest = max((w.shape[0] for layer in model.layers for w in layer.weights
                  if w.role in ("mlp", "shared_expert") and len(w.shape) == 2), default=model.hidden_size)  # fmt: skip
    experts = max((layer.top_k_experts for layer in model.layers), default=0)
    expert_width = max((w.shape[0] for layer in model.layers for w in layer.weights
                        if w.role == "expert" and len(w.shape) == 2), default=0)  # fmt: skip
    width = ceil_div(max(widest, experts * expert_width), tp)
    per_token = 2 * ((4 + experts) * model.hidden_size + 3 * width)
    forward = tokens * per_token
    sampler = inputs.num_seqs * model.vocab_size * 4 * SAMPLER_COPIES
    detail = (
        f"max of {tokens:,} batched tokens × {per_token:,} B and {inputs.num_seqs:,} sequences × {model.vocab_size:,} "
        f"logits × {4 * SAMPLER_COPIES} B"
    )
    if inputs.table_bytes:
        detail += f", and {inputs.table_bytes:,} B for the table of requests and their tokens"
    return Term(max(forward, sampler) + inputs.table_bytes, "assumed", detail, flag)


def _graphs(inputs: BudgetInputs) -> Term:
    if not inputs.subtracts_graphs:
        return Term(0, "exact", "this version does not subtract CUDA graphs from the KV budget", "--graph-memory")
    layers = inputs.num_layers
    value = GRAPH_BYTES_BASE + layers * GRAPH_BYTES_PER_LAYER if layers else 0
    return Term(value, "assumed", f"{layers} layers × 14 MiB + 128 MiB for the captured batch sizes", "--graph-memory")


def _overhead(inputs: BudgetInputs) -> Term:
    """Contexts of libraries; vLLM and SGLang exchange tokens of experts through NCCL too unless told otherwise.

    vLLM's ``config/parallel.py`` ``all2all_backend``, ``envs.py`` ``VLLM_DEEPEP_BUFFER_SIZE_MB``.
    """
    talks = inputs.num_ranks > 1
    detail = "CUDA context and libraries" + (", NCCL buffers" if talks else "")
    if talks and inputs.ep:
        detail += "; DeepEP's (1 GiB in vLLM) not counted"
    return Term(CONTEXT_BYTES + (COLLECTIVE_BYTES if talks else 0), "assumed", detail, "--overhead-memory")
