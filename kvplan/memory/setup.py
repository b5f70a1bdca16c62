"""A request with everything looked up: model, GPU, engine, defaults; what comparison, search and advice vary."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvplan.dtypes import canonical_kv_dtype
from kvplan.errors import InputError, UnsupportedError
from kvplan.gpu import GpuSpec, profile_of_device
from kvplan.memory.budget import Budget, BudgetInputs, memory_budget
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.engines import Engine, parse_version, resolve_engine
from kvplan.memory.engines.expert_padding import expert_padding
from kvplan.memory.engines.options import EngineOptions, MemoryFraction
from kvplan.memory.engines.vllm_versions import CURRENT, VersionRules
from kvplan.memory.named import gpu_of, model_of
from kvplan.memory.request import SizeRequest
from kvplan.memory.splits import Split, split_refusal
from kvplan.model_config.types import ModelConfig
from kvplan.units import ceil_div, format_gib
from kvplan.weights import WeightBytes, weight_bytes


@dataclass(frozen=True)
class Setup:
    """A request with everything looked up: the working form that comparison, search and advice vary.

    ``num_replicas`` instances of the model run side by side (data parallelism).
    """

    request: SizeRequest
    model: ModelConfig
    has_model: bool
    engine: Engine
    gpu: GpuSpec | None
    options: EngineOptions
    batched_tokens: int
    memory_fraction: MemoryFraction
    context_tokens: int
    max_model_len_tokens: int

    @property
    def fraction(self) -> float:
        """The engine's memory fraction, given or its default."""
        return self.memory_fraction.value

    @property
    def num_replicas(self) -> int:
        """Data-parallel replicas."""
        return self.request.dp_size

    @property
    def shares_experts(self) -> bool:
        """Whether data-parallel replicas of the model would share its experts."""
        return self.model.is_moe and (self.request.ep or self.engine.experts_span_dp)

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the experts, whole or in parts."""
        return self.request.tp_size * (self.request.dp_size if self.shares_experts else 1)

    @property
    def split(self) -> Split:
        """How one server splits weights over its ranks."""
        return Split(self.request.tp_size, self.expert_ranks, self.request.ep and self.model.is_moe)

    @property
    def batch_per_replica(self) -> int:
        """Requests the fullest replica holds; 1 when no batch was asked for."""
        return ceil_div(self.request.batch_size or 1, self.num_replicas)

    @property
    def default_num_seqs(self) -> int | None:
        """Requests one replica runs at once unless told; None where that was stated, or is not known."""
        if self.request.max_num_seqs is not None or self.gpu is None:
            return None
        default = self.engine.default_num_seqs(self.gpu, self.options.version or ())
        return None if default is None else min(default, self.batched_tokens)

    @property
    def taken_for_granted(self) -> str | None:
        """What a GPU of which only the memory is known is taken for; None where every GPU of that memory is alike."""
        stated = self.request.max_num_seqs is not None and self.request.max_num_batched_tokens is not None
        if self.gpu is None or self.request.gpu is not None or self.engine.name != "vllm" or stated:
            return None
        a100 = profile_of_device("A100", self.gpu.memory_bytes)
        if a100 is None:
            return None
        rules = VersionRules(self.options.version or ())
        mine, theirs = (
            f"{rules.default_num_seqs(gpu):,} requests at once and {rules.default_batched_tokens(gpu):,} batched tokens"
            for gpu in (self.gpu, a100)
        )
        if mine == theirs:
            return None
        return (
            f"no GPU is named: one with {format_gib(self.gpu.memory_bytes)} is taken for newer than an A100, so vLLM's "
            f"defaults are {mine}; on an A100 they are {theirs}: add --gpu"
        )

    @property
    def counts_states(self) -> bool:
        """Whether SGLang has a state for each request it was told to run, and no ratio: prefixes keep none."""
        stated = self.request.max_num_seqs is not None and not self.request.enable_prefix_caching
        return stated and self.engine.name == "sglang" and "state" in self.model.cache_kinds

    @property
    def runs_at_once(self) -> bool:
        """Whether the scheduler, as it was told, lets the whole batch run at once."""
        return self.at_once(self.batch_per_replica) == self.batch_per_replica

    @property
    def most_at_once(self) -> int | None:
        """Requests one replica runs at once by what was stated: of vLLM no more than the tokens of a step, too."""
        tokens = self.request.max_num_batched_tokens if self.engine.name == "vllm" else None
        return min((limit for limit in (self.request.max_num_seqs, tokens) if limit is not None), default=None)

    def at_once(self, held: int) -> int:
        """Of requests that one replica holds, those that run at once by what was stated."""
        return min(held, self.most_at_once or held)


def set_up(request: SizeRequest) -> Setup:
    """Look up the model, the GPU and the engine, and fill in the engine's defaults.

    Raises:
        KvplanError: a name is unknown, a file cannot be read, or options contradict each other.

    """
    model, has_model = model_of(request)
    engine = resolve_engine(request.engine)
    if request.ep and has_model and not model.is_moe and engine.name == "vllm":
        raise UnsupportedError(f"vLLM refuses --ep: {model.name} has no experts", hint="leave out --ep")
    for name in ("swa_full_tokens_ratio", "mamba_full_memory_ratio"):
        if getattr(request, name) is not None and engine.name != "sglang":
            raise InputError(f"{engine.name} has no {name}: it is SGLang's", hint="leave it out, or --engine sglang")
    version = parse_version(request.engine_version, engine.version)
    gpu = gpu_of(request)
    rules = VersionRules(version if engine.name == "vllm" else CURRENT)
    deals_experts = request.ep and model.is_moe
    own, attention_dp = engine.default_batched_tokens, request.dp_size if deals_experts else 1
    batched = request.max_num_batched_tokens or (
        own(gpu, version, attention_dp) if own else rules.default_batched_tokens(gpu)
    )
    if engine.name == "vllm":
        wanted = max(request.max_num_seqs or 0, ceil_div(request.batch_size or 0, request.dp_size))
        if wanted > batched and request.max_num_batched_tokens is not None:
            why = f"vLLM refuses --max-num-seqs {wanted:,} beyond --max-num-batched-tokens {batched:,}"
            raise UnsupportedError(why, hint="raise the latter, or leave it out")
        batched = max(batched, request.max_num_seqs or 0)
    num_seqs = request.max_num_seqs or min(rules.default_num_seqs(gpu), batched)
    context, max_len = _lengths(request, model)
    options = EngineOptions(
        kv_cache_dtype=canonical_kv_dtype(request.kv_cache_dtype),
        gpu=gpu,
        tp_size=request.tp_size,
        pp_size=request.pp_size,
        dp_size=request.dp_size,
        dcp_size=request.dcp_size,
        ep=deals_experts,
        block_size_tokens=request.block_size_tokens,
        enable_prefix_caching=request.enable_prefix_caching,
        tokens_in_flight=rules.tokens_in_flight(batched, request.pp_size),
        batched_tokens=request.max_num_batched_tokens or 0,
        max_num_seqs=num_seqs,
        running_limit=request.max_num_seqs,
        longest_tokens=max_len,
        swa_full_tokens_ratio=request.swa_full_tokens_ratio,
        mamba_full_memory_ratio=request.mamba_full_memory_ratio,
        version=version,
    )
    given = request.gpu_memory_utilization
    fraction = engine.default_fraction(model, options) if given is None else MemoryFraction(given)
    setup = Setup(request, model, has_model, engine, gpu, options, batched, fraction, context, max_len)
    if setup.counts_states:
        options = replace(options, kv_bytes=budget_of(setup, weights_of(setup)).kv_bytes)
    return _with_limit_for_batch(replace(setup, options=options))


def _lengths(request: SizeRequest, model: ModelConfig) -> tuple[int, int]:
    """Tokens of a request, and of the longest one that the server takes.

    Raises:
        InputError: neither is stated and the model claims none, or the former is longer than the latter.

    """
    context = request.context_tokens or request.max_model_len_tokens or model.max_context_tokens
    if context is None:
        raise InputError("no context given and the model names none", hint="add --ctx 32k")
    max_len = request.max_model_len_tokens or context
    if request.context_tokens is not None and request.context_tokens > max_len:
        raise InputError(
            f"--ctx {request.context_tokens:,} is longer than --max-model-len {max_len:,}",
            hint="raise --max-model-len, or leave it out",
        )
    return context, max_len


def _with_limit_for_batch(setup: Setup) -> Setup:
    """A batch beyond the engine's default limit that KV memory holds is planned with a limit of its own.

    vLLM takes no more requests than tokens of a step (``config/scheduler.py`` ``verify_max_model_len``).
    """
    default, batch = setup.default_num_seqs, setup.batch_per_replica
    if default is None or batch <= default:
        return setup
    available = budget_of(setup, weights_of(setup)).kv_bytes
    if available is None or cache_plan(setup).max_batch(available, setup.context_tokens) < batch:
        return setup
    batched = setup.request.max_num_batched_tokens or max(setup.batched_tokens, batch)
    in_flight = VersionRules(setup.options.version or CURRENT).tokens_in_flight(batched, setup.request.pp_size)
    options = replace(setup.options, max_num_seqs=batch, tokens_in_flight=in_flight)
    return replace(setup, options=options, batched_tokens=batched)


def cache_plan(setup: Setup) -> CachePlan:
    """The rule set's answer for this set-up."""
    return setup.engine.plan_cache(setup.model, setup.options)


