"""A plan is held against a server term by term; a cause is named only when its arithmetic fits."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from check.rendered import version_of, vllm_log

import kvplan
from kvplan import profiles
from kvplan.check.log import read_stream
from kvplan.check.reconcile import reconcile
from kvplan.check.result import CheckResult, Term
from kvplan.errors import InputError
from kvplan.terminal.check_view import show_check
from kvplan.terminal.plain import Page
from kvplan.units import GIB

SAME_GEOMETRY = {"hand--GLM-4.7": "glm-4.6", "hand--Qwen2.5-7B": "qwen2.5-7b"}
"""Rows whose configuration does not come with the data; GLM-4.7 has the layers and heads of GLM-4.6."""


def held(log: str, **given: Any) -> CheckResult:
    return reconcile(read_stream(io.BytesIO(log.encode()), "log"), given)


def term(result: CheckResult, name: str) -> Term:
    return next(term for term in result.terms if term.name == name)


def log(version: str = "0.11.0", model: str = "meta-llama/Llama-3.1-8B-Instruct", kv: float = 55.15,
        weights: float = 14.99, activation: float = 1.07, other: float = 0.07, fraction: float | None = 0.9,
        tokens: int | None = None) -> str:  # fmt: skip
    """A start-up of Llama 3.1 8B on an H100 as vLLM 0.11 logged it, with some numbers otherwise."""
    tokens = int(kv * GIB) // (2**21) * 16 if tokens is None else tokens  # 128 KiB a token, blocks of 16
    used = "" if fraction is None else (
        f"INFO [gpu_worker.py:391] Free memory on device (78.66/79.19 GiB) on startup. Desired GPU memory utilization "
        f"is ({fraction}, {79.19 * fraction:.2f} GiB). Actual usage is {weights} GiB for weight, {activation} GiB for "
        f"peak activation, {other} GiB for non-torch memory, and 0.67 GiB for CUDAGraph memory.\n"
    )  # fmt: skip
    return (
        f"INFO [core.py:77] Initializing a V1 LLM engine (v{version}) with config: model='{model}', max_seq_len=32768, "
        "tensor_parallel_size=1, kv_cache_dtype=auto, enable_prefix_caching=True\n"
        f"INFO [gpu_model_runner.py:2653] Model loading took {weights} GiB and 3.1 seconds\n"
        f"INFO [gpu_worker.py:298] Available KV cache memory: {kv} GiB\n"
        f"INFO [kv_cache_utils.py:864] GPU KV cache size: {tokens:,} tokens\n"
        f"INFO [kv_cache_utils.py:868] Maximum concurrency for 32,768 tokens per request: {tokens / 32768:.2f}x\n{used}"
    )


def test_memory_of_another_gpu_is_named_where_the_log_does_not_state_it() -> None:
    result = held(log(fraction=None), gpu="h200")
    assert [term.name for term in result.drifted] == ["kv_cache_bytes"]
    [cause] = result.causes
    assert cause.code == "gpu"
    assert "h100-sxm" in cause.message and "not h200" in cause.message
    assert held(log(fraction=None), gpu="h100").agrees
    stated = held(log(), gpu="h200")
    assert "gpu" not in {cause.code for cause in stated.causes}


def test_public_reports_agree_with_the_rules_of_their_version(data: Path) -> None:
    """From the text of each log and the model's configuration alone; what does not agree is listed with its cause."""
    drifted: dict[str, list[str]] = {}
    agreed = 0
    for line in (data / "vllm_logs.jsonl").read_text().splitlines():
        row = json.loads(line)
        folder = data / "model_configs" / str(row["oracle_config"])
        model = SAME_GEOMETRY.get(row["oracle_config"]) or (str(folder) if folder.is_dir() else None)
        if version_of(row) is None or model is None:
            continue
        result = held(vllm_log(row, model))
        if result.agrees:
            agreed += 1
        else:
            drifted[f"{row['model']} {row['max_model_len']}"] = [cause.code for cause in result.causes]
    assert agreed == 16
    assert drifted == {
        "Qwen3-235B-A22B-FP8 None": ["smallest_rank"],
        "deepseek-ai/DeepSeek-V4-Flash 262144": ["bytes_per_token"],
        "deepseek-ai/DeepSeek-V4-Flash 4096": ["bytes_per_token"],
    }


LOGS = Path(__file__).parent / "logs"
"""Numbers of public logs, with the lines of a start-up that matter here."""


