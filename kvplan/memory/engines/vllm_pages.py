"""Bytes of each page under vLLM 0.33: softmax attention, latents, index keys, states, compressed latents.

Sources, under ``vllm/``: ``v1/kv_cache_interface.py``, ``model_executor/layers/mamba/mamba_utils.py`` (states),
``models/deepseek_v4`` (compressed attention).
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from kvplan.dtypes import KV_FORMATS, SCALAR_BYTES, KvFormat
from kvplan.memory.engines.options import EngineOptions
from kvplan.memory.engines.vllm_versions import CURRENT, VersionRules
from kvplan.memory.pages import Page
from kvplan.model_config.types import (
    AttentionCache,
    CompressedLatentCache,
    IndexerCache,
    LatentCache,
    StateCache,
)
from kvplan.units import ceil_div

V4_ALIGNMENT_BYTES = 576


def attention_page(cache: AttentionCache, fmt: KvFormat, block: int, tp: int, *, inline_scales: bool = True) -> Page:
    """The page of one softmax-attention layer: ``heads on the rank × block × (K + V bytes)``."""
    heads = max(1, cache.num_kv_heads // tp)
    tag = f"{fmt.name}:{cache.head_dim}:{cache.head_dim_v}"
    kind, window = cache.kind, cache.window_tokens or cache.chunk_tokens
    if not inline_scales:
        payload, scales = (cache.head_dim + cache.head_dim_v) * max(fmt.key_bits // 8, 1), 0
    else:
        payload = fmt.payload_bytes(cache.head_dim, cache.head_dim_v)
        scales = int(fmt.scale_bytes(cache.head_dim, cache.head_dim_v))
    return Page(kind, block, heads, payload, scales, window_tokens=window, tag=tag, even=fmt.even,
                num_copies=max(1, tp // cache.num_kv_heads))  # fmt: skip


def latent_page(cache: LatentCache, fmt: KvFormat, block: int, options: EngineOptions) -> Page:
    """The page of one latent-attention layer, replicated on every TP rank; there is no V."""
    width = cache.latent_dim + cache.rope_dim
    sparse = cache.top_k_tokens is not None
    if sparse and fmt.name in ("fp8", "fp8_e4m3") and rewrites_sparse_fp8(options):
        fmt = KV_FORMATS["fp8_ds_mla"]
    if fmt.name == "fp8_ds_mla":
        payload, scales = cache.latent_dim + 2 * cache.rope_dim, 4 * ceil_div(cache.latent_dim, 128)
    elif fmt.name == "nvfp4_ds_mla":
        payload, scales = cache.latent_dim // 2 + cache.rope_dim, cache.latent_dim // 16
    else:
        payload, scales = ceil_div(width * fmt.key_bits, 8), 0
    return Page("mla", block, 1, payload, scales, tag=f"{fmt.name}:{width}", num_copies=options.tp_size)


def rewrites_sparse_fp8(options: EngineOptions) -> bool:
    """Whether sparse latents in fp8 become 656-byte rows: FlashMLA's, so not on datacentre Blackwell and not on AMD
    (``model_executor/layers/attention/mla_attention.py``).
    """
    return not options.is_sm100_family and (options.gpu is None or options.gpu.vendor != "amd")


def indexer_page(cache: IndexerCache, block: int, tp: int) -> Page:
    """The keys a sparse-attention indexer keeps, replicated on every TP rank."""
    return Page("indexer", block, 1, cache.payload_bytes, cache.scale_bytes, tag=f"indexer:{cache.head_dim}",
                num_copies=tp)  # fmt: skip


def state_bytes(cache: StateCache, tp: int, model_dtype: str) -> int:
    """Bytes of one request's recurrent state on a rank (``mamba_utils.py``): convolution windows and the state."""
    element = SCALAR_BYTES[model_dtype]
    channels = cache.conv_channels
    if cache.conv_groups:
        groups = cache.conv_groups if cache.conv_groups % tp == 0 else tp
        channels += groups * cache.conv_group_dim
    conv = cache.conv_parts * (cache.conv_width - 1) * (channels // tp) * element
    state = prod(cache.state_shape) // tp * SCALAR_BYTES[cache.state_dtype or model_dtype]
    return conv + state


CHECKPOINT_BLOCKS = {"mamba1": 0, "mamba2": 1, "kda": 0, "lightning": 0, "short_conv": 0}
"""Blocks of prefill checkpoints a request holds beside its two states, under prefix caching."""


def uses_flashinfer_gdn(options: EngineOptions) -> bool:
    """Whether gated DeltaNet keeps FlashInfer's checkpoints: on Hopper and Blackwell under prefix caching, since 0.33
    (an unknown GPU is taken for Hopper). Elsewhere vLLM runs Triton, which keeps none (``qwen_gdn_linear_attn.py``).
    """
    if not options.enable_prefix_caching or not VersionRules(options.version or CURRENT).keeps_checkpoints("gdn"):
        return False
    if options.gpu is not None and options.gpu.vendor == "amd":
        return False
    return options.sm is None or options.sm >= 90


def state_blocks(cache: StateCache, options: EngineOptions, extra: int = 0) -> int:
    """Blocks of state one request holds: 2 + checkpoints under prefix caching, else 1."""
    rules = VersionRules(options.version or CURRENT)
    if not options.enable_prefix_caching or not rules.hybrid_prefix_caching:
        return 1
    if not rules.keeps_checkpoints(cache.family):
        return 2
    if cache.family == "gdn":
        return 3 if uses_flashinfer_gdn(options) else 2
    return 2 + max(CHECKPOINT_BLOCKS[cache.family], extra)


def compressed_pages(cache: CompressedLatentCache, block: int, tp: int) -> tuple[Page, ...]:
    """DeepSeek-V4's caches of one layer, in registration order: 584-byte rows, FP32 compressor rings, an indexer.

    Rows are 448 FP8 values, 64 bf16 RoPE values and 8 bytes of scales; pages are padded to 576 bytes.
    """
    rope = 64
    payload, scales = cache.head_dim - rope + 2 * rope, 8
    ring_heads = 2 if cache.ratio == 4 else 1
    ring_block, ring_window = (4, 8) if cache.ratio == 4 else (8, cache.ratio)
    pages: list[Page] = []
    if cache.ratio == 4:
        index_scale = 4 * ceil_div(cache.index_head_dim, 128)
        pages.append(Page("indexer", block, 1, cache.index_head_dim, index_scale, cache.ratio, tag="v4 indexer"))
        ring = 4 * 2 * ring_heads * cache.index_head_dim
        pages.append(Page("sliding_mla", ring_block, 1, ring, 0, window_tokens=ring_window, tag="v4 indexer ring"))
    pages.append(Page("sliding_mla", 64, 1, payload, scales, window_tokens=cache.window_tokens, tag="v4 window"))
    if cache.ratio:
        pages.append(Page("mla", block, 1, payload, scales, cache.ratio, tag="v4 latent"))
        ring = 4 * 2 * ring_heads * cache.head_dim
        pages.append(Page("sliding_mla", ring_block, 1, ring, 0, window_tokens=ring_window, tag="v4 ring"))
    return tuple(replace(page.padded_to_multiple(V4_ALIGNMENT_BYTES), num_copies=tp) for page in pages)