def weights_of(setup: Setup) -> WeightBytes | None:
    """Weights on one GPU; None when the model came from flags and no parameter count was given.

    Raises:
        UnsupportedError: the engine does not start with weights split so over the GPUs that are named.

    """
    request = setup.request
    if not setup.has_model:
        if request.num_parameters is None:
            return None
        from kvplan.dtypes import weight_format

        bits = weight_format(request.weight_dtype or "bf16").bits
        total = ceil_div(request.num_parameters * bits, 8)
        share = ceil_div(total, request.tp_size * request.pp_size)
        return WeightBytes(
            share, {}, total, "assumed", f"{request.num_parameters:,} parameters of {bits} bits, split evenly"
        )
    split = setup.split
    refusal = split_refusal(setup.model, setup.engine.name, split, request.weight_dtype, setup.options.version)
    if refusal is not None and setup.gpu is not None:
        other = "other --tp and --dp, or --ep" if setup.model.is_moe and not split.ep else "other --tp and --dp"
        raise UnsupportedError(f"{setup.model.name}: {refusal}", hint=f"try {other}")
    return weight_bytes(setup.model, tp_size=split.tp_size, pp_size=request.pp_size, moe_tp_size=split.expert_ranks,
                        ep_size=split.expert_ranks if split.ep else 1, weight_dtype=request.weight_dtype,
                        padding=expert_padding(setup.model, setup.engine.name, setup.options))  # fmt: skip