def test_a_real_start_of_vllm_0_31_agrees_in_every_term() -> None:
    result = kvplan.check_log(LOGS / "vllm-0.31-llama-3.1-8b-a100.log", gpu="a100-80gb-sxm")
    assert result.agrees and len(result.terms) == 9
    assert result.report.number("overhead_bytes") == pytest.approx(0.26 * GIB, abs=0.001 * GIB)


def test_sparse_latent_attention_under_fp8_has_the_very_tokens_vllm_logs_when_the_gpu_is_named() -> None:
    """GLM-5.2 on four Blackwell GPUs: 50.62 GiB are 1,139,456 tokens. The estimates of memory are 17 GiB too low, and
    the three terms that are named add up to it.
    """
    path = LOGS / "vllm-0.26-glm-5.2-nvfp4-tp4-ep.log"
    result = kvplan.check_log(path, gpu="b200", gpu_memory_bytes=int(184.31 * GIB))
    tokens = term(result, "capacity_tokens")
    assert tokens.planned == tokens.observed == 1_139_456
    assert {t.name for t in result.drifted} == {"weights_bytes", "kv_cache_bytes"}
    assert [cause.code for cause in result.causes] == ["weights", "activations", "cuda_graphs"]
    unnamed = kvplan.check_log(path)
    assert unnamed.causes[0].code == "gpu_generation"


def test_real_starts_of_other_engines_are_held_within_the_tolerance() -> None:
    sglang = kvplan.check_log(LOGS / "sglang-0.4-llama-8b.log")
    assert sglang.agrees and term(sglang, "capacity_tokens").observed == 38141
    trtllm = kvplan.check_log(LOGS / "tensorrt-llm-0.17.log", num_layers=28, num_kv_heads=8, head_dim=256,
                              context_tokens=4096)  # fmt: skip
    assert trtllm.agrees and term(trtllm, "num_blocks").observed == 4607


def test_a_server_as_planned_agrees_in_every_term() -> None:
    result = held(log(), gpu="h100")
    assert result.agrees and not result.causes
    assert {t.name for t in result.terms} >= {"weights_bytes", "kv_cache_bytes", "capacity_tokens", "max_concurrency"}
    assert term(result, "capacity_tokens").planned == term(result, "capacity_tokens").observed == 451_776


def test_tokens_that_fit_another_kv_dtype_name_it() -> None:
    """55.15 GiB at 128 KiB a token are 451,776 tokens; 64 KiB (fp8) would be twice as many."""
    result = held(log(tokens=903_552), gpu="h100")
    assert {t.name for t in result.drifted} == {"capacity_tokens", "max_concurrency"}
    assert [cause.code for cause in result.causes] == ["kv_dtype"]
    assert "903,552" in result.causes[0].message and "fp8" in result.causes[0].message


def test_a_cache_that_fell_back_to_16_bits_is_named() -> None:
    result = held(log().replace("kv_cache_dtype=auto", "kv_cache_dtype=fp8"), gpu="h100")
    assert [cause.code for cause in result.causes] == ["kv_dtype"]
    assert "bfloat16, not fp8" in result.causes[0].message


def test_one_token_block_off_is_drift_and_has_no_cause() -> None:
    result = held(log(tokens=451_776 - 16 * 8), gpu="h100")
    assert "capacity_tokens" in {t.name for t in result.drifted}
    assert result.causes == ()


def test_the_default_fraction_of_another_version_is_named_when_the_log_states_none() -> None:
    """0.02 of an L4's 22.03 GiB are 0.44 GiB, a tenth of the KV memory that an 8B model leaves there."""
    kv = round(22.03 * 0.92 - 14.99 - 0.85, 2)
    result = held(log(kv=kv, fraction=None), gpu="l4")
    assert [t.name for t in result.drifted] == ["kv_cache_bytes"]
    assert "default_utilization" in {cause.code for cause in result.causes}
    assert "0.92" in next(c for c in result.causes if c.code == "default_utilization").message


def test_memory_in_use_before_the_start_is_named_as_another_process() -> None:
    failed = log().split("INFO [gpu_worker.py:298]")[0] + (
        "ERROR [core.py:708] ValueError: Free memory on device (58.10/79.19 GiB) on startup is less than desired GPU "
        "memory utilization (0.9, 71.27 GiB). Decrease GPU memory utilization.\n"
    )
    result = held(failed, gpu="h100")
    assert [t.name for t in result.drifted] == ["start"]
    assert [cause.code for cause in result.causes] == ["gpu_in_use"]
    assert "21.09 GiB of 79.19 GiB" in result.causes[0].message


