"""SGLang 0.5, approximated: pools of tokens, dealt out at start-up.

Sources, under ``sglang/srt/`` of 0.5.5 to 0.5.23: ``mem_cache/memory_pool.py`` (MHATokenToKVPool, MLATokenToKVPool,
the sparse indexer's pool), ``model_executor/pool_configurator.py`` (tokens, the split between full and sliding layers,
index keys that decode context parallelism replicates), ``mem_cache/kv_cache_configurator.py``
(``_handle_max_mamba_cache``, the split between states and tokens, and ``resolve_max_num_reqs``); before 0.5.12
``model_executor/model_runner_kv_cache_mixin.py``. The default memory fraction is in ``sglang_memory.py``. Left out:
speculative decoding, the pools of DeepSeek-V4, tokens of windows in flight, and what the radix cache keeps.
"""

from __future__ import annotations

from dataclasses import replace

from kvplan.dtypes import AUTO
from kvplan.errors import UnsupportedError
from kvplan.memory.cache_plan import CachePlan, Pool
from kvplan.memory.engines import approximate
from kvplan.memory.engines.options import EngineOptions
from kvplan.memory.engines.sglang_memory import LEAST_RUNNING, MOST_RUNNING, rules_version
from kvplan.model_config.types import ModelConfig
from kvplan.units import format_gib

