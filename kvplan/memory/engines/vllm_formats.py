"""Which KV-cache formats vLLM 0.33 takes for which model on which GPU, and what it silently does with some.

Sources, under ``vllm/``: ``utils/torch_utils.py`` (``resolve_kv_cache_dtype_string``), ``platforms/cuda.py`` (backend
order), ``v1/attention/backends/*.py`` (``supported_kv_cache_dtypes``), ``models/deepseek_v4``, ``models/config.py``.
"""

from __future__ import annotations

from kvplan.dtypes import AUTO, KV_FORMATS, KvFormat, is_generic, kv_format
from kvplan.errors import UnsupportedError
from kvplan.memory.engines.options import EngineOptions
from kvplan.memory.engines.vllm_pages import rewrites_sparse_fp8
from kvplan.model_config.types import AttentionCache, ModelConfig

PER_TOKEN_HEAD = ("int8_per_token_head", "int4_per_token_head", "fp8_per_token_head")
FLASHINFER_HEAD_DIMS = (64, 128, 256, 512)


def resolve_auto(model: ModelConfig, options: EngineOptions) -> KvFormat:
    """The format ``--kv-cache-dtype`` means: itself, or what the checkpoint and the GPU make of ``auto``."""
    name = options.kv_cache_dtype
    is_v4 = "compressed" in model.cache_kinds
    if name != AUTO:
        fmt = kv_format(name)
        if is_v4 and fmt.name.startswith("fp8"):
            return KV_FORMATS["fp8_ds_mla"]
        return fmt
    if is_v4:
        return KV_FORMATS["fp8_ds_mla"]
    if model.quantization is not None and model.quantization.kv_cache_format in KV_FORMATS:
        return KV_FORMATS[model.quantization.kv_cache_format]
    if model.architecture == "GlmMoeDsaForCausalLM" and options.is_sm100_family:
        return KV_FORMATS["fp8"]
    return KV_FORMATS["float16" if model.dtype == "float16" else "bfloat16"]


def check_format(model: ModelConfig, fmt: KvFormat, options: EngineOptions) -> list[str]:
    """Refuse what vLLM refuses; return what it does silently.

    Raises:
        UnsupportedError: no attention backend takes ``fmt`` for this model on this GPU; says which rule.

    """
    reason = refusal(model, fmt, options)
    if reason is not None:
        raise UnsupportedError(f"vLLM refuses --kv-cache-dtype {fmt.name}: {reason}",
                               hint="see the comparison of `kvplan size` for the formats it takes")  # fmt: skip
    return _warnings(model, fmt, options)


def refusal(model: ModelConfig, fmt: KvFormat, options: EngineOptions) -> str | None:
    """Why vLLM takes no ``fmt`` here, or None when it does."""
    if is_generic(fmt) or fmt.name == "fp32":
        return "it has no such format (use --engine generic for the arithmetic)"
    kinds = model.cache_kinds
    if "compressed" in kinds:
        return None if fmt.name.startswith("fp8") else "DeepSeek-V4 layers store FP8 rows only"
    if "mla" in kinds:
        return _latent_refusal(model, fmt, options)
    if fmt.name.endswith("_ds_mla"):
        return "the format is for latent attention (DeepSeek, GLM-5)"
    return _attention_refusal(model, fmt, options)