def test_a_start_that_failed_as_the_plan_says_agrees() -> None:
    """70 B parameters of 16 bits are 131 GiB: no plan puts them on one H100."""
    failed = (
        "INFO [core.py:77] Initializing a V1 LLM engine (v0.11.0) with config: model='llama-3.1-70b', "
        "max_seq_len=32768, tensor_parallel_size=1, kv_cache_dtype=auto\n"
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 448.00 MiB. GPU 0 has a total capacity of 79.19 GiB\n"
    )
    assert held(failed).agrees


def test_memory_in_no_reported_term_is_named_with_its_size() -> None:
    result = held(log(kv=48.15), gpu="h100")
    assert [t.name for t in result.drifted] == ["kv_cache_bytes"]
    assert [cause.code for cause in result.causes] == ["unaccounted"]
    assert "6.99 GiB" in result.causes[0].message


def test_a_term_that_takes_most_of_the_difference_is_named() -> None:
    result = held(log(activation=7.07, kv=49.14), gpu="h100")
    assert {"kv_cache_bytes", "activation_bytes"} <= {t.name for t in result.drifted}
    assert [cause.code for cause in result.causes] == ["activations"]


def test_a_setting_that_differs_explains_what_follows_from_it() -> None:
    result = held(log(), gpu="h100", tp_size=2)
    assert [cause.code for cause in result.causes] == ["setting"]
    assert "2 was planned, the server runs 1" in result.causes[0].message
    assert {"weights_bytes", "kv_cache_bytes"} <= set(result.causes[0].terms)


@pytest.mark.parametrize("stated", ["llama-3-8b", "70b"])
def test_another_model_than_planned_is_drift_said_first_and_the_cause(stated: str) -> None:
    """Llama 3 8B has the very layers of 3.1: only the name tells."""
    result = held(log(), gpu="h100", model=stated)
    assert result.drifted[0].name == "model" and result.drifted[0].observed == "llama-3.1-8b"
    assert [cause.code for cause in result.causes] == ["setting"]
    assert "the server runs llama-3.1-8b" in result.causes[0].message
    explained = {"model", "weights_bytes", "kv_cache_bytes", "capacity_tokens", "max_concurrency"}
    assert set(result.causes[0].terms) == ({"model"} if stated == "llama-3-8b" else explained)


def test_the_servers_model_by_another_name_or_from_its_file_agrees(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(profiles.load("models", "llama-3.1-8b")["config"]))
    for stated in ("8b", "meta-llama/Llama-3.1-8B-Instruct", str(config)):
        result = held(log(), gpu="h100", model=stated)
        assert result.agrees and term(result, "model").verdict == "agrees"


def test_the_servers_model_stated_without_a_weight_format_has_the_weights_as_the_server_stores_them() -> None:
    quantised = log(model="RedHatAI/Llama-3.1-8B-Instruct-FP8-dynamic", weights=8.49, kv=61.65)
    result = held(quantised, gpu="h100", model="8b")
    assert result.agrees and result.notes == ("weights are planned as the server stores them: fp8",)
    stated = held(quantised, gpu="h100", model="8b", weight_dtype="bf16")
    assert {t.name for t in stated.drifted} == {"weights_bytes", "kv_cache_bytes"}


def test_a_model_whose_name_is_not_known_is_not_held_against_the_stated_one() -> None:
    result = held(log(model="/models/ours"), gpu="h100", model="8b")
    assert result.agrees and term(result, "model").verdict == "not checked"


def test_rough_estimates_say_what_they_were_held_to_and_are_not_called_within_the_tolerance() -> None:
    """1.44 GiB of activations against 0.24 pass as 5% of 72.91 GiB usable, 3.65 GiB, and not as 5% of themselves."""
    result = kvplan.check_log(LOGS / "vllm-0.31-llama-3.1-8b-a100.log", gpu="a100-80gb-sxm")
    activation = term(result, "activation_bytes")
    assert activation.verdict == "agrees" and (activation.relative or 0) > 4
    assert activation.note == "rough estimate, may be off by 3.65 GiB"
    shown = io.StringIO()
    show_check(Page(shown), result)
    assert "AGREES: 6 terms within tolerance, 3 rough estimates within 3.70 GiB" in shown.getvalue()
    rows = [line for line in shown.getvalue().splitlines() if "ok (rough)" in line]
    assert [row.split("  ")[0] for row in rows] == ["activation peak", "CUDA graphs", "other"]
    assert "rough, held to 5.0% of usable memory (3.70 GiB)" in shown.getvalue()


