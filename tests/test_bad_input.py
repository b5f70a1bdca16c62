"""Bad input ends in one line on stderr that says what, where and what to try, and in a documented exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Ran, model_folder

import kvplan

KVPLAN = [sys.executable, "-m", "kvplan"]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
Cli = Callable[..., Ran]


def assert_one_line(ran: Ran, code: int = 2) -> str:
    """The error line, after the promises every error keeps."""
    assert ran.code == code, (ran.out, ran.err)
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith("\n")
    assert "Traceback" not in ran.err
    return ran.err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("hello", "is not JSON"),
        ("", "is not JSON"),
        (json.dumps(LLAMA)[:120], "is not JSON (line 1"),
        (b"\xff\xfe\x00\x01", "is not text"),
        ("[1, 2]", "must hold a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ('{"a":' * 100_000, "is not JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "is not JSON"),
        ("{}", "num_hidden_layers"),
    ],
)
def test_a_file_that_is_no_config_is_named(kvplan_cli: Cli, tmp_path: Path, config: str | bytes, said: str) -> None:
    folder = model_folder(tmp_path / "m", config)
    line = assert_one_line(kvplan_cli("size", "--model", folder, "--ctx", "4k"))
    assert f"{folder}/config.json" in line
    assert said in line


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"head_dim": -1}, "head_dim is -1"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": "128"}, "head_dim must be a whole number, not '128'"),
        ({"head_dim": float("nan")}, "head_dim must be a whole number, not nan"),
        ({"head_dim": float("inf")}, "head_dim must be a whole number, not inf"),
        ({"head_dim": 1e30}, "head_dim is 1e+30"),
        ({"head_dim": 10**30}, "head_dim is 1e+30"),
        ({"head_dim": 127.5}, "head_dim must be a whole number"),
        ({"head_dim": True}, "head_dim must be a whole number, not True"),
        ({"head_dim": [128]}, "head_dim must be a whole number"),
        ({"head_dim": {"a": 1}}, "head_dim must be a whole number"),
        ({"hidden_size": 4097}, "head_dim is missing and hidden_size 4097"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1e+09"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 7}, "num_key_value_heads (7) does not divide num_attention_heads (32)"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_window"),
        ({"layer_types": ["mystery"] * 32}, "layer_types[0]"),
        ({"layer_types": "all"}, "layer_types must be a list"),
        ({"architectures": 5}, "architectures must be a list"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object"),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
    ],
)
def test_a_lying_field_is_named_with_its_file(
    kvplan_cli: Cli, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    folder = model_folder(tmp_path / "m", {**LLAMA, **fields})
    line = assert_one_line(kvplan_cli("size", "--model", folder, "--ctx", "4k"))
    assert f"{folder}/config.json: " in line
    assert named in line


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12,
         "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522},
        {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072, "vocab_size": 30522, "type_vocab_size": 2},
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
         "d_model": 512, "num_layers": 6, "num_heads": 8, "vocab_size": 32128},
        {"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 768,
         "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "intermediate_size": 3072},
        {"architectures": ["ResNetForImageClassification"], "model_type": "resnet", "hidden_sizes": [256, 512]},
        {"architectures": ["RwkvForCausalLM"], "model_type": "rwkv", "hidden_size": 768, "num_hidden_layers": 12,
         "rwkv_version": 6, "vocab_size": 1000},
    ],
)  # fmt: skip
def test_a_model_of_the_wrong_family_is_refused(kvplan_cli: Cli, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = model_folder(tmp_path / "m", config)
    assert f"{folder}/config.json" in assert_one_line(kvplan_cli("size", "--model", folder, "--ctx", "512"))


def test_heads_that_do_not_divide_by_tp_name_the_field_the_file_and_a_size_that_would(
    kvplan_cli: Cli, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "m", LLAMA)
    line = assert_one_line(kvplan_cli("size", "--model", folder, "--tp", "3"))
    assert f"{folder}/config.json: num_attention_heads (32) does not divide by --tp 3" in line
    assert "try --tp 2" in line
    six = {**LLAMA, "num_attention_heads": 24, "num_key_value_heads": 6, "head_dim": 128}
    line = assert_one_line(kvplan_cli("size", "--model", model_folder(tmp_path / "k", six), "--tp", "4"))
    assert "num_key_value_heads (6)" in line
    line = assert_one_line(
        kvplan_cli("size", "--layers", "8", "--kv-heads", "8", "--head-dim", "128", "--ctx", "8k", "--tp", "3")
    )
    assert "num_key_value_heads (8) neither divides by nor divides --tp 3 (try --tp 2)" in line


def test_what_an_engine_does_not_start_with_is_refused(kvplan_cli: Cli) -> None:
    for command in ("size", "itl"):
        line = assert_one_line(kvplan_cli(command, "--model", "8b", "--gpu", "h100", "--ep"))
        assert "vLLM refuses --ep: llama-3.1-8b has no experts (leave out --ep)" in line
    steps = ["--max-num-seqs", "1024", "--max-num-batched-tokens", "512"]
    line = assert_one_line(kvplan_cli("size", "--model", "8b", "--gpu", "h100", "--ctx", "8k", *steps))
    assert "vLLM refuses --max-num-seqs 1,024 beyond --max-num-batched-tokens 512" in line
    sparse = ["--model", "deepseek-v3.2", "--gpu", "b200", "--tp", "8", "--ctx", "8k", "--engine", "sglang"]
    line = assert_one_line(kvplan_cli("size", *sparse, "--kv-cache-dtype", "fp8_e5m2"))
    assert "sglang has no KV-cache dtype fp8_e5m2 (it takes bfloat16, fp8, fp8_ds_mla, fp8_e4m3)" in line
    amd = ["--model", "8b", "--gpu", "mi300x", "--ctx", "8k"]
    line = assert_one_line(kvplan_cli("size", *amd, "--engine", "tensorrt-llm"))
    assert "TensorRT-LLM: it runs on NVIDIA GPUs only (--engine vllm or sglang)" in line
    fewest = kvplan_cli("size", "--model", "8b", "--ctx", "8k", "--engine", "tensorrt-llm").out
    assert "it runs on NVIDIA GPUs only: mi300x, mi325x, mi355x" in fewest
    report = kvplan_cli("report", *amd)
    assert report.code == 0 and "no launch line: it runs on NVIDIA GPUs only" in report.out
    assert "trtllm-serve" not in report.out


def test_an_explanation_of_a_sweep_is_refused_and_gpu_memory_is_offered_where_it_can_be_given(kvplan_cli: Cli) -> None:
    line = assert_one_line(kvplan_cli("size", "--model", "8b", "--gpu", "h100", "--ctx", "8k,16k", "--explain"))
    assert "--explain is of one plan" in line
    unknown = ["--model", "8b", "--gpu", "h1000", "--ctx", "8k"]
    assert "--gpu-memory" in assert_one_line(kvplan_cli("size", *unknown))
    assert "--gpu-memory" not in assert_one_line(kvplan_cli("itl", *unknown))


def test_options_that_would_be_ignored_are_refused(kvplan_cli: Cli, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("")
    line = assert_one_line(kvplan_cli("check", "--log", str(log), "--seconds", "3"))
    assert "--seconds is of --url, and --log is given" in line
    load = ["--model", "8b", "--gpu", "h100", "--isl", "8k", "--osl", "1k", "--concurrency", "4"]
    line = assert_one_line(kvplan_cli("itl", *load, "--batch", "3"))
    assert "--batch and a load are both given" in line
    line = assert_one_line(kvplan_cli("report", "--model", "8b", "--gpu", "h100", "--format", "json"))
    assert "--format is of the pages of a scenario" in line


def test_a_gpu_of_many_gib_keeps_its_name(kvplan_cli: Cli) -> None:
    assert "1 × GPU with 2,048.00 GiB ·" in kvplan_cli("size", "--model", "8b", "--gpu-memory", "2TiB").out


@pytest.mark.parametrize(
    ("option", "value", "closest"),
    [
        ("--model", "lama-70b", "llama-70b"),
        ("--gpu", "h1000", "h100"),
        ("--kv-cache-dtype", "fp9", "fp8"),
        ("--kv-cache-dtype", "fp8_per_tokenhead", "fp8_per_token_head"),
        ("--engine", "vlm", "vllm"),
        ("--weight-dtype", "fp5", "fp8"),
    ],
)
def test_an_unknown_name_gets_the_closest_ones(kvplan_cli: Cli, option: str, value: str, closest: str) -> None:
    words = {"--model": "8b", "--ctx": "4k", option: value}
    line = assert_one_line(kvplan_cli("size", *(w for pair in words.items() for w in pair)))
    assert f"{value!r}" in line
    assert closest in line


@pytest.mark.parametrize(
    "words",
    [
        ("--ctx", "0"),
        ("--ctx", "-5"),
        ("--ctx", "abc"),
        ("--ctx", "1e5"),
        ("--ctx", "12.5"),
        ("--ctx", ""),
        ("--ctx", ","),
        ("--ctx", "10000000000000"),
        ("--ctx", "32k,zero"),
        ("--batch", "0"),
        ("--batch", "many"),
        ("--batch", ""),
        ("--gpu", ""),
        ("--tp", "0"),
        ("--tp", "-1"),
        ("--tp", "9999999999999"),
        ("--tp", ""),
        ("--pp", "33"),
        ("--dcp", "2"),
        ("--block-size", "0"),
        ("--block-size", "7"),
        ("--gpu-memory", "-3"),
        ("--gpu-memory", "lots"),
        ("--kv-cache-memory-bytes", "0"),
        ("--gpu-memory-utilization", "0"),
        ("--gpu-memory-utilization", "1.5"),
        ("--gpu-memory-utilization", "nan"),
        ("--gpu-memory-utilization", "half"),
        ("--engine-version", "latest"),
        ("--max-num-seqs", "0"),
        ("--params", "many"),
        ("--params", "80B"),
        ("--window", "4k"),
        ("--layers", "3"),
        ("--no-such-option", "3"),
        ("--ctx", "64k", "--max-model-len", "32k"),
        ("--tp", ",".join(map(str, range(1, 1200)))),
        ("--gpu", "h100", "--kv-cache-dtype", "nvfp4"),
        ("--kv-cache-dtype", "fp32"),
    ],
)
def test_an_impossible_option_ends_with_2(kvplan_cli: Cli, words: tuple[str, ...]) -> None:
    assert_one_line(kvplan_cli("size", "--model", "8b", *words))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("size --block-size 0", "--block-size must be between 1 and"),
        ("size --page-size=0", "--page-size must be between 1 and"),
        ("size --tensor-parallel-size 9999", "--tensor-parallel-size must be between 1 and 4,096"),
        ("size --mem-fraction-static 2", "--mem-fraction-static must be above 0"),
        ("itl --gpu h100 --attention-dp -1", "--attention-dp must be between 1 and"),
        ("report --gpu h100 --users 0", "--users must be between 1 and"),
        ("report --gpu h100 --batch 0", "--batch must be between 1 and"),
    ],
)
def test_an_error_calls_a_field_by_the_option_as_it_was_typed(kvplan_cli: Cli, words: str, says: str) -> None:
    assert assert_one_line(kvplan_cli(*words.split(), "--model", "8b")).startswith(f"error: {says}")


def test_a_model_without_its_option_is_told_it(kvplan_cli: Cli) -> None:
    assert "(write --model NAME, or see `" in assert_one_line(kvplan_cli("size", "70b"))
    assert "--model" not in assert_one_line(kvplan_cli("models", "70b"))


@pytest.mark.parametrize("command", ["size", "itl", "report", "check"])
def test_every_spelling_of_an_option_is_one_field(command: str) -> None:
    """What a scenario may call a field, and what an error calls it, is what the command line calls it."""
    import typer

    from kvplan.cli.commands import make_app
    from kvplan.memory.request import OPTION_NAMES

    found = typer.main.get_command(make_app([command]))
    options = getattr(found, "commands", {command: found})[command].params
    spelled = [[flag[2:].replace("-", "_") for flag in option.opts if flag.startswith("--")] for option in options]
    assert len(spelled) > 10
    assert [names for names in spelled if len({OPTION_NAMES.get(name, name) for name in names}) > 1] == []


@pytest.mark.parametrize("ctx", ["1k..8k", "8k,16k", "8,16"])
def test_a_report_of_several_contexts_is_refused_with_what_takes_them(kvplan_cli: Cli, ctx: str) -> None:
    line = assert_one_line(kvplan_cli("report", "--model", "8b", "--gpu", "h100", "--ctx", ctx))
    assert "this command plans one (write --ctx 32k; `kvplan size` and `kvplan itl` take lists and ranges)" in line


@pytest.mark.parametrize("option", [("--max-model-len", "1k..4k"), ("--max-num-batched-tokens", "8k,16k")])
def test_several_values_of_an_option_that_no_command_takes_lists_of_point_nowhere_else(
    kvplan_cli: Cli, option: tuple[str, str]
) -> None:
    line = assert_one_line(kvplan_cli("size", "--model", "8b", *option))
    assert line.rstrip().endswith(f"this command plans one (write {option[0]} 32k)")


@pytest.mark.parametrize("command", ["size", "itl"])
def test_a_range_of_contexts_doubles_and_has_both_ends(kvplan_cli: Cli, command: str) -> None:
    ran = kvplan_cli(command, "--model", "8b", "--gpu", "h100", "--ctx", "1k,2k..12k", "--json").json
    plans = ran["plans"] if command == "size" else ran["lines"][0]["points"]
    assert [(plan.get("request") or plan)["context_tokens"] for plan in plans] == [1024, 2048, 4096, 8192, 12288]


@pytest.mark.parametrize("ctx", ["1k..", "..8k", "8k..1k", "1k..8k..16k"])
def test_what_is_no_range_is_one_line(kvplan_cli: Cli, ctx: str) -> None:
    assert_one_line(kvplan_cli("size", "--model", "8b", "--ctx", ctx))


def test_commas_stand_between_thousands_only() -> None:
    """``1,5GiB`` is neither 15 GiB nor 1.5."""
    assert kvplan.size(model="8b", context_tokens="1,048,576").answers.context_tokens == 2**20
    for field, text in (("context_tokens", "8,16"), ("context_tokens", "1,0000"), ("gpu_memory_bytes", "1,5GiB")):
        with pytest.raises(kvplan.KvplanError, match=f"{field} '{text}' is not a"):
            kvplan.size(model="8b", **{field: text})


def test_10_to_the_12_tokens_is_answered_and_said_to_be_beyond_the_model(kvplan_cli: Cli) -> None:
    ran = kvplan_cli("size", "--model", "8b", "--gpu", "h100", "--ctx", "1000000000000", "--json")
    assert ran.code == 0
    assert ran.json["fits"] is False
    assert "beyond_model_context" in {advice["code"] for advice in ran.json["advice"]}


def test_check_ends_with_1_when_it_does_not_fit_and_the_answer_is_complete(kvplan_cli: Cli) -> None:
    ran = kvplan_cli("size", "--model", "70b", "--gpu", "a10", "--ctx", "4k", "--check", "--json")
    assert ran.code == 1
    assert ran.json["fits"] is False
    assert ran.err.count("\n") == 1
    assert kvplan_cli("size", "--model", "70b", "--gpu", "a10", "--ctx", "4k").code == 0
    assert kvplan_cli("size", "--model", "8b", "--gpu", "h100", "--ctx", "4k", "--check").code == 0


@pytest.mark.parametrize("command", ["size --batch 500", "size", "size --ctx 8k,16k", "report --concurrency 500"])
def test_kv_memory_that_the_gpu_does_not_have_is_a_no(kvplan_cli: Cli, command: str) -> None:
    ran = kvplan_cli(*f"{command} --model 8b --gpu h100 --kv-cache-memory-bytes 1000GiB --check".split())
    assert ran.code == 1
    assert "937.90 GiB more than each GPU has left" in ran.out or "," in command
    assert "FITS:" not in ran.out and "Yes:" not in ran.out and "yes" not in ran.out


@pytest.mark.parametrize("command", ["size --batch 64 --ctx 1k", "report --concurrency 64 --ctx 1k"])
def test_users_that_the_scheduler_does_not_run_at_once_are_a_no(kvplan_cli: Cli, command: str) -> None:
    ran = kvplan_cli(*f"{command} --model 8b --gpu h200 --max-num-seqs 16 --check".split())
    assert ran.code == 1 and "the rest wait" in ran.out


def test_what_would_fit_on_the_same_gpus_comes_before_more_of_them(kvplan_cli: Cli) -> None:
    """Four KV heads on eight ranks are stored twice; what DCP wins back is enough for 16 requests."""
    question = ["size", "--model", "qwen3-235b-a22b", "--gpu", "h100", "--tp", "8", "--ctx", "32k", "--batch", "16"]
    ran = kvplan_cli(*question, "--json")
    advice = next(advice for advice in ran.json["advice"] if advice["code"] == "does_not_fit")
    assert "it would fit with --dcp 2 or --tp 16 or --kv-cache-dtype fp8" in advice["message"]
    assert ran.json["fits"] is False
    assert kvplan_cli(*question, "--dcp", "2", "--json").json["fits"] is True


@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm"])
def test_context_parallelism_is_not_advised_where_its_rules_were_not_read(kvplan_cli: Cli, engine: str) -> None:
    question = ["--model", "qwen3-235b-a22b", "--gpu", "h100", "--tp", "8", "--ctx", "32k", "--engine", engine]
    said = kvplan_cli("size", *question, "--batch", "20", "--json").out
    assert "it would fit with --tp 16" in said and "stores every KV head twice; data-parallel attention" in said
    report = kvplan_cli("report", *question, "--concurrency", "20").out
    assert "more ranks than KV heads" in report
    assert "--dcp" not in said + report and "DCP" not in said + report and "context parallel" not in report


def test_missing_hardware_ends_with_4(kvplan_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "--gpu-memory 80GiB" in assert_one_line(kvplan_cli("size", "--model", "8b", "--gpu", "local"), 4)


@pytest.mark.parametrize("reference", ["./nope.json", "no/such/folder", "x" * 5000, "a\x00b", "../", "", "~nobody/x"])
def test_a_model_that_is_not_there_is_said_to_be_missing(kvplan_cli: Cli, offline: Path, reference: str) -> None:
    assert_one_line(kvplan_cli("size", "--model", reference, "--ctx", "4k"))


def test_a_folder_without_a_config_says_what_it_must_hold(kvplan_cli: Cli, tmp_path: Path) -> None:
    assert "must hold a config.json" in assert_one_line(kvplan_cli("size", "--model", str(tmp_path)))


def test_nothing_in_a_model_folder_is_executed(kvplan_cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    config = {**LLAMA, "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}
    model_folder(folder, config)
    (folder / "configuration_evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    assert kvplan_cli("size", "--model", str(folder), "--ctx", "4k").code == 0
    assert not (folder / "ran").exists()


def test_offline_says_what_was_tried_and_how_to_go_on(kvplan_cli: Cli, offline: Path) -> None:
    line = assert_one_line(kvplan_cli("size", "--model", "meta-llama/Llama-9-70B", "--ctx", "4k"))
    for part in (str(offline), "bundled profiles", "HF_HUB_OFFLINE is set", "--model ./config.json"):
        assert part in line


def test_offline_makes_no_connection(kvplan_cli: Cli, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert kvplan_cli("size", "--model", "nobody/nothing", "--ctx", "4k").code == 2
    assert kvplan_cli("size", "--model", "meta-llama/Llama-3.1-8B", "--ctx", "4k").code == 0


# ------------------------------------------------------------------------------------------------------- --cases


def test_a_bad_case_yields_an_error_in_its_place_and_the_rest_goes_on(kvplan_cli: Cli, tmp_path: Path) -> None:
    good = {"model": "8b", "gpu": "h100", "context_tokens": 4096}
    lines = [
        json.dumps(good),
        "not json",
        "[1]",
        json.dumps({**good, "model": "nope"}),
        json.dumps({**good, "tp_size": 3}),
        json.dumps({**good, "tp": 8}),
        json.dumps({**good, "context_tokens": -1}),
        json.dumps({**good, "context_tokens": 1e300}),
        json.dumps({**good, "enable_prefix_caching": "yes"}),
        '{"model": "8b", "gpu_memory_utilization": NaN}',
        "[" * 50_000,
        "null",
        json.dumps({**good, "id": "last"}),
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(lines) + "\n")
    ran = kvplan_cli("size", "--cases", str(path))
    assert (ran.code, ran.err) == (0, "11 of 13 cases failed\n")
    results = [json.loads(line) for line in ran.out.splitlines()]
    assert len(results) == len(lines)
    assert results[0]["kv_cache"]["bytes_per_token"] == 131_072
    assert results[-1]["request"]["id"] == "last"
    for number, result in enumerate(results[1:-1], 2):
        assert set(result["error"]) == {"code", "message", "hint"}, number
        assert result["error"]["message"]


@pytest.mark.parametrize("command", ["size", "itl"])
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("id", "NaN", "id must be text or a whole number, not nan"),
        ("id", "[1]", "id must be text or a whole number, not [1]"),
        ("id", "true", "id must be text or a whole number, not True"),
        ("max_model_len_tokens", "1.5", "max_model_len_tokens must be a whole number, not 1.5"),
        ("max_model_len_tokens", "{}", "max_model_len_tokens must be a whole number, not {}"),
        ("context_tokens", "Infinity", "context_tokens must be a whole number, not inf"),
    ],
)
def test_a_field_of_another_type_is_the_error_of_its_case_alone(
    kvplan_cli: Cli, tmp_path: Path, command: str, field: str, value: str, said: str
) -> None:
    good = {"model": "8b", "gpu": "h100", "context_tokens": 4096, "batch_size": 1}
    bad = json.dumps({name: each for name, each in good.items() if name != field})[:-1] + f', "{field}": {value}}}'
    path = tmp_path / "cases.jsonl"
    path.write_text(f"{bad}\n{json.dumps(good)}\n")
    ran = kvplan_cli(command, "--cases", str(path))
    assert (ran.code, ran.err) == (0, "1 of 2 cases failed\n")
    failed, answered = (json.loads(line) for line in ran.out.splitlines())
    assert failed["error"]["message"] == said and "error" not in answered


def test_cases_are_read_from_stdin_too() -> None:
    done = subprocess.run(
        [*KVPLAN, "size", "--cases", "-"], input='{"model": "8b", "context_tokens": 16}\n', text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["kv_cache"]["blocks_per_request"] == 1


def test_a_cases_file_that_cannot_be_read_ends_with_2(kvplan_cli: Cli, tmp_path: Path) -> None:
    assert_one_line(kvplan_cli("size", "--cases", str(tmp_path / "nope.jsonl")))
    assert_one_line(kvplan_cli("size", "--cases", str(tmp_path)))


def test_a_closed_pipe_ends_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text('{"model": "8b", "context_tokens": 16}\n' * 3000)
    with subprocess.Popen(
        [*KVPLAN, "size", "--cases", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        process.wait(timeout=30)
    assert error == ""
    assert process.returncode == 141  # 128 + SIGPIPE, as shells have it


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="not measured: no /dev/full here")
@pytest.mark.parametrize("command", ["size --model 8b", "models", "dtypes", "profiles", "size --model 8b --json", "-h"])
def test_a_full_disk_under_stdout_ends_with_2_and_one_line(command: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*KVPLAN, *command.split()], stdout=full, stderr=subprocess.PIPE, text=True)
    line = assert_one_line(Ran(done.returncode, "", done.stderr))
    assert "output cannot be written: No space left" in line


@pytest.mark.parametrize("command", ["size", "itl --gpu h100", "size --json"])
def test_a_name_that_is_no_text_is_shown_with_a_question_mark(command: str, tmp_path: Path) -> None:
    """A file system takes any bytes; a terminal of strict UTF-8 does not."""
    folder = model_folder(tmp_path / os.fsdecode(b"model-\xff"), LLAMA)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*KVPLAN, *command.split(), "--model", folder, "--ctx", "8k"], capture_output=True,
                          env=environment)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("model-\\udcff" if "--json" in command else "model-?") in done.stdout.decode()


@pytest.mark.parametrize("command", ["size --from-log", "check --log"])
def test_a_log_without_lines_is_refused_before_it_ends(command: str) -> None:
    done = subprocess.run([*KVPLAN, *command.split(), "/dev/zero"], capture_output=True, text=True, timeout=60)
    line = assert_one_line(Ran(done.returncode, done.stdout, done.stderr))
    assert "/dev/zero: no line ends in 256 MiB" in line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("command", ["-h", "size --model 8b --gpu h100 --explain", "itl --model 8b --gpu h100",
                                     "dtypes", "report --model 8b --gpu h100 --ctx 8k"])  # fmt: skip
def test_signs_that_an_encoding_lacks_are_spelled(encoding: str, command: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*KVPLAN, *command.split()], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    page = done.stdout.decode(encoding)
    assert "KV" in page
    questions = 1 if command == "-h" else 0  # the one that help asks
    assert page.count("?") <= questions


@pytest.mark.parametrize("command", ["size --cases", "calibrate --gpu h100 -o out.json"])
def test_a_file_that_never_ends_is_out_of_memory_in_one_line(command: str, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limit = 2 * 1024**3
    done = subprocess.run(
        [*KVPLAN, *command.split(), "/dev/zero"], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert "out of memory" in assert_one_line(Ran(done.returncode, done.stdout, done.stderr))


@pytest.mark.parametrize("closed", [1, 2])
def test_streams_that_were_closed_before_the_start_change_nothing_else(closed: int) -> None:
    command = f"{sys.executable} -m kvplan size --model nope {closed}>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("" if closed == 2 else done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["--help", "size --model 8b", "itl --model 8b --gpu h100 --ctx 1k", "profiles"])
def test_a_width_that_is_no_number_is_left_aside(kvplan_cli: Cli, command: str) -> None:
    assert kvplan_cli(*command.split(), env={"COLUMNS": "²"}).code == 0


@pytest.mark.parametrize("command", ["size --model 8b --gpu h100", "itl --model 8b --gpu h100 --ctx 1k"])
@pytest.mark.parametrize("word", ["²", "٣", "0", "-1", "1.5", "x", "1000000000000", "9" * 5000])
def test_counts_are_whole_numbers_within_a_stated_range(kvplan_cli: Cli, command: str, word: str) -> None:
    line = assert_one_line(kvplan_cli(*command.split(), "--batch", word))
    assert "is not a whole number from 1 to" in line
    assert len(line) < 200


@pytest.mark.parametrize("command", ["size", "itl"])
@pytest.mark.parametrize("option", ["--gpu h100,h1001", "--gpu h100 --kv-cache-dtype fp8,fp9"])
def test_an_unknown_name_in_a_list_is_a_slip_and_not_an_answer(kvplan_cli: Cli, command: str, option: str) -> None:
    assert "closest: " in assert_one_line(kvplan_cli(command, "--model", "8b", "--ctx", "8k", *option.split()))


@pytest.mark.parametrize("command", ["size", "itl", "report"])
def test_an_unknown_weight_dtype_is_answered_with_those_there_are(kvplan_cli: Cli, command: str) -> None:
    words = ["--model", "8b", "--gpu", "h100", "--ctx", "8k", "--weight-dtype", "foo"]
    assert "fp8_block" in assert_one_line(kvplan_cli(command, *words))


def test_a_model_in_python_may_be_a_path_object(tmp_path: Path) -> None:
    folder = Path(model_folder(tmp_path / "m", LLAMA))
    assert kvplan.size(model=folder).kv_cache.bytes_per_token == kvplan.size(model=str(folder)).kv_cache.bytes_per_token


def test_what_an_option_lacks_points_to_the_help_of_its_command(kvplan_cli: Cli) -> None:
    assert "see `kvplan size --help`" in assert_one_line(kvplan_cli("size", "--model"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("size --model 8b --block-size 1k", "'1k' is not a whole number (see "),
        ("check --log x --tp two", "'two' is not a whole number (see "),
        ("size --model 8b --gpu-memory-utilization most", "'most' is not a number (see "),
        ("check --log x --seconds soon", "'soon' is not a number (see "),
    ],
)
def test_what_is_no_number_is_called_that(kvplan_cli: Cli, words: str, said: str) -> None:
    assert said in assert_one_line(kvplan_cli(*words.split()))


@pytest.mark.parametrize("option", ["--block-size", "--ctx", "--gpu-memory-utilization", "--from-log", "--cases"])
@pytest.mark.parametrize("value", ["9" * 5000, "a" * 5000, "\x1b[31mred", "two\nlines", "\u202eright to left"])
def test_what_was_typed_comes_back_short_and_printable(kvplan_cli: Cli, option: str, value: str) -> None:
    words = ("size", option, value) if option == "--cases" else ("size", "--model", "8b", option, value)
    line = assert_one_line(kvplan_cli(*words))
    assert len(line) < 500 and line.rstrip("\n").isprintable()


def test_no_memory_at_all_is_not_taken_for_gibibytes(kvplan_cli: Cli) -> None:
    line = assert_one_line(kvplan_cli("size", "--model", "8b", "--gpu-memory", "0"))
    assert "between 1 byte and 1 EiB" in line


def test_the_script_keeps_its_promises_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The other tests run ``main`` in this process; this one is what a shell sees."""
    folder = model_folder(tmp_path / "m", {**LLAMA, "head_dim": -1})
    done = subprocess.run([*KVPLAN, "size", "--model", folder], text=True, capture_output=True,
                          env={**os.environ, "NO_COLOR": "1"})  # fmt: skip
    assert_one_line(Ran(done.returncode, done.stdout, done.stderr))


@pytest.mark.parametrize(
    "options",
    [
        ("size", "--ctx", "32,768"),
        ("size", "--ctx", "131,072"),
        ("size", "--ctx", "1,048,576"),
        ("size", "--batch", "1,024"),
        ("itl", "--gpu", "h200", "--ctx", "16,384"),
        ("itl", "--gpu", "h200", "--ctx", "262,144"),
    ],
)
def test_a_number_with_its_thousands_marked_is_not_taken_for_a_list(kvplan_cli: Cli, options: tuple[str, ...]) -> None:
    command, *rest = options
    line = assert_one_line(kvplan_cli(command, "--model", "8b", *rest))
    assert "reads as one number and as a list" in line
    assert f"write {rest[-1].replace(',', '')}, or" in line


@pytest.mark.parametrize("contexts", ["512,768", "32, 768", "1k,768", "4096,8192"])
def test_lists_of_contexts_stay_lists(kvplan_cli: Cli, contexts: str) -> None:
    ran = kvplan_cli("size", "--model", "8b", "--gpu", "h200", "--ctx", contexts)
    assert ran.code == 0, ran.err
    assert ran.out.count("768") >= 1 or "8k" in ran.out or "8,192" in ran.out