def _latent_refusal(model: ModelConfig, fmt: KvFormat, options: EngineOptions) -> str | None:
    if "indexer" not in model.cache_kinds:
        allowed = ("bfloat16", "float16", "fp8", "fp8_e4m3")
        return None if fmt.name in allowed else "latent-attention backends take auto, bfloat16, fp8 and fp8_e4m3 only"
    sm = options.sm
    if sm is not None and sm < 90:
        return "sparse latent attention needs compute capability 9.0 or newer"
    if fmt.name == "nvfp4_ds_mla":
        on_amd = options.gpu is not None and options.gpu.vendor == "amd"
        return (
            None
            if options.is_sm100_family or (sm is None and not on_amd)
            else "the FP4 latent rows need a datacentre Blackwell GPU"
        )
    if fmt.name == "fp8_e4m3" and sm == 90:
        return "on sm90 sparse latent attention takes fp8 or fp8_ds_mla, not fp8_e4m3"
    if fmt.name == "fp8" and sm == 90 and options.kv_cache_dtype == AUTO and _resolved_by_modelopt(model):
        return "the checkpoint asks for fp8_e4m3, which sparse latent attention on sm90 does not take; pass fp8"
    if fmt.name in ("bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_ds_mla"):
        return None
    return "sparse latent attention takes auto, bfloat16, fp8, fp8_ds_mla and nvfp4_ds_mla only"


def _resolved_by_modelopt(model: ModelConfig) -> bool:
    return model.quantization is not None and model.quantization.method == "modelopt"


def _attention_refusal(model: ModelConfig, fmt: KvFormat, options: EngineOptions) -> str | None:
    sm, name = options.sm, fmt.name
    on_amd = options.gpu is not None and options.gpu.vendor == "amd"
    attention = {c for layer in model.layers for c in layer.caches if isinstance(c, AttentionCache)}
    kinds = {c.kind for c in attention}
    if name.startswith("nvfp4") and sm is not None and not options.is_sm100_family:
        return "NVFP4 KV needs a datacentre Blackwell GPU (sm100)"
    if name.startswith("nvfp4") and on_amd:
        return "NVFP4 KV needs a datacentre Blackwell GPU (sm100)"
    if name.startswith("turboquant") and kinds & {"sliding", "chunked"}:
        return "TurboQuant's backend has no sliding-window or chunked attention"
    if name == "fp8_per_token_head" and sm is not None and sm < 89:
        return "FP8 per-token-head needs compute capability 8.9 or newer (Ada, Hopper); int8_per_token_head does not"
    if name == "fp8_e5m2" and model.quantization is not None and (
        model.quantization.method in ("fp8", "modelopt") or model.quantization.kv_cache_format
    ):  # fmt: skip
        return "fp8_e5m2 is not taken with FP8 checkpoints"
    if name in ("fp8", "fp8_e4m3", "fp8_e5m2") and sm is not None and sm < 89:
        odd = sorted({c.head_dim for c in attention} - set(FLASHINFER_HEAD_DIMS))
        if odd:
            return f"below compute capability 8.9 only FlashInfer stores FP8, and not for head_dim {odd[0]}"
    if any(c.head_dim != c.head_dim_v for c in attention) and fmt.key_bits < 16:
        if name == "fp8_e5m2" or name.startswith("turboquant"):
            return "the backend for unequal K and V heads does not take it"
        if options.is_sm100_family:
            return "on sm100 the backend for unequal K and V heads takes 16-bit KV only"
    return None


def _warnings(model: ModelConfig, fmt: KvFormat, options: EngineOptions) -> list[str]:
    warnings = []
    asked = options.kv_cache_dtype
    if "compressed" in model.cache_kinds and asked not in (AUTO, "fp8_ds_mla"):
        warnings.append(f"vLLM silently replaces {asked} by fp8_ds_mla for {model.architecture}")
    if "indexer" in model.cache_kinds and asked in ("fp8", "fp8_e4m3") and rewrites_sparse_fp8(options):
        warnings.append(f"on this GPU vLLM stores {asked} as 656-byte fp8_ds_mla rows, not 576 bytes")
    uneven = any(
        isinstance(c, AttentionCache) and c.head_dim != c.head_dim_v for layer in model.layers for c in layer.caches
    )  # fmt: skip
    if fmt.name in PER_TOKEN_HEAD and (uneven or model.family == "minimax_m3"):
        warnings.append(f"vLLM takes {fmt.name} for {model.architecture} and stores 8-bit values with no scales")
    return warnings