def test_what_is_usable_of_another_gpu_is_not_called_reported() -> None:
    for given, source in (({"gpu": "l4"}, "planned"), ({}, "reported")):
        result = kvplan.check_log(LOGS / "vllm-0.31-llama-3.1-8b-a100.log", **given)
        assert term(result, "usable_bytes").source == source


def test_what_says_nothing_of_the_kv_memory_agrees_with_nothing() -> None:
    """A log that ends before the KV line has its weights to compare, and no more."""
    result = held(log().split("INFO [gpu_worker.py:298]")[0], gpu="h100")
    assert [t.name for t in result.terms if t.verdict == "agrees"] == ["weights_bytes"]
    assert result.verdict == "inconclusive" and not result.agrees and not result.drifted
    assert json.loads(result.to_json())["verdict"] == "inconclusive"


def test_another_engine_than_planned_is_drift() -> None:
    assert held(log(), gpu="h100", engine="vllm").agrees
    assert [t.name for t in held(log(), gpu="h100", engine="sglang").drifted] == ["engine"]


def test_weights_quantised_at_the_start_are_planned_as_the_server_states_them() -> None:
    """8.0 B parameters of one byte and 16-bit embeddings are 8.46 GiB."""
    quantised = log(weights=8.49, kv=61.65).replace("enable_prefix", "quantization=fp8, enable_prefix")
    result = held(quantised, gpu="h100")
    assert result.agrees and result.plan.request.weight_dtype == "fp8"


def test_blocks_that_were_set_and_draft_models_are_said() -> None:
    told = log(tokens=160_000).replace("enable_prefix", "num_gpu_blocks_override=10000, enable_prefix")
    assert held(told, gpu="h100").causes[0].code == "blocks_override"
    drafting = log().replace("enable_prefix", "speculative_config=SpeculativeConfig(method='mtp'), enable_prefix")
    assert "speculatively" in held(drafting, gpu="h100").notes[0]


def test_weights_of_another_precision_are_named() -> None:
    result = held(log(weights=8.49, kv=61.65), gpu="h100")
    assert "weight_dtype" in {cause.code for cause in result.causes}


def test_the_requests_planned_for_are_held_against_the_servers_own_memory() -> None:
    """451,776 tokens hold 13 requests of 32,768."""
    enough, short = (held(log(), gpu="h100", context_tokens=32768, batch_size=n) for n in (13, 14))
    assert enough.agrees and not short.agrees
    assert (term(short, "batch_size").planned, term(short, "batch_size").observed) == (14, 13)
    hoped = held(log(), gpu="h100", context_tokens=32768, batch_size=14, kv_cache_dtype="fp8")
    assert term(hoped, "batch_size").observed == 13  # the server runs 16 bits, whatever was planned


def test_a_context_beyond_the_servers_longest_request_is_drift() -> None:
    result = held(log(), gpu="h100", context_tokens=65536)
    longest = term(result, "max_model_len_tokens")
    assert (longest.planned, longest.observed, longest.verdict) == (65536, 32768, "drifted")


def test_hub_ids_paths_and_cache_folders_find_the_model_they_name() -> None:
    cached = "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0e9e39f"
    for stated in (
        "/models/Llama-3.1-8B-Instruct",
        "RedHatAI/Llama-3.1-8B-Instruct-FP8-dynamic",
        "hugging-quants/Meta-Llama-3.1-8B-Instruct-FP8",
        cached,
    ):
        result = held(log(model=stated, weights=8.5 if "FP8" in stated else 14.99), gpu="h100")
        assert result.plan.model is not None and result.plan.model.name == "llama-3.1-8b"
        assert result.notes or "models--" in stated
    with pytest.raises(InputError, match="'/models/our-own-7b' is not known here") as error:
        held(log(model="/models/our-own-7b"))
    assert "--model" in (error.value.hint or "")


