"""vLLM 0.33's rules from a model to pages: block sizes, page bytes, hybrid alignment.

Sources, under ``vllm/``: ``v1/kv_cache_interface.py`` (page bytes), ``platforms/interface.py`` (hybrid block size),
``v1/core/kv_cache_planning.py`` (groups and pool), ``model_executor/layers/mamba/mamba_utils.py`` (states),
``models/deepseek_v4`` (compressed attention). Which formats it takes where is ``vllm_formats.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

from kvplan.dtypes import KV_FORMATS, KvFormat
from kvplan.errors import InputError, UnsupportedError
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.engines.options import EngineOptions
from kvplan.memory.engines.vllm_formats import check_format, resolve_auto
from kvplan.memory.engines.vllm_pages import (
    attention_page,
    compressed_pages,
    indexer_page,
    latent_page,
    state_blocks,
    state_bytes,
    uses_flashinfer_gdn,
)
from kvplan.memory.engines.vllm_versions import CURRENT, VersionRules
from kvplan.memory.grouping import group_pages
from kvplan.memory.pages import Page, rank_groups
from kvplan.model_config.types import (
    AttentionCache,
    CompressedLatentCache,
    IndexerCache,
    LatentCache,
    ModelConfig,
    StateCache,
)
from kvplan.units import ceil_div

NAME = "vllm"
"""The oldest vLLM whose formulas were read; older versions take its."""
VERSION = "0.33"
DEFAULT_BLOCK_TOKENS = 16
SPARSE_BLOCK_TOKENS = 64
V4_BLOCK_TOKENS = 256
M3_BLOCK_TOKENS = 128
GDN_CHUNK_TOKENS = 64
MLA_HYBRID_BLOCK_TOKENS = 128
TURBOQUANT_SKIPPED_LAYERS = 2

Member = tuple[int, Page]


@dataclass(frozen=True)
class _Context:
    """What every page rule needs."""

    model: ModelConfig
    fmt: KvFormat
    options: EngineOptions
    block: int
    hybrid: bool


def plan_cache(model: ModelConfig, options: EngineOptions) -> CachePlan:
    """Groups and pool of ``model`` as vLLM 0.33 builds them.

    Raises:
        UnsupportedError: vLLM refuses the combination.
        InputError: heads do not divide by TP, or the block size is one no backend takes.

    """
    check_parallelism(model, options)
    fmt = resolve_auto(model, options)
    warnings = check_format(model, fmt, options)
    hybrid = "state" in model.cache_kinds and len(model.cache_kinds) > 1
    block = _requested_block(model, fmt, options, hybrid)
    rules = [("block size", f"{block} tokens" + ("" if options.block_size_tokens else " (default of the backend)"),
              "v1/attention/backends")]  # fmt: skip
    context = _Context(model, fmt, options, block, hybrid)
    if hybrid:
        aligned, formula = _hybrid_block(context)
        rules.append(("hybrid block size", formula, "platforms/interface.py _align_hybrid_block_size"))
        context = _Context(model, fmt, options, aligned, hybrid)
    members = _members(context)
    packed = "compressed" in model.cache_kinds
    groups = tuple(group_pages(members, packed=packed))
    version = options.version or CURRENT
    rules_of = VersionRules(version)
    if (nearest := rules_of.nearest_read) is not None:
        asked, used = (".".join(map(str, each)) for each in (version, nearest))
        warnings = [*warnings, f"no rules were read for vLLM {asked}: those of {used} are used"]
    return CachePlan(
        engine=NAME,
        version=".".join(map(str, version)),
        exact=version[:2] == CURRENT,
        kv_cache_dtype=fmt.name,
        block_size_tokens=context.block,
        groups=groups,
        rank_groups=rank_groups(groups, model.num_layers, options.pp_size),
        reserved_blocks=1 if rules_of.reserves_null_block else 0,
        tokens_in_flight=options.tokens_in_flight,
        dcp_size=options.dcp_size,
        legacy_tokens=not rules_of.request_based_tokens,
        rules=tuple(rules),
        warnings=tuple(warnings),
    )


def check_parallelism(model: ModelConfig, options: EngineOptions) -> None:
    """Refuse TP, PP and DCP sizes that heads, states or layers do not divide by.

    Raises:
        InputError: what does not divide, and a size that would.
        UnsupportedError: DCP where the attention has none.

    """
    tp = options.tp_size
    for cache in {cache for layer in model.layers for cache in layer.caches}:
        if isinstance(cache, AttentionCache | LatentCache | CompressedLatentCache) and cache.num_q_heads % tp:
            raise InputError(
                f"{_where(model)}: num_attention_heads ({cache.num_q_heads}) does not divide by --tp {tp}",
                hint=f"try --tp {_largest_divisor(cache.num_q_heads, tp)}",
            )
        if isinstance(cache, AttentionCache) and cache.num_kv_heads % tp and tp % cache.num_kv_heads:
            raise InputError(
                f"{_where(model)}: num_key_value_heads ({cache.num_kv_heads}) neither divides by nor divides --tp {tp}",
                hint=f"try --tp {_largest_divisor(cache.num_kv_heads, tp)}",
            )
        if isinstance(cache, StateCache) and cache.state_shape[0] % tp:
            raise InputError(f"{_where(model)}: {cache.state_shape[0]} state heads do not divide by --tp {tp}")
        if isinstance(cache, StateCache) and cache.conv_groups > 1 and cache.conv_groups % tp:
            raise UnsupportedError(f"{_where(model)}: {cache.conv_groups} state groups do not divide by --tp {tp}")
    dcp = options.dcp_size
    if dcp > 1:
        _check_dcp(model, tp, dcp)
    if options.pp_size > model.num_layers:
        raise InputError(f"--pp {options.pp_size} is more than the {model.num_layers} layers of {model.name}")


def _where(model: ModelConfig) -> str:
    """The file a model was read from, or the name of a bundled one."""
    return model.source if model.source.endswith(".json") else model.name


def _check_dcp(model: ModelConfig, tp: int, dcp: int) -> None:
    if tp % dcp:
        raise InputError(f"--dcp {dcp} does not divide --tp {tp}", hint="DCP reuses the ranks of tensor parallelism")
    for cache in {cache for layer in model.layers for cache in layer.caches}:
        if isinstance(cache, AttentionCache) and cache.kind == "sliding":
            raise UnsupportedError(f"no decode context parallelism is known for {cache.kind} attention ({model.name})")
        if isinstance(cache, CompressedLatentCache):
            raise UnsupportedError(f"no decode context parallelism is known for compressed attention ({model.name})")
        if isinstance(cache, AttentionCache) and tp // cache.num_kv_heads < dcp:
            raise UnsupportedError(
                f"--dcp {dcp} needs every KV head on {dcp} ranks: {cache.num_kv_heads} KV heads over --tp {tp} have "
                f"{max(tp // cache.num_kv_heads, 1)}",
                hint="DCP shards what TP replicates: raise --tp or lower --dcp",
            )
        if isinstance(cache, AttentionCache) and (each := cache.num_q_heads // cache.num_kv_heads) % dcp:
            raise UnsupportedError(f"--dcp {dcp} does not divide the {each} query heads of each KV head ({model.name})",
                                   hint="lower --dcp")  # fmt: skip


def _largest_divisor(value: int, limit: int) -> int:
    return next(d for d in range(min(value, limit), 0, -1) if value % d == 0)


def _requested_block(model: ModelConfig, fmt: KvFormat, options: EngineOptions, hybrid: bool) -> int:
    """The block size before hybrid alignment: the user's, or the attention backend's default."""
    requested = options.block_size_tokens
    kinds = model.cache_kinds
    if "compressed" in kinds:
        return _multiple_of(requested, V4_BLOCK_TOKENS, model)
    if "indexer" in kinds:
        return _multiple_of(requested, SPARSE_BLOCK_TOKENS if "mla" in kinds else M3_BLOCK_TOKENS, model)
    if fmt.name.startswith("turboquant") and not hybrid:
        return max(requested or DEFAULT_BLOCK_TOKENS, 2 * DEFAULT_BLOCK_TOKENS)
    if requested is not None:
        if requested % DEFAULT_BLOCK_TOKENS:
            raise InputError(
                f"--block-size {requested}: vLLM's attention backends take multiples of {DEFAULT_BLOCK_TOKENS}",
                hint="try --block-size 16, 32 or 64",
            )
        return requested
    sm = options.sm
    if "mla" in kinds:
        if sm is not None and 100 <= sm < 120:
            return 32
        return 64 if sm in (None, 90) and fmt.key_bits == 8 else DEFAULT_BLOCK_TOKENS
    widest = max(
        (c.head_dim for layer in model.layers for c in layer.caches if isinstance(c, AttentionCache)), default=0
    )
    return 64 if widest == 512 and fmt.name in ("fp8", "fp8_e4m3") and sm in (None, 90) else DEFAULT_BLOCK_TOKENS


def _multiple_of(requested: int | None, base: int, model: ModelConfig) -> int:
    if requested is not None and requested % base:
        raise UnsupportedError(
            f"--block-size {requested}: vLLM's backend for {model.architecture} takes multiples of {base} only",
            hint=f"leave --block-size out, or use {base}",
        )
    return requested or base


def _hybrid_block(context: _Context) -> tuple[int, str]:
    """``align × ⌈state page / (align × attention bytes per token)⌉``, and how it came about."""
    model, options = context.model, context.options
    state = max(
        state_bytes(c, options.tp_size, model.dtype) for layer in model.layers for c in layer.caches
        if isinstance(c, StateCache)
    )  # fmt: skip
    attention = next(
        _attention_page_of(c, context, 1) for layer in model.layers for c in layer.caches
        if isinstance(c, AttentionCache | LatentCache)
    )  # fmt: skip
    per_token = attention.page_bytes
    align = max(DEFAULT_BLOCK_TOKENS, context.block)
    if attention.kind == "mla":
        align = max(align, MLA_HYBRID_BLOCK_TOKENS)
    families = {c.family for layer in model.layers for c in layer.caches if isinstance(c, StateCache)}
    if "gdn" in families and uses_flashinfer_gdn(options):
        align = lcm(align, GDN_CHUNK_TOKENS)
    block = max(align * ceil_div(state, align * per_token), context.block)
    return block, f"{align} × ⌈{state:,} / ({align} × {per_token:,})⌉ = {block} tokens"


def _attention_page_of(cache: AttentionCache | LatentCache, context: _Context, block: int) -> Page:
    if isinstance(cache, LatentCache):
        return latent_page(cache, context.fmt, block, context.options)
    inline = cache.head_dim == cache.head_dim_v and context.model.family != "minimax_m3"
    return attention_page(cache, context.fmt, block, context.options.tp_size, inline_scales=inline)


def _members(context: _Context) -> list[Member]:
    """(layer index, page) of every cache-holding layer, in vLLM's registration order."""
    model = context.model
    skipped = _skipped_layers(context)
    sparse_layers = {
        i for i, layer in enumerate(model.layers) if any(isinstance(c, IndexerCache) for c in layer.caches)
    }  # fmt: skip
    members: list[Member] = []
    memo: dict[object, tuple[Page, ...]] = {}
    hybrid_page = 0
    for index, layer in enumerate(model.layers):
        for cache in layer.caches:
            key = (cache, index in skipped, index in sparse_layers)
            pages = memo.get(key)
            if pages is None:
                pages = _pages_of(cache, context, index in skipped, index in sparse_layers)
                memo[key] = pages
            members += [(index, page) for page in pages]
            hybrid_page = max(hybrid_page, *(p.page_bytes for p in pages if p.kind != "state"), 0)
    if context.hybrid:
        members = [(i, _padded_state(page, hybrid_page)) for i, page in members]
    return members