FORMATS = frozenset({"bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "nvfp4", "fp8_ds_mla"})
SPARSE_FORMATS = frozenset({"bfloat16", "fp8", "fp8_e4m3", "fp8_ds_mla"})
"""Of sparse latent attention (``_dsa_kv_cache_dtype_default``)."""

RULES = approximate.Rules("sglang", "0.5", 1, "sglang/srt/mem_cache/memory_pool.py", FORMATS)

SLIDING_SHARE = 0.8
"""``swa_full_tokens_ratio`` unless told: tokens of the sliding pool over tokens of the full one."""

STATE_SHARE = 0.9
"""``mamba_full_memory_ratio`` unless told: bytes of states over bytes of tokens."""

SLIDING_POOLS = (
    ("GptOssForCausalLM", (0, 5, 9)), ("Llama4ForConditionalGeneration", (0, 5, 9)),
    ("MiMoV2FlashForCausalLM", (0, 5, 9)), ("Step3p5ForCausalLM", (0, 5, 9)), ("Gemma4ForCausalLM", (0, 5, 12)),
    ("Gemma4ForConditionalGeneration", (0, 5, 12)),
)  # fmt: skip
"""Architectures whose sliding layers have a pool of their own, and since when (``configs/model_config.py``
``is_hybrid_swa_model``); in all others, Gemma 2 and 3 among them, sliding layers keep every token."""

POOL_OF = {"state": "states", "sliding": "windows", "chunked": "windows"}
"""The pool of a kind of page; all others are in that of tokens."""

EXTRA_BUFFER = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration", "Qwen3NextForCausalLM",
                "KimiLinearForCausalLM", "NemotronHForCausalLM")  # fmt: skip
"""Architectures whose requests hold two more states for prefixes, since 0.5.16
(``supports_mamba_cache_extra_buffer``)."""


def plan_cache(model: ModelConfig, options: EngineOptions) -> CachePlan:
    """The cache of ``model`` in SGLang's pools; an approximation."""
    version = rules_version(options.version)
    rules = replace(
        RULES,
        default_block_tokens=page_tokens(model, options),
        windows=any(name == model.architecture and version >= since for name, since in SLIDING_POOLS),
        states_per_request=_states(model, options, version),
        sparse_rows=_sparse_rows(model, options, version),
        replicates_index=True,
        formats=SPARSE_FORMATS if {"mla", "indexer"} <= model.cache_kinds else FORMATS,
    )
    plan = approximate.plan_cache(rules, model, replace(options, kv_cache_dtype=_kv_dtype(model, options)))
    pools, split = _pools(plan, options)
    return replace(plan, pools=pools, rules=(*plan.rules, *split))


def _kv_dtype(model: ModelConfig, options: EngineOptions) -> str:
    """The format, ``auto`` becoming FP8 where a ModelOpt checkpoint asks for it (``mem_cache/kv_cache_dtype.py``).

    And for sparse latent attention on Blackwell (``arg_groups/overrides.py`` ``_dsa_kv_cache_dtype_default``).
    """
    quantization = model.quantization
    asked = quantization is not None and quantization.method == "modelopt" and quantization.kv_cache_declared == "fp8"
    sparse = {"mla", "indexer"} <= model.cache_kinds and (options.sm or 0) >= 100
    return "fp8" if options.kv_cache_dtype == AUTO and (asked or sparse) else options.kv_cache_dtype


def _sparse_rows(model: ModelConfig, options: EngineOptions, version: tuple[int, ...]) -> bool:
    """Whether FP8 latents carry scales and 16-bit RoPE values (``calculate_mla_kv_cache_dim``).

    Those of FlashMLA's kernels for sparse attention do; on AMD and on Blackwell, with TensorRT-LLM's, they are plain
    since 0.5.10 (0.5.9 has FlashMLA's everywhere).
    """
    if not {"mla", "indexer"} <= model.cache_kinds:
        return False
    amd = options.gpu is not None and options.gpu.vendor == "amd"
    return version < (0, 5, 10) or (not amd and (options.sm or 0) < 100)


def page_tokens(model: ModelConfig, options: EngineOptions) -> int:
    """``--page-size`` unless told: 1, and more where the attention kernels of a model or GPU ask for it.

    ``arg_groups/overrides.py`` and ``model_overrides/``, 0.5.23.
    """
    if "compressed" in model.cache_kinds:
        return 256
    if "indexer" in model.cache_kinds:
        return 64 if "mla" in model.cache_kinds else 128
    return 64 if options.is_sm100_family else 1


def _states(model: ModelConfig, options: EngineOptions, version: tuple[int, ...]) -> int:
    """States a running request counts for (``_calculate_mamba_ratio``)."""
    if not options.enable_prefix_caching:
        return 1
    return 5 if version >= (0, 5, 16) and model.architecture in EXTRA_BUFFER else 3


def _pools(plan: CachePlan, options: EngineOptions) -> tuple[tuple[Pool, ...], list[tuple[str, str, str]]]:
    """The pools, that of full attention first, and the rules that deal them their share; states have one of padding."""
    sliding = options.swa_full_tokens_ratio or SLIDING_SHARE
    states = options.mamba_full_memory_ratio or STATE_SHARE
    members: dict[str, list[int]] = {"tokens": [], "windows": [], "states": []}
    for index, group in enumerate(plan.groups):
        members[POOL_OF.get(group.pages[0].kind, "tokens")].append(index)
    full, windows = (sum(plan.groups[i].bytes_per_block for i in members[name]) for name in ("tokens", "windows"))
    rules, shares, left = [], {}, 1.0
    taken = 0
    if members["states"] and full + windows and options.running_limit and (options.kv_bytes or 0) > 0:
        taken, rule = _counted_states(plan, members["states"], options.running_limit, options.kv_bytes or 0)
        left = 1 - (taken + 1) / (options.kv_bytes or 1)  # a byte more, for shares are rounded
        rules.append(rule)
    elif members["states"] and full + windows:
        left = 1 / (1 + states)
        rules.append(("pool of states", f"{states:g} / (1 + {states:g}) of the KV memory",
                      "sglang/srt/mem_cache/kv_cache_configurator.py _handle_max_mamba_cache"))  # fmt: skip
    if full and windows:
        shares["windows"] = left * sliding * windows / (full + sliding * windows)
        rules.append(("bytes of a block", f"{full:,} of full layers + {sliding:g} × {windows:,} of sliding ones, "
                      f"whose pool has {sliding:g} of the tokens",
                      "sglang/srt/model_executor/pool_configurator.py HybridSWAPoolConfigurator"))  # fmt: skip
    shares["tokens" if full else "windows"] = left - shares.get("windows", 0.0)
    shares["states"] = 1 - left or 1.0
    pools = (
        Pool(n, shares[n], tuple(found), int(n == "states"), taken if n == "states" else 0)
        for n, found in members.items()
        if found
    )
    return tuple(pools), rules


def _counted_states(plan: CachePlan, groups: list[int], requests: int, kv_bytes: int
                    ) -> tuple[int, tuple[str, str, str]]:  # fmt: skip
    """Bytes of a state for each request and one of padding, without a radix cache; and the rule.

    Raises:
        UnsupportedError: they leave nothing for tokens.

    """
    state = max(sum(ranks[index].bytes_per_block for index in groups) for ranks in plan.rank_groups)
    taken = (requests + 1) * state
    if taken + 1 >= kv_bytes:
        raise UnsupportedError(f"the states of {requests:,} requests take {format_gib(taken)}, and there are "
                               f"{format_gib(kv_bytes)} for them and tokens", hint="lower --max-num-seqs")  # fmt: skip
    return taken, ("pool of states", f"{requests:,} requests and one of padding × {state:,} B = {taken:,} B",
                   "sglang/srt/mem_cache/kv_cache_configurator.py _handle_max_mamba_cache")  # fmt: skip


def running_limit(plan: CachePlan, available_bytes: int, longest_tokens: int) -> tuple[int, str, str]:
    """``--max-running-requests`` of one replica unless told, how it comes about, and by which rule of the engine."""
    tokens = plan.capacity_tokens(available_bytes, longest_tokens)
    limit = min(max(min(tokens * 512 // longest_tokens, MOST_RUNNING), LEAST_RUNNING), tokens // 2)
    formula = f"512 × {tokens:,} tokens / {longest_tokens:,}, from 2,048 to 4,096, and no more than half the tokens"
    states = next((pool for pool in plan.pools if pool.name == "states"), None)
    if states is not None:
        held, slots = plan.pool_request_blocks(states), plan.pool_blocks(states, available_bytes)
        limit = min(limit, slots // held)
        formula += f"; {slots:,} states at {held} a request"
    return limit, f"{formula} = {limit:,}", "sglang/srt/mem_cache/kv_cache_configurator.py resolve_max_num_reqs"