def budget_of(setup: Setup, weights: WeightBytes | None) -> Budget:
    """The memory budget of one GPU of this set-up."""
    request = setup.request
    rules = VersionRules(setup.options.version or CURRENT)
    version = ".".join(map(str, setup.options.version or ())) or setup.engine.version
    nearest = rules.nearest_read if setup.engine.name == "vllm" else None
    if nearest is not None:
        version = f"{'.'.join(map(str, nearest))}, taken for {version}"
    inputs = BudgetInputs(
        gpu=setup.gpu,
        engine=setup.engine,
        fraction=setup.memory_fraction,
        kept_share=setup.engine.kept_share(setup.model, setup.options),
        table_bytes=setup.engine.table_bytes(setup.options),
        fraction_given=request.gpu_memory_utilization is not None,
        batched_tokens=setup.batched_tokens,
        num_seqs=setup.options.max_num_seqs,
        tp_size=request.tp_size,
        num_ranks=setup.split.expert_ranks * request.pp_size,
        ep=setup.split.ep,
        num_layers=ceil_div(setup.model.num_layers, request.pp_size),
        version=version,
        version_read=nearest is None,
        subtracts_graphs=setup.engine.name != "vllm" or rules.subtracts_graphs,
        kv_cache_memory_bytes=request.kv_cache_memory_bytes,
        weights_bytes=request.weights_bytes,
        activation_bytes=request.activation_bytes,
        graph_bytes=request.graph_bytes,
        overhead_bytes=request.overhead_bytes,
    )
    return memory_budget(setup.model if setup.has_model else None, weights, inputs)
