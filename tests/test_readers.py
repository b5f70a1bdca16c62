"""What is read from profiles, checkpoints and the hub cache; bytes derived by hand."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import model_folder

import kvplan
from kvplan import profiles
from kvplan.errors import ConfigError, ProfileError
from kvplan.gpu import gpu_from_profile, load_gpu, resolve_gpu
from kvplan.model_config import ModelConfig, read_model_config, resolve_model
from kvplan.weights import weight_bytes

MODELS = profiles.names("models")
GPUS = profiles.names("gpus")

# ------------------------------------------------------------------------------------------------ bundled profiles


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_right_to_half_a_percent(name: str) -> None:
    profile = profiles.load("models", name)
    counted = resolve_model(name).num_parameters
    for key in ("num_parameters", "published_parameters"):
        stated = profile.get(key)
        if stated is not None:
            assert profile[f"{key}_source"]
            assert abs(counted / stated - 1) <= 0.005, (key, counted, stated)
    assert profile.get("num_parameters") or profile.get("published_parameters")


def test_there_are_at_least_30_models_of_the_families_that_matter() -> None:
    families = {resolve_model(name).family for name in MODELS}
    assert len(MODELS) >= 30
    assert families >= {
        "llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen_next", "gemma2", "gemma3_text",
        "gemma4", "phi3", "deepseek", "deepseek_v4", "glm4_moe", "gpt_oss", "minimax_m2", "minimax_m3", "nemotron_h",
        "decilm", "mimo_v2", "jamba",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["models", "gpus"])
def test_names_aliases_and_hub_ids_are_unique(kind: str) -> None:
    owners: Counter[str] = Counter()
    for name in profiles.names(kind):
        data = profiles.load(kind, name)
        assert data["name"] == name
        owners.update({key.lower() for key in (name, *data.get("aliases", ()), *data.get("hf_ids", ()))})
    assert [key for key, count in owners.items() if count > 1] == []


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("70b", "llama-3.1-70b"),
        ("8b", "llama-3.1-8b"),
        ("405b", "llama-3.1-405b"),
        ("LLaMA-3.1-70B", "llama-3.1-70b"),
        ("meta-llama/llama-3.1-70b-instruct", "llama-3.1-70b"),
        ("qwen3-32b", "qwen3-32b"),
        ("gpt-oss-120b", "gpt-oss-120b"),
        ("r1", "deepseek-r1"),
    ],
)
def test_aliases_and_hub_ids_lead_to_a_profile(offline: Path, alias: str, name: str) -> None:
    assert resolve_model(alias).name == name


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_figure_has_a_source_and_a_date(name: str) -> None:
    spec = load_gpu(name)
    data = profiles.load("gpus", name)
    for field in ("memory_bytes", "memory_bandwidth_bytes_per_s"):
        assert data[field] is not None
        assert data["facts"][field]["source"]
        assert data["facts"][field]["date"]
    assert spec.memory_bytes == int(data["memory_bytes"])
    assert spec.vendor in ("nvidia", "amd")
    assert spec.sm is not None or spec.vendor == "amd"


def test_the_gpus_people_buy_are_there() -> None:
    for alias in ("a100-40gb", "a100-80gb", "h100", "h200", "b200", "l4", "l40s", "a10", "rtx-4090", "mi300x"):
        assert resolve_gpu(alias).memory_bytes > 20 * 10**9


@pytest.mark.parametrize("damage", [{"memory_bytes": None}, {"memory_bytes": -1}, {"name": 3}, {"schema_version": 99}])
def test_a_damaged_gpu_profile_names_its_field(damage: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match=next(iter(damage))):
        gpu_from_profile({**profiles.load("gpus", "l4"), **damage}, "GPU profile l4")


# ---------------------------------------------------------------------------------------------------- safetensors

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
LINEAR = 256 * 256 + 2 * 128 * 256 + 256 * 256 + 3 * 512 * 256  # q, k, v, o, gate, up, down of one layer
REST = 2 * 1024 * 256 + 256 + 2 * 2 * 256  # embedding, LM head, final norm, two norms a layer
assert LINEAR == 589_824


def write_safetensors(path: Path, sizes: dict[str, int], dtype: str = "U8") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in sizes.items():
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)  # headers only: the reader never touches the data


def test_safetensors_headers_give_exact_weights(tmp_path: Path) -> None:
    folder = Path(model_folder(tmp_path / "m", TINY))
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"model.a": 1000, "model.layers.0.b": 500})
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"lm_head.weight": 234})
    plan = kvplan.size(compare=False, model=str(folder), context_tokens=16)
    assert plan.memory.weights_bytes == 1734
    assert plan.memory.sources["weights_bytes"].source == "exact"


def test_multi_token_prediction_tensors_are_not_loaded(tmp_path: Path) -> None:
    # layers 0 and 1 are the model; layer 2 and mtp.* wait for speculative decoding
    folder = Path(model_folder(tmp_path / "m", TINY))
    write_safetensors(folder / "model.safetensors", {"model.layers.1.a": 100, "model.layers.2.a": 7, "mtp.b": 9})
    assert kvplan.size(compare=False, model=str(folder), context_tokens=16).memory.weights_bytes == 100


def test_a_bare_index_gives_its_total_and_stale_shards_are_not_counted(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 12345}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    folder = Path(model_folder(tmp_path / "m", TINY, **{"model.safetensors.index": index}))
    assert kvplan.size(compare=False, model=str(folder), context_tokens=16).memory.weights_bytes == 12345
    write_safetensors(folder / "model-00001-of-00001.safetensors", {"a": 77})
    write_safetensors(folder / "unrelated.safetensors", {"z": 10**9})
    resolve_model_uncached()
    assert kvplan.size(compare=False, model=str(folder), context_tokens=16).memory.weights_bytes == 77


def test_a_float32_checkpoint_is_loaded_in_16_bits(tmp_path: Path) -> None:
    """vLLM and SGLang cast float32 to 16 bits at start-up; the values of its files in 16 bits are left as they are."""
    wide = {**TINY, "torch_dtype": "float32"}
    folder = Path(model_folder(tmp_path / "m", wide))
    plan = kvplan.size(compare=False, model=str(folder), context_tokens=16)
    assert plan.memory.weights_bytes == 2 * (2 * LINEAR + REST)
    assert plan.model is not None and plan.model.notes[0].startswith("a float32 checkpoint: engines load 16 bits")
    write_safetensors(folder / "model-1.safetensors", {"model.a": 1000}, "F32")
    write_safetensors(folder / "model-2.safetensors", {"model.b": 30}, "BF16")
    resolve_model_uncached()
    assert kvplan.size(compare=False, model=str(folder), context_tokens=16).memory.weights_bytes == 530
    kept = model_folder(tmp_path / "k", wide)
    told = kvplan.size(compare=False, model=kept, context_tokens=16, weight_dtype="fp32").memory.weights_bytes
    assert told == 4 * 2 * LINEAR + 2 * REST


def resolve_model_uncached() -> None:
    """Forget the models read in this process: the test has changed the folder since."""
    from kvplan.model_config import resolve

    resolve._resolve.cache_clear()


@pytest.mark.parametrize(
    "content",
    [b"", b"1234", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"nope",
     struct.pack("<Q", 10) + b'{"a": {}}.'],
)  # fmt: skip
def test_a_corrupt_shard_is_named(tmp_path: Path, content: bytes) -> None:
    folder = Path(model_folder(tmp_path / "m", TINY))
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        kvplan.size(compare=False, model=str(folder), context_tokens=16)


# --------------------------------------------------------------------------------------------------- quantisation


def tiny(quantization: dict[str, Any] | None, hf_quant: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    config = {**TINY, **fields}
    if quantization is not None:
        config["quantization_config"] = quantization
    return read_model_config(config, where="config.json", name="tiny", source="test", hf_quant=hf_quant)


def test_bf16_takes_two_bytes_a_parameter() -> None:
    model = tiny(None)
    assert model.num_parameters == 2 * LINEAR + REST
    assert weight_bytes(model).total_bytes == 2 * (2 * LINEAR + REST)


@pytest.mark.parametrize(
    ("quantization", "linear_bytes"),
    [
        # one FP32 scale a matrix: 7 matrices
        ({"quant_method": "fp8", "activation_scheme": "static"}, LINEAR + 7 * 4),
        # 128 × 128 blocks: q and o 2×2, k and v 1×2, gate, up and down 4×2 each: 4+4+2+2+8+8+8 = 36 FP32 scales
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, LINEAR + 36 * 4),
        # one scale a row: 256 + 128 + 128 + 256 + 512 + 512 + 256 = 2,048
        ({"quant_method": "fbgemm_fp8"}, LINEAR + 2048 * 4),
        # half a byte, and per 128 inputs an FP16 scale and a 4-bit zero: 589,824 / 128 = 4,608 groups
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, LINEAR // 2 + 4608 * 2 + 4608 // 2),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, LINEAR // 2 + 9216 * 2 + 9216 // 2),
        # half a byte and an FP8 scale per 16: 36,864
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, LINEAR // 2 + 36_864),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 8, "type": "float", "strategy": "channel"}}}},
            LINEAR + 2048 * 4,
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}}}},
            LINEAR // 2 + 36_864,
        ),
    ],
)  # fmt: skip
def test_quantised_linears_pay_for_their_scales_and_the_rest_stays_in_16_bits(
    quantization: dict[str, Any], linear_bytes: int
) -> None:
    assert weight_bytes(tiny(quantization)).total_bytes == 2 * linear_bytes + 2 * REST


def test_modules_a_checkpoint_excludes_stay_in_16_bits() -> None:
    # down_proj (512 × 256) of both layers in bf16, the other six matrices in FP8 with a scale each
    excluded = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    model = tiny({"quant_method": "fp8", "modules_to_not_convert": excluded})
    down = 512 * 256
    assert weight_bytes(model).total_bytes == 2 * (LINEAR - down + 6 * 4 + 2 * down) + 2 * REST


def test_mxfp4_quantises_the_experts_only() -> None:
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    fields = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 8,
              "num_experts_per_tok": 2, "sliding_window": 128}  # fmt: skip
    plain, packed = tiny(None, **fields), tiny(quantization, **fields)
    # 2 layers × 8 experts × 3 matrices of 512 × 256: 2 B → 1/2 B + one byte per 32
    experts = 2 * 8 * 3 * 512 * 256
    assert weight_bytes(plain).total_bytes - weight_bytes(packed).total_bytes == 2 * experts - (
        experts // 2 + experts // 32
    )


def test_hf_quant_config_says_more_about_weights_than_config_json() -> None:
    hf_quant = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": {
            "model.layers.0.mlp.down_proj": {"quant_algo": "FP8"}}},
    }  # fmt: skip
    model = tiny(None, hf_quant)
    down = 512 * 256
    assert weight_bytes(model).total_bytes == 2 * (2 * LINEAR + REST) - down + 4
    assert model.quantization is not None
    assert model.quantization.kv_cache_format == "fp8"


def test_auto_follows_a_modelopt_checkpoint_and_not_a_bare_fp8_one(tmp_path: Path) -> None:
    # 2 layers × 2 heads × 128 elements
    modelopt = {**TINY, "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8",
                "kv_cache_scheme": {"type": "float", "num_bits": 8}}}  # fmt: skip
    fp8 = {**TINY, "quantization_config": {"quant_method": "fp8"}}
    for name, config, bytes_per_token in (("a", modelopt, 512), ("b", fp8, 1024)):
        folder = model_folder(tmp_path / name, config)
        plan = kvplan.size(compare=False, model=folder, context_tokens=16, gpu="h100")
        assert plan.kv_cache.bytes_per_token == bytes_per_token


def test_tensor_parallelism_splits_linears_and_replicates_norms() -> None:
    # TP 4 on 2 KV heads: k and v keep one head (64 rows); the vocabulary is a multiple of 64
    model = tiny(None)
    column = (256 * 256 + 2 * 512 * 256 + 256 * 256 + 512 * 256) // 4  # q, gate, up, o, down
    kv = 2 * 64 * 256
    norms = 2 * 2 * 256 + 256
    assert weight_bytes(model, tp_size=4).total_bytes == 2 * (2 * (column + kv) + 2 * 1024 * 256 // 4 + norms)


def test_tied_embeddings_are_stored_once() -> None:
    assert tiny(None).num_parameters - tiny(None, tie_word_embeddings=True).num_parameters == 1024 * 256


# ------------------------------------------------------------------------------------------------------ hub cache


def cached(root: Path, hub_id: str, revision: str, config: dict[str, Any], main: bool = True) -> None:
    repo = root / f"models--{hub_id.replace('/', '--')}"
    model_folder(repo / "snapshots" / revision, config)
    if main:
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / "main").write_text(revision)


def test_a_cached_snapshot_is_used_before_the_profile_of_the_same_id(offline: Path) -> None:
    cached(offline, "meta-llama/Llama-3.1-8B", "abc123", {**TINY, "num_hidden_layers": 3})
    model = resolve_model("meta-llama/Llama-3.1-8B")
    assert model.num_layers == 3
    assert model.name == "meta-llama/Llama-3.1-8B"
    assert "abc123" in model.source


def test_refs_main_picks_the_snapshot(offline: Path) -> None:
    cached(offline, "some/model", "new", {**TINY, "num_hidden_layers": 5}, main=False)
    cached(offline, "some/model", "old", {**TINY, "num_hidden_layers": 4})
    assert resolve_model("some/model").num_layers == 4


def test_hf_hub_cache_overrides_hf_home(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    cached(tmp_path / "elsewhere", "some/other", "r", {**TINY, "num_hidden_layers": 6})
    assert resolve_model("some/other").num_layers == 6


def test_a_ref_that_climbs_out_of_the_cache_is_not_followed(offline: Path, tmp_path: Path) -> None:
    cached(offline, "some/climber", "good", TINY)
    model_folder(tmp_path / "outside", {**TINY, "num_hidden_layers": 9})
    (offline / "models--some--climber" / "refs" / "main").write_text("../../../../outside")
    assert resolve_model("some/climber").num_layers == 2
