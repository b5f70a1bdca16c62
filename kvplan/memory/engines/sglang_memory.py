"""What SGLang sets ``--mem-fraction-static`` to unless it is told: one less the memory it sets aside, term by term.

Read in the released wheels of 0.5.5, 0.5.9, 0.5.10, 0.5.12, 0.5.14, 0.5.16, 0.5.18 and 0.5.20 to 0.5.23, under
``sglang/srt/``: ``server_args.py`` ``_handle_gpu_memory_settings``, since 0.5.20 ``arg_groups/memory_hook.py``
``handle_gpu_memory_settings``; where a change fell between two of them, the later is named. The memory is that of
``nvidia-smi``. Left out: speculative decoding, disaggregated serving, DeepEP, two-batch overlap, LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvplan.gpu import GpuSpec
from kvplan.memory.engines.options import EngineOptions, MemoryFraction
from kvplan.model_config.types import LatentCache, ModelConfig
from kvplan.units import MIB

CURRENT = (0, 5, 23)
OLDEST = (0, 5, 5)
BASE_MIB = 512
ACTIVATION_MIB_PER_TOKEN = 1.5
LEAST_ACTIVATION_TOKENS = 2048
LARGE_GPU_MIB = 60 * 1024
LARGE_GPU_LEAST_MIB = 10 * 1024
LEAST_RUNNING, MOST_RUNNING = 2048, 4096
"""Requests at once unless told, as far as tokens go (``resolve_max_num_reqs``)."""

FREE_AFTER_START_BYTES = 5 * 2**30
"""What the engine's guide wants free for activations once a server has started: ``available_gpu_mem`` of 5 to 8 GB in
its log (``docs/advanced_features/hyperparameter_tuning.md``)."""

AITER_SHARE = 0.85
AITER_CONTEXT = 8192

PREFILL_GRAPH_SIZES = ((4, 32, 4), (48, 256, 16), (288, 512, 32), (576, 1024, 64), (1280, 4096, 256), (4608, None, 512))
"""(first, last, step) of the prompt lengths whose graphs are captured, up to the chunked prefill size."""

NO_PIECEWISE = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "Qwen3NextForCausalLM")
TEXT_ONLY = ("Gemma3ForConditionalGeneration", "Llama4ForConditionalGeneration")
MULTIMODAL_GRAPHS = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
                     "KimiK25ForConditionalGeneration")  # fmt: skip
"""Architectures (``configs/model_config.py``) without piecewise prefill graphs; taken as text-only although they have a
vision tower; and multimodal ones with breakable prefill graphs."""


@dataclass(frozen=True)
class Tier:
    """Defaults of GPUs below ``below_mib``: chunked prefill, and the largest decode graph below TP 4 and from it on."""

    below_mib: float
    chunked_prefill_tokens: int
    graph_batch: int
    graph_batch_tp4: int


TIERS = (
    Tier(20 * 1024, 2048, 8, 8),
    Tier(35 * 1024, 4096, 48, 160),
    Tier(60 * 1024, 4096, 32, 160),
    Tier(160 * 1024, 8192, 256, 512),
    Tier(float("inf"), 16384, 512, 512),
)
OLD_35_GIB = Tier(35 * 1024, 2048, 24, 80)


@dataclass(frozen=True)
class Reserve:
    """Memory set aside for one purpose, in MiB as the engine counts it, and the arithmetic behind it."""

    what: str
    mebibytes: float
    formula: str

    @property
    def told(self) -> str:
        """The arithmetic with what it comes to, where that is not the same."""
        result = f"{self.mebibytes:,.0f} MiB"
        return result if result == self.formula else f"{self.formula} = {result}"


def rules_version(version: tuple[int, ...] | None) -> tuple[int, ...]:
    """The version whose rules apply: ``0.5`` alone is the newest that was read."""
    return CURRENT if version is None or (len(version) < 3 and version >= (0, 5)) else version


def tier_of(gpu: GpuSpec | None, version: tuple[int, ...]) -> Tier:
    """The defaults of a GPU by its memory; an unknown GPU is taken for one of 80 GiB."""
    memory = 80 * 1024 if gpu is None else gpu.reported_memory_bytes / MIB
    tier = next(tier for tier in TIERS if memory < tier.below_mib)
    return OLD_35_GIB if tier.below_mib == OLD_35_GIB.below_mib and version < (0, 5, 20) else tier


def default_batched_tokens(gpu: GpuSpec | None, version: tuple[int, ...], attention_dp: int) -> int:
    """Prompt tokens of one step: ``--chunked-prefill-size``, which ranks of data-parallel attention share.

    ``server_args.py`` ``_handle_data_parallelism``, since 0.5.20 ``arg_groups/parallel_hook.py``.
    """
    return tier_of(gpu, rules_version(version)).chunked_prefill_tokens // attention_dp or 1


def attention_dp_size(options: EngineOptions) -> int:
    """Ranks of data-parallel attention: the data-parallel ones where experts are dealt over all of them."""
    return options.dp_size if options.ep else 1


def reserves(model: ModelConfig, options: EngineOptions) -> tuple[Reserve, ...]:
    """What is set aside on each GPU, in the order it is added up."""
    version = rules_version(options.version)
    attention_dp, tier = attention_dp_size(options), tier_of(options.gpu, version)
    ranks = options.tp_size * attention_dp
    chunk = options.batched_tokens * attention_dp or tier.chunked_prefill_tokens  # reckoned before ranks share it
    tokens = max(chunk, LEAST_ACTIVATION_TOKENS)
    graphs = tier.graph_batch if ranks < 4 else tier.graph_batch_tp4
    if options.running_limit is not None and version >= (0, 5, 22):
        graphs = min(graphs, options.running_limit)
    world = ranks * options.pp_size
    found = [
        Reserve("attention backend", BASE_MIB, f"{BASE_MIB} MiB"),
        Reserve("activations", tokens * ACTIVATION_MIB_PER_TOKEN,
                f"{ACTIVATION_MIB_PER_TOKEN} MiB × {tokens:,} tokens of a chunked prefill"),
        Reserve("decode graphs", 2.0 * graphs, f"2 MiB × {graphs} requests of the largest decode graph"),
        Reserve("parallel ranks", world / 8 * 1024, f"1,024 MiB × {world} ranks / 8"),
    ]  # fmt: skip
    if attention_dp > 1:
        per_request = 4.5 if graphs > 300 else 3
        formula = f"{per_request:g} MiB × {graphs} requests × {attention_dp} attention ranks"
        found.append(Reserve("data-parallel attention", per_request * graphs * attention_dp, formula))
    found += _prefill_graphs(model, options, version, tokens)
    return tuple(_at_least(found, options.gpu))


def _at_least(found: list[Reserve], gpu: GpuSpec | None) -> Iterator[Reserve]:
    yield from found
    total = sum(reserve.mebibytes for reserve in found)
    if gpu is not None and gpu.reported_memory_bytes > LARGE_GPU_MIB * MIB and total < LARGE_GPU_LEAST_MIB:
        yield Reserve("least of a large GPU", LARGE_GPU_LEAST_MIB - total, f"up to {LARGE_GPU_LEAST_MIB:,} MiB")


def _prefill_graphs(model: ModelConfig, options: EngineOptions, version: tuple[int, ...], chunk: int
                    ) -> Iterator[Reserve]:  # fmt: skip
    """Graphs of prefill, on by default since 0.5.10 where the model and the layout allow them."""
    if version < (0, 5, 10) or (options.gpu is not None and options.gpu.vendor == "amd"):
        return
    architecture = model.architecture
    if version < (0, 5, 16):
        barred = attention_dp_size(options) > 1 or options.pp_size > 1 or architecture in NO_PIECEWISE
        allowed = not barred and not is_multimodal(model)
    else:
        sm100_mla = architecture == "DeepseekV3ForCausalLM" and options.is_sm100_family
        barred = options.dcp_size > 1 or "compressed" in model.cache_kinds or sm100_mla
        barred = barred or (options.pp_size > 1 and version >= (0, 5, 20))
        allowed = not barred and (not is_multimodal(model) or architecture in MULTIMODAL_GRAPHS)
    if not allowed:
        return
    if "mla" in model.cache_kinds:
        yield Reserve("prefill graphs", 1.5 * 1024, "1,536 MiB with latent attention")
        return
    sizes = sum(len(range(low, min(high or chunk, chunk) + 1, step)) for low, high, step in PREFILL_GRAPH_SIZES)
    yield Reserve("prefill graphs", 8.0 * sizes, f"8 MiB × {sizes} prompt lengths up to {chunk:,} tokens")


def is_multimodal(model: ModelConfig) -> bool:
    """Whether SGLang keeps memory for images (``configs/model_config.py`` ``enable_multimodal``)."""
    return model.vision_config is not None and model.architecture not in TEXT_ONLY


def vision_factor(model: ModelConfig) -> float:
    """What a vision tower leaves of the fraction (``adjust_mem_fraction_for_vlm``); 1 without one.

    0.95 × (1 − 0.1 × (size / size of ViT-L/14 − 1)), the second factor between 0.8 and 1.05; the size is layers ×
    width², read under the names of CLIP (24 and 1,024 where the config uses others).
    """
    if not is_multimodal(model):
        return 1.0
    stated = model.vision_config or {}
    size = stated.get("num_hidden_layers", 24) * stated.get("hidden_size", 1024) ** 2
    return 0.95 * max(0.8, min(1.05, 1 - 0.1 * (size / (24 * 1024**2) - 1)))


def default_fraction(model: ModelConfig, options: EngineOptions) -> MemoryFraction:
    """``--mem-fraction-static`` unless it is given, rounded to thousandths as the engine rounds it.

    Without a GPU there is nothing to compute it from, and no budget that would use it.
    """
    if options.gpu is None:
        return MemoryFraction(0.88)
    version = rules_version(options.version)
    hook = version >= (0, 5, 20)
    name = "arg_groups/memory_hook.py handle_gpu_memory_settings" if hook else (
        "server_args.py _handle_gpu_memory_settings")  # fmt: skip
    read = ".".join(map(str, min(max(version, OLDEST), CURRENT)))
    source = f"sglang/srt/{name}, {read}"
    total = options.gpu.reported_memory_bytes / MIB
    terms = reserves(model, options)
    reserved = sum(term.mebibytes for term in terms)
    value = max(round((total - reserved) / total, 3), 0.001)
    formula = f"1 − {reserved:,.0f} MiB set aside / {total:,.0f} MiB"
    rules = [(f"set aside for {term.what}", term.told, source) for term in terms]
    factor = vision_factor(model)
    rules.append(("memory fraction", f"{formula} = {value:g}", source))
    if factor != 1:
        formula = f"({formula}) × {factor:.4f} for the vision tower"
        value *= factor
        rules.append(("memory fraction with a vision tower", f"× {factor:.4f} = {value:.4f}", source))
    return MemoryFraction(value, f"{formula}, {name}", tuple(rules))


def request_table_bytes(options: EngineOptions) -> int:
    """Bytes that say where tokens lie: 4 for each of the longest request, for each that may run and one more.

    ``mem_cache/memory_pool.py`` ``ReqToTokenPool``, beside the fraction; for 2,048 requests or more unless told.
    """
    return ((options.running_limit or LEAST_RUNNING) + 1) * (options.longest_tokens + 4) * 4


def aiter_share(model: ModelConfig, options: EngineOptions) -> float:
    """What the aiter backend of AMD GPUs leaves of any fraction, a given one too, from 8,193 tokens a request on.

    ``server_args.py`` and ``arg_groups/attention_hook.py`` (0.5.5 to 0.5.23). Latent attention runs on aiter with 16 or
    128 heads a rank only.
    """
    if options.gpu is None or options.gpu.vendor != "amd" or options.longest_tokens <= AITER_CONTEXT:
        return 1.0
    latent = [cache for layer in model.layers for cache in layer.caches if isinstance(cache, LatentCache)]
    return AITER_SHARE if not latent or latent[0].num_q_heads // options.tp_size in (16, 128) else 1.0