def test_sglangs_attention_over_data_parallel_ranks_is_planned_on_its_own_gpus() -> None:
    """``tp_size`` counts all eight: each holds the attention of one replica and an eighth of the experts."""
    text = (
        "[2025-07-14 05:49:03] server_args=ServerArgs(model_path='deepseek-ai/DeepSeek-V3', tp_size=8, dp_size=8, "
        "enable_dp_attention=True, ep_size=8, mem_fraction_static=0.758, chunked_prefill_size=2048, "
        "disable_radix_cache=True, max_running_requests=1024, context_length=8192)\n"
        "[2025-07-14 05:49:03 TP0] Load weight end. type=DeepseekV3ForCausalLM, avail mem=44 GB, mem usage=94.2 GB.\n"
    )
    result = held(text, gpu="h200")
    request = result.plan.request
    assert (request.tp_size, request.dp_size, request.ep, result.plan.answers.num_gpus) == (1, 8, True, 8)
    assert (request.enable_prefix_caching, request.max_num_batched_tokens, request.max_num_seqs) == (False, 2048, 128)
    assert term(result, "weights_bytes").verdict == "agrees"
    # since 0.5.20 a dict, since 0.5.22 with a width of its own and the ranks of data parallelism apart
    newer = text.replace("ServerArgs(", "{").replace(")\n", "}\n", 1).replace("dp_size=8", "dp_size=1, attn_dp_size=8")
    head, rest = newer.split("\n", 1)
    head = re.sub(r"(\w+)=(?!\{)", r"'\1': ", head)
    assert held(f"{head}\n{rest}", gpu="h200").plan.request == request
    replicas = held(text.replace("enable_dp_attention=True", "enable_dp_attention=False"), gpu="h200").plan.request
    assert (replicas.tp_size, replicas.dp_size, replicas.ep, replicas.max_num_seqs) == (8, 8, False, 1024)


def test_tokens_of_a_pool_are_those_of_each_rank_where_sglang_splits_contexts() -> None:
    """An eighth of the latents of every context on each GPU: the eight hold 8 times what the line of one says."""
    text = (
        "[2026-11-14 05:48:25] server_args={'model_path': 'deepseek-ai/DeepSeek-V3', 'tp_size': 8, 'dcp_size': 8}\n"
        "[2026-11-14 05:49:03 TP0] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 171008, KV size: 11.19 GB\n"
    )
    result = held(text, gpu="h200")
    assert result.plan.request.dcp_size == 8
    assert term(result, "capacity_tokens").verdict == "agrees"
    assert term(result, "capacity_tokens").observed == 8 * 171008


def test_sglang_and_tensorrt_llm_are_held_within_the_tolerance() -> None:
    """Qwen3-8B: 36 layers × 8 heads × 128 × 2 × 2 B = 147,456 B a token; 5.24 GiB are 38,156 tokens."""
    sglang = (
        "[2025-07-14 05:48:30] server_args=ServerArgs(model_path='Qwen/Qwen3-8B', tp_size=1)\n"
        "[2025-07-14 05:48:43] Load weight end. type=Qwen3ForCausalLM, dtype=torch.bfloat16, mem usage=15.30 GB.\n"
        "[2025-07-14 05:48:43] KV Cache is allocated. #tokens: 38141, K size: 2.62 GB, V size: 2.62 GB\n"
    )
    result = held(sglang)
    assert result.agrees and term(result, "capacity_tokens").source == "approximation"
    assert not held(sglang.replace("38141", "76282")).agrees
    # 62.99 GiB of 294,848 tokens are 224 KiB a token: 28 layers of 8 heads of 256, not Llama 2 7B's 512 KiB
    trtllm = "[TensorRT-LLM][INFO] [MemUsageChange] Allocated 62.99 GiB for max tokens in paged KV cache (294848).\n"
    assert not held(trtllm, model="llama-2-7b").agrees
    assert held(trtllm, num_layers=28, num_kv_heads=8, head_dim=256, context_tokens=4096).agrees


def test_nothing_to_compare_is_said_rather_than_passed() -> None:
    bare = "INFO [core.py:77] Initializing a V1 LLM engine (v0.11.0) with config: model='8b', max_seq_len=32768\n"
    with pytest.raises(InputError, match="nothing in it can be held against a plan"):
        held(bare)


def test_the_library_and_json_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    path.write_text(log(tokens=903_552))
    result = kvplan.check_log(path, gpu="h100")
    found = json.loads(result.to_json())
    assert found["verdict"] == "drifted" and found["schema_version"] == 1
    assert [t["name"] for t in found["terms"]] == [t.name for t in result.terms]
    assert found["reported"]["weights_bytes"]["where"].startswith("line 2: Model loading took 14.99 GiB")
    assert found["causes"][0]["code"] == "kv_dtype"


def test_another_gpu_than_planned_is_named_by_its_memory() -> None:
    """79.25 GiB where 139.80 were planned: 60.55 less."""
    log = Path(__file__).parent / "logs" / "vllm-0.31-llama-3.1-8b-a100.log"
    causes = {cause.code: cause.message for cause in kvplan.check_log(log, gpu="h200").causes}
    assert causes["other_gpu"].startswith("the server's GPU has 79.25 GiB, as a100-80gb-sxm or a100-80gb-pcie or h100")
    assert causes["gpu_memory"].startswith("GPU memory: 60.55 GiB less than planned")
    assert not kvplan.check_log(log, gpu="a100").causes
