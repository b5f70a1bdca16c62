"""Configurations that no profile holds: what is read of them, and what is refused or flagged instead of guessed.

Fields are those of the published config.json; parameters are those the model's authors or the Hub state.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Ran, model_folder

import kvplan
from kvplan.errors import ConfigError
from kvplan.model_config import resolve_model


def text(architecture: str, model_type: str, hidden: int, layers: int, heads: int, kv_heads: int, inner: int,
         vocab: int, **more: Any) -> dict[str, Any]:  # fmt: skip
    return {"architectures": [architecture], "model_type": model_type, "hidden_size": hidden, "dtype": "bfloat16",
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "intermediate_size": inner, "vocab_size": vocab, "max_position_embeddings": 131_072, **more}  # fmt: skip


QWEN2_VL = text("Qwen2VLForConditionalGeneration", "qwen2_vl", 3584, 28, 28, 4, 18_944, 152_064, vision_config={
    "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_chans": 3})  # fmt: skip
STARCODER2 = text("Starcoder2ForCausalLM", "starcoder2", 6144, 40, 48, 4, 24_576, 49_152, sliding_window=4096,
                  tie_word_embeddings=False, use_bias=True)  # fmt: skip
EXAONE4 = text("Exaone4ForCausalLM", "exaone4", 5120, 64, 40, 8, 27_392, 102_400, head_dim=128, sliding_window=4096,
               sliding_window_pattern="LLLG", tie_word_embeddings=False)  # fmt: skip
PHI4_MINI = text("Phi3ForCausalLM", "phi3", 3072, 32, 24, 8, 8192, 200_064, tie_word_embeddings=True,
                 sliding_window=262_144)  # fmt: skip
HUNYUAN = text("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", 4096, 32, 32, 8, 3072, 128_167, head_dim=128,
               num_experts=64, moe_topk=[8] * 32, num_shared_expert=[1] * 32, moe_intermediate_size=[3072] * 32,
               use_qk_norm=True, use_cla=False, tie_word_embeddings=True)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters", "bytes_per_token"),
    [
        # the tower is 1,280 wide: its hidden_size is the language model's
        (QWEN2_VL, 8_291_375_616, 28 * 4 * 256 * 2),
        # no gates in the MLPs
        (STARCODER2, 15_957_889_024, 0),
        (text("GPTNeoXForCausalLM", "gpt_neox", 6144, 44, 64, 64, 24_576, 50_432), 20_554_567_680, 44 * 64 * 192 * 2),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12,
          "vocab_size": 50_257}, 124_439_808, 12 * 12 * 128 * 2),
        (text("BloomForCausalLM", "bloom", 4096, 30, 32, 32, 16_384, 250_880), 7_069_016_064, 30 * 32 * 256 * 2),
        # LLLG: 16 of 64 layers are full
        (EXAONE4, 32_003_216_384, 16 * 8 * 256 * 2),
        # every layer has a window, though of more than the longest request
        (PHI4_MINI, 3_836_021_760, 0),
        # lists that repeat one value for each layer
        (HUNYUAN, 80_393_183_232, 32 * 8 * 256 * 2),
    ],
    ids=["qwen2-vl", "starcoder2", "gpt-neox", "gpt2", "bloom", "exaone4", "phi-4-mini", "hunyuan-a13b"],
)  # fmt: skip
def test_parameters_and_bytes_of_models_without_a_profile(
    config: dict[str, Any], parameters: int, bytes_per_token: int, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path, config)
    assert resolve_model(folder).num_parameters == pytest.approx(parameters, rel=0.01)
    plan = kvplan.size(model=folder, context_tokens=8192, compare=False)
    assert plan.kv_cache.bytes_per_token == bytes_per_token


def test_the_bytes_of_a_token_beyond_the_windows_are_said_to_be_so(kvplan_cli: Callable[..., Ran]) -> None:
    ran = kvplan_cli("size", "--model", "mistral-7b-v0.1", "--ctx", "2k", width=100)
    assert "0 B  beyond windows of 4,096 tokens; layers: 32 sliding × 8 heads" in ran.out
    assert "beyond windows" not in kvplan_cli("size", "--model", "gpt-oss-120b", "--ctx", "2k").out


@pytest.mark.parametrize(
    ("architecture", "field", "value", "why"),
    [
        ("MllamaForConditionalGeneration", "cross_attention_layers", [3, 8], "cross attention layers"),
        ("Step3TextForCausalLM", "num_attention_groups", 1, "shared KV heads"),
        ("RecurrentGemmaForCausalLM", "lru_width", 4096, "recurrent layers"),
        ("HunYuanMoEV1ForCausalLM", "use_cla", True, "share a cache"),
        ("ChatGLMModel", "multi_query_group_num", 2, "shared KV heads"),
        ("Glm5NextForCausalLM", "linear_attn_config", {"kda_layers": [1]}, "linear attention"),
        ("Qwen4ExpForCausalLM", "linear_num_value_heads", 32, "linear attention"),
    ],
)
def test_fields_of_an_unknown_family_that_say_more_than_plain_attention_refuse_it(
    architecture: str, field: str, value: Any, why: str, tmp_path: Path
) -> None:
    config = text(architecture, "new", 4096, 32, 32, 8, 14_336, 128_256, **{field: value})
    with pytest.raises(ConfigError, match=why) as error:
        kvplan.size(model=model_folder(tmp_path, config))
    assert "--layers" in (error.value.hint or "")


def test_an_unknown_family_of_plain_attention_is_planned_and_said_to_be_unknown(tmp_path: Path) -> None:
    config = text("DotsTwoForCausalLM", "dots2", 4096, 32, 32, 8, 14_336, 128_256)
    plan = kvplan.size(model=model_folder(tmp_path, config), context_tokens=8192)
    assert any("unknown family (DotsTwoForCausalLM)" in note for note in plan.model.notes)


def test_a_configuration_that_changed_and_another_of_the_same_relative_path_are_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {"here": 32, "there": 16}
    for folder, count in layers.items():
        model_folder(tmp_path / folder, text("LlamaForCausalLM", "llama", 4096, count, 32, 8, 14_336, 128_256))
        monkeypatch.chdir(tmp_path / folder)
        assert resolve_model("./config.json").num_layers == count
    model_folder(tmp_path / "there", text("LlamaForCausalLM", "llama", 4096, 8, 32, 8, 14_336, 128_256))
    os.utime("config.json", ns=(0, 1))
    assert resolve_model("./config.json").num_layers == 8


def test_mistral_large_3_is_of_deepseeks_kind(tmp_path: Path) -> None:
    config = text("MistralLarge3ForCausalLM", "mistral_large_3", 7168, 61, 128, 128, 16_384, 131_072,
                  kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
                  n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=4, moe_intermediate_size=4096,
                  first_k_dense_replace=3)  # fmt: skip
    folder = model_folder(tmp_path, config)
    assert resolve_model(folder).num_parameters == pytest.approx(673e9, rel=0.005)  # 675 B with its vision tower
    assert kvplan.size(model=folder, context_tokens=8192).kv_cache.bytes_per_token == 61 * 1152