def _padded_state(page: Page, page_bytes: int) -> Page:
    return replace(page, padded_bytes=page_bytes) if page.kind == "state" and page.page_bytes < page_bytes else page


def _skipped_layers(context: _Context) -> frozenset[int]:
    """Layers TurboQuant leaves in 16 bits: the first and last two of a model without states."""
    if not context.fmt.name.startswith("turboquant") or context.hybrid:
        return frozenset()
    last = context.model.num_layers
    count = min(TURBOQUANT_SKIPPED_LAYERS, last // 2)
    return frozenset([*range(count), *range(last - count, last)])


def _pages_of(cache: object, context: _Context, skipped: bool, sparse: bool) -> tuple[Page, ...]:
    options, block = context.options, context.block
    if isinstance(cache, AttentionCache):
        fmt = KV_FORMATS["bfloat16"] if skipped else context.fmt
        inline = cache.head_dim == cache.head_dim_v and not (sparse and context.model.family == "minimax_m3")
        return (attention_page(cache, fmt, block, options.tp_size, inline_scales=inline),)
    if isinstance(cache, LatentCache):
        return (latent_page(cache, context.fmt, block, options),)
    if isinstance(cache, IndexerCache):
        return (indexer_page(cache, block, options.tp_size),)
    if isinstance(cache, StateCache):
        size = state_bytes(cache, options.tp_size, context.model.dtype)
        extra = context.model.extra.get("state_checkpoint_blocks", 0)
        return (Page("state", block, state_bytes=size, blocks_per_request=state_blocks(cache, options, extra),
                     tag=cache.family),)  # fmt: skip
    if isinstance(cache, CompressedLatentCache):
        return compressed_pages(cache, block, options.tp_size)
    raise TypeError(f"no page rule for {type(cache).__name__}")
