"""Rule sets that are arithmetic rather than an engine's own allocator: ``generic``, ``sglang`` and ``tensorrt-llm``.

They share one way of building pages, per token, without pools that pages of several kinds must share. Their results say
``approximation``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvplan.dtypes import AUTO, KV_FORMATS, KvFormat, kv_format
from kvplan.errors import UnsupportedError
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.engines.options import EngineOptions
from kvplan.memory.engines.vllm import check_parallelism
from kvplan.memory.engines.vllm_pages import (
    attention_page,
    compressed_pages,
    indexer_page,
    latent_page,
    state_bytes,
)
from kvplan.memory.pages import Page, make_group, rank_groups
from kvplan.model_config.types import (
    AttentionCache,
    CompressedLatentCache,
    IndexerCache,
    LatentCache,
    ModelConfig,
    StateCache,
)
from kvplan.units import format_count

V4_ROW_BLOCK = 256


@dataclass(frozen=True)
class Rules:
    """How an approximate rule set differs.

    Attributes:
        name, version: what the result calls it.
        default_block_tokens: tokens a block covers when the user names none.
        formats: KV formats it takes; None takes all.
        states_per_request: states one request holds.
        windows: whether sliding-window layers keep the window only (else the whole context).
        sparse_rows: whether FP8 of sparse latent attention is stored as 656-byte rows (else 576).
        replicates_index: whether every rank keeps all index keys where ranks split the context.
        auto: what ``auto`` becomes for a model.
        source: where the rules come from.

    """

    name: str
    version: str
    default_block_tokens: int
    source: str
    formats: frozenset[str] | None = None
    windows: bool = True
    states_per_request: int = 1
    sparse_rows: bool = False
    replicates_index: bool = False
    auto: Callable[[ModelConfig], str] | None = None


def plan_cache(rules: Rules, model: ModelConfig, options: EngineOptions) -> CachePlan:
    """Pages of each kind of layer in pools of their own, with the rule set's block size.

    Raises:
        UnsupportedError: the engine has no such format.
        InputError: heads do not divide by TP.

    """
    check_parallelism(model, options)
    fmt = _format(rules, model, options)
    block = options.block_size_tokens or rules.default_block_tokens
    buckets: dict[Page, list[tuple[int, Page]]] = {}
    for index, layer in enumerate(model.layers):
        for cache in layer.caches:
            for page in _pages(cache, rules, model, fmt, block, options):
                buckets.setdefault(page, []).append((index, page))
    groups = tuple(make_group(members) for members in buckets.values())
    return CachePlan(
        engine=rules.name,
        version=rules.version,
        exact=False,
        kv_cache_dtype=fmt.name,
        block_size_tokens=block,
        groups=groups,
        rank_groups=rank_groups(groups, model.num_layers, options.pp_size),
        unified_pool=False,
        dcp_size=options.dcp_size,
        rules=(("block size", format_count(block, "token"), rules.source),),
        warnings=tuple(_warnings(rules, fmt, options)),
        doubt=_doubt(rules, fmt, options),
    )


def _warnings(rules: Rules, fmt: KvFormat, options: EngineOptions) -> Iterator[str]:
    asked = ".".join(map(str, options.version or ()))
    if asked and not _is_of(asked, rules.version):
        yield f"no rules were read for {rules.name} {asked}: those of {rules.version} are used"
    if (doubt := _doubt(rules, fmt, options)) is not None:
        yield f"{fmt.name} KV is {doubt}"


def _doubt(rules: Rules, fmt: KvFormat, options: EngineOptions) -> str | None:
    gpu = options.gpu
    if rules.formats is None or gpu is None or options.is_sm100_family or not fmt.name.startswith("nvfp4"):
        return None
    return f"not known to run with {rules.name} on {gpu.display_name}: it is made for sm100"


def _is_of(version: str, series: str) -> bool:
    """``0.5.10`` is of ``0.5``, ``0.50`` is not."""
    return f"{version}.".startswith(f"{series}.")


def _format(rules: Rules, model: ModelConfig, options: EngineOptions) -> KvFormat:
    name = options.kv_cache_dtype
    if name == AUTO:
        name = rules.auto(model) if rules.auto is not None else ("float16" if model.dtype == "float16" else "bfloat16")
    fmt = kv_format(name)
    if "compressed" in model.cache_kinds:
        return KV_FORMATS["fp8_ds_mla"]
    if rules.formats is not None and fmt.name not in rules.formats:
        raise UnsupportedError(
            f"{rules.name} has no KV-cache dtype {fmt.name}", hint=f"it takes {', '.join(sorted(rules.formats))}"
        )
    if fmt.name.endswith("_ds_mla") and "mla" not in model.cache_kinds:
        raise UnsupportedError(f"{fmt.name} is for latent attention (DeepSeek, GLM-5)")
    if fmt.name.endswith("_ds_mla") and rules.formats is not None and not rules.sparse_rows:
        raise UnsupportedError(f"{rules.name} stores FP8 latents of {model.name} here as plain values, without scales",
                               hint="--kv-cache-dtype fp8")  # fmt: skip
    return fmt


def _pages(cache: object, rules: Rules, model: ModelConfig, fmt: KvFormat, block: int,
           options: EngineOptions) -> tuple[Page, ...]:  # fmt: skip
    if isinstance(cache, AttentionCache):
        page = attention_page(cache, fmt, block, options.tp_size)
        if fmt.scale_granularity == "token":
            page = replace(page, payload_bytes=page.payload_bytes * page.num_heads, num_heads=1,
                           scale_bytes=fmt.key_scale_bytes + fmt.value_scale_bytes)  # fmt: skip
        if page.kind in ("sliding", "chunked") and not rules.windows:
            page = replace(page, kind="full", window_tokens=None)
        return (page,)
    if isinstance(cache, LatentCache):
        if rules.sparse_rows and fmt.name in ("fp8", "fp8_e4m3"):
            fmt = KV_FORMATS["fp8_ds_mla"]
        return (_latent(replace(cache, top_k_tokens=None), fmt, block, options),)
    if isinstance(cache, IndexerCache):
        page, copies = indexer_page(cache, block, options.tp_size), options.dcp_size if rules.replicates_index else 1
        return (replace(page, payload_bytes=page.payload_bytes * copies, scale_bytes=page.scale_bytes * copies),)
    if isinstance(cache, StateCache):
        size = state_bytes(cache, options.tp_size, model.dtype)
        return (Page("state", block, state_bytes=size, blocks_per_request=rules.states_per_request, tag=cache.family),)
    if isinstance(cache, CompressedLatentCache):
        return compressed_pages(cache, V4_ROW_BLOCK, options.tp_size)
    raise TypeError(f"no page rule for {type(cache).__name__}")


def _latent(cache: LatentCache, fmt: KvFormat, block: int, options: EngineOptions) -> Page:
    if fmt.scale_granularity in ("token", "token_head"):
        width = cache.latent_dim + cache.rope_dim
        return Page("mla", block, 1, width * fmt.key_bits // 8, fmt.key_scale_bytes, tag=f"{fmt.name}:{width}",
                    num_copies=options.tp_size)  # fmt: skip
    if fmt.scale_granularity == "block" and not fmt.name.endswith("_ds_mla"):
        width = cache.latent_dim + cache.rope_dim
        scales = int(fmt.scale_bytes(width, 0))
        return Page("mla", block, 1, width * fmt.key_bits // 8, scales, tag=f"{fmt.name}:{width}",
                    num_copies=options.tp_size)  # fmt: skip
    return latent_page(cache, fmt, block, options)
