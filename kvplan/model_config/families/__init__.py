"""Which reader a config.json goes to. A new family is one entry here, and a small function beside the others if traits
do not describe it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvplan.errors import ConfigError, shorten
from kvplan.model_config.families.blocks import Parts
from kvplan.model_config.families.plain import LLAMA, TRAITS, read_plain
from kvplan.model_config.fields import Fields


@dataclass(frozen=True)
class Family:
    """A reader, and whether the family was guessed from fields rather than known."""

    name: str
    read: Callable[[Fields], Parts]
    guessed: bool = False


def _lazy(module: str, function: str) -> Callable[[Fields], Parts]:
    def read(fields: Fields) -> Parts:
        import importlib

        reader: Callable[[Fields], Parts] = getattr(
            importlib.import_module(f"kvplan.model_config.families.{module}"), function
        )
        return reader(fields)

    return read


_READERS: dict[str, Callable[[Fields], Parts]] = {
    "deepseek": _lazy("deepseek", "read_deepseek"),
    "deepseek_v4": _lazy("deepseek", "read_deepseek_v4"),
    "qwen_next": _lazy("hybrid", "read_qwen_next"),
    "nemotron_h": _lazy("hybrid", "read_nemotron_h"),
    "jamba": _lazy("hybrid", "read_jamba"),
    "kimi_linear": _lazy("hybrid", "read_kimi_linear"),
    "llama4": _lazy("special", "read_llama4"),
    "gemma4": _lazy("special", "read_gemma4"),
    "decilm": _lazy("special", "read_decilm"),
    "mimo_v2": _lazy("special", "read_mimo_v2"),
    "step3": _lazy("special", "read_step3"),
    "minimax_m3": _lazy("special", "read_minimax_m3"),
}

_ARCHITECTURES = {
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "DeepseekV32ForCausalLM": "deepseek",
    "KimiK25ForConditionalGeneration": "deepseek",
    "GlmMoeDsaForCausalLM": "deepseek",
    "Glm4MoeLiteForCausalLM": "deepseek",
    "MistralLarge3ForCausalLM": "deepseek",
    "Qwen3NextForCausalLM": "qwen_next",
    "Qwen3_5ForConditionalGeneration": "qwen_next",
    "Qwen3_5MoeForConditionalGeneration": "qwen_next",
    "NemotronHForCausalLM": "nemotron_h",
    "JambaForCausalLM": "jamba",
    "KimiLinearForCausalLM": "kimi_linear",
    "Llama4ForConditionalGeneration": "llama4",
    "Llama4ForCausalLM": "llama4",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Gemma4ForCausalLM": "gemma4",
    "DeciLMForCausalLM": "decilm",
    "NemotronNASForCausalLM": "decilm",
    "MiMoV2FlashForCausalLM": "mimo_v2",
    "MiMoV2ForCausalLM": "mimo_v2",
    "MiniMaxM3ForCausalLM": "minimax_m3",
    "MiniMaxM3SparseForCausalLM": "minimax_m3",
}
"""Architecture → reader, for the families that are more than traits."""

_PREFIXES = {"Step3p": "step3", "Step3P": "step3", "MiMoV2": "mimo_v2"}
"""Architectures whose class names vary behind a prefix."""

_MODEL_TYPES = {
    "deepseek_v4": "deepseek_v4", "deepseek_v2": "deepseek", "deepseek_v3": "deepseek", "deepseek_v32": "deepseek",
    "kimi_k2": "deepseek", "kimi_k25": "deepseek", "glm_moe_dsa": "deepseek", "glm4_moe_lite": "deepseek",
    "qwen3_next": "qwen_next", "qwen3_5": "qwen_next", "qwen3_5_text": "qwen_next", "qwen3_5_moe": "qwen_next",
    "qwen3_5_moe_text": "qwen_next", "nemotron_h": "nemotron_h", "jamba": "jamba", "kimi_linear": "kimi_linear",
    "llama4": "llama4", "llama4_text": "llama4", "gemma4": "gemma4", "gemma4_text": "gemma4",
    "nemotron-nas": "decilm", "deci": "decilm", "mimo_v2_flash": "mimo_v2", "mimo_v2": "mimo_v2",
    "step3p5": "step3", "step3p7": "step3", "minimax_m3": "minimax_m3",
}  # fmt: skip

_PLAIN_ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Mistral3ForConditionalGeneration": "mistral",
    "MinistralForCausalLM": "ministral", "MixtralForCausalLM": "mixtral", "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3VLForConditionalGeneration": "qwen3", "Qwen3VLMoeForConditionalGeneration": "qwen3_moe",
    "Qwen2_5_VLForConditionalGeneration": "qwen2", "MiMoForCausalLM": "mimo", "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text", "Gemma3ForConditionalGeneration": "gemma3_text",
    "Phi3ForCausalLM": "phi3", "GptOssForCausalLM": "gpt_oss", "MiniMaxM2ForCausalLM": "minimax_m2",
    "Glm4ForCausalLM": "glm4", "Glm4MoeForCausalLM": "glm4_moe", "Cohere2ForCausalLM": "cohere2",
    "Olmo2ForCausalLM": "olmo2", "Olmo3ForCausalLM": "olmo3", "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite", "SeedOssForCausalLM": "seed_oss", "Ernie4_5ForCausalLM": "ernie4_5",
    "Exaone4ForCausalLM": "exaone4", "HunYuanDenseV1ForCausalLM": "hunyuan_v1_dense",
    "CohereForCausalLM": "cohere", "Starcoder2ForCausalLM": "starcoder2",
    "GPTNeoXForCausalLM": "gpt_neox", "OPTForCausalLM": "opt", "BloomForCausalLM": "bloom", "GPT2LMHeadModel": "gpt2",
    "Qwen2VLForConditionalGeneration": "qwen2",
}  # fmt: skip

_NOT_PLAIN = {
    "mamba_d_state": "Mamba state layers", "ssm_state_size": "Mamba state layers", "state_size": "state layers",
    "linear_num_value_heads": "linear attention layers", "linear_attn_config": "linear attention layers",
    "kv_lora_rank": "latent attention", "compress_ratios": "compressed attention", "block_configs": "per-layer blocks",
    "hybrid_override_pattern": "hybrid layers", "attn_layer_period": "hybrid layers", "index_topk": "sparse attention",
    "sparse_attention_config": "sparse attention", "hybrid_layer_pattern": "mixed attention layers",
    "layers_block_type": "hybrid layers", "is_encoder_decoder": "an encoder", "rwkv_version": "state layers",
    "type_vocab_size": "an encoder", "image_size": "an image encoder",
    "attn_type_list": "mixed attention layers", "multi_query": "shared KV heads",
    "multi_query_attention": "shared KV heads", "multi_query_group_num": "shared KV heads",
    "num_kv_shared_layers": "layers that share a cache",
    "altup_num_inputs": "layers that share a cache", "conv_L_cache": "convolution state layers",
    "attention_head_dim_list": "per-layer heads", "use_cla": "layers that share a cache",
    "layer_group_size": "linear attention layers", "lru_width": "recurrent layers",
    "cross_attention_layers": "cross attention layers", "num_attention_groups": "shared KV heads",
}  # fmt: skip
"""Fields that say a layer keeps more than K and V, or none; an unknown family that has one is refused."""

_GENERATORS = ("CausalLM", "LMHead", "ConditionalGeneration", "LLM", "ChatGLM")
"""What the class name of a model that generates text contains."""


def find_family(architecture: str, outer_type: str, model_type: str, fields: Fields) -> Family:
    """The reader for a config, by architecture, then by model type, then by its fields.

    Raises:
        ConfigError: the family is unknown and its fields do not describe plain attention.

    """
    for key in (_ARCHITECTURES.get(architecture), _MODEL_TYPES.get(model_type), _MODEL_TYPES.get(outer_type)):
        if key is not None:
            return Family(key, _READERS[key])
    for prefix, key in _PREFIXES.items():
        if architecture.startswith(prefix):
            return Family(key, _READERS[key])
    plain = _PLAIN_ARCHITECTURES.get(architecture) or next((t for t in (model_type, outer_type) if t in TRAITS), None)
    if plain is not None:
        traits = TRAITS[plain]
        return Family(plain, lambda f: read_plain(f, traits))
    return _guess(architecture or model_type, fields, architecture)


def _guess(shown: str, fields: Fields, architecture: str = "") -> Family:
    if architecture and not any(word in architecture for word in _GENERATORS):
        raise ConfigError(
            f"{fields.where}: architectures names {shorten(architecture)!r}, which is no decoder that generates text",
            hint="kvplan sizes decoders; give --layers, --kv-heads and --head-dim if it is one after all",
        )
    for field, meaning in _NOT_PLAIN.items():
        value = fields.data.get(field)
        if value not in (None, False, 0, [], {}):
            family = shorten(shown or "without architectures")
            raise ConfigError(
                f"{fields.where}: unknown family {family!r} with {field} ({meaning})",
                hint="kvplan cannot know what its layers cache; give --layers, --kv-heads and --head-dim instead",
            )
    if not (
        fields.has("num_hidden_layers", "n_layer", "num_layers") and fields.has("hidden_size", "n_embd", "d_model")
    ):
        raise ConfigError(
            f"{fields.where}: is not a decoder's config.json (num_hidden_layers and hidden_size are needed)",
            hint="point --model at a Hugging Face config.json, or give --layers, --kv-heads and --head-dim",
        )
    return Family("plain", lambda f: read_plain(f, LLAMA), guessed=True)
