"""Start-up logs are read as engines print them: several versions, ranks, starts, and damage on the way."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from check.rendered import vllm_log

from kvplan.check.log import read_log, read_stream
from kvplan.check.log_lines import ARGUMENT_LINES, LINES, NEEDLES
from kvplan.check.server import ServerReport
from kvplan.errors import InputError
from kvplan.units import GIB


def read(text: str | bytes) -> ServerReport:
    return read_stream(io.BytesIO(text if isinstance(text, bytes) else text.encode()), "log")


def test_every_public_report_is_read_back_from_its_own_wording(data: Path) -> None:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (data / "vllm_logs.jsonl").read_text().splitlines()]
    assert len(rows) >= 35
    for row in rows:
        report = read(vllm_log(row, "org/model"))
        assert report.engine == "vllm"
        assert report.number("kv_cache_bytes") == pytest.approx(row["available_gib"] * GIB, abs=1), row["source"]
        assert report.value("num_blocks") == row.get("num_gpu_blocks") or row["vllm_version"] != "0.6.x (V0)"
        if report.value("num_blocks") is None:
            assert report.value("capacity_tokens") == row["tokens"]
        if row["max_concurrency"] is not None:
            assert report.value("max_concurrency") == row["max_concurrency"]
            assert report.value("max_model_len_tokens") == row["max_model_len"]


V1_2025 = """\
(APIServer pid=1) INFO 09-23 18:12:01 [api_server.py:1896] vLLM API server version 0.11.0
(EngineCore_DP0 pid=3) INFO 09-23 18:12:20 [gpu_model_runner.py:2653] Model loading took 14.0849 GiB and 5.3 seconds
(EngineCore_DP0 pid=3) INFO 09-23 18:12:33 [gpu_worker.py:298] Available KV cache memory: 55.15 GiB
(EngineCore_DP0 pid=3) INFO 09-23 18:12:39 [gpu_model_runner.py:3118] Graph capturing finished in 5 secs, took 0.67 GiB
(EngineCore_DP0 pid=3) INFO 09-23 18:12:39 [gpu_worker.py:391] Free memory on device (78.66/79.19 GiB) on startup. \
Desired GPU memory utilization is (0.9, 71.27 GiB). Actual usage is 14.08 GiB for weight, 1.97 GiB for peak \
activation, 0.07 GiB for non-torch memory, and 0.67 GiB for CUDAGraph memory. Replace gpu_memory_utilization \
config with `--kv-cache-memory=58333988249` to fit into requested memory, or `--kv-cache-memory=66273897472` to \
fully utilize gpu memory. Current kv cache memory in use is 59212694937 bytes.
"""


def test_the_actual_usage_line_gives_every_term_and_exact_kv_bytes() -> None:
    report = read(V1_2025)
    gib = {"weights": 14.08, "activation": 1.97, "overhead": 0.07, "graph": 0.67, "total": 79.19, "free": 78.66}
    for name, value in gib.items():
        fact = report.facts[f"{name}_bytes"]
        assert fact.number == pytest.approx(value * GIB, abs=0.005 * GIB), name
    assert report.facts["kv_cache_bytes"].value == 59212694937
    assert report.facts["kv_cache_bytes"].error == 0
    assert report.value("gpu_memory_utilization") == 0.9


def test_newer_wording_without_separate_weights_leaves_what_is_not_weights_as_other() -> None:
    report = read(
        "(EngineCore pid=3) INFO 10-06 17:00:11 [model_runner.py:407] Model loading took 15.0 GiB memory and 5 s\n"
        "(EngineCore pid=3) INFO 10-06 17:00:33 [kv_cache_utils.py:2464] GPU KV cache size: 460,496 tokens, Maximum "
        "concurrency for 131,072 tokens per request: 3.51x\n"
        "(EngineCore pid=3) INFO [gpu_worker.py:955] Free memory on device (78.84/79.25 GiB) on startup. "
        "Desired GPU memory utilization is (0.92, 72.91 GiB). Actual usage is 15.26 GiB for consumed memory (weights + "
        "non-torch), 1.44 GiB for peak activation, and 0.23 GiB for CUDAGraph memory.\n"
    )
    assert report.number("overhead_bytes") == pytest.approx(0.26 * GIB, abs=0.001 * GIB)
    assert (report.value("capacity_tokens"), report.value("max_concurrency")) == (460496, 3.51)


def test_over_ranks_the_smallest_kv_and_the_largest_weights_count() -> None:
    report = read(
        "(Worker_TP1 pid=7) INFO 08-20 17:28:07 [gpu_worker.py:298] Available KV cache memory: 50.62 GiB\n"
        "(Worker_TP0 pid=6) INFO 08-20 17:28:06 [gpu_model_runner.py:2653] Model loading took 106.60 GiB and 9 s\n"
        "(Worker_TP0 pid=6) INFO 08-20 17:28:07 [gpu_worker.py:298] Available KV cache memory: 48.50 GiB\n"
        "(Worker_TP1 pid=7) INFO 08-20 17:28:06 [gpu_model_runner.py:2653] Model loading took 106.69 GiB and 9 s\n"
        "(Worker_TP2 pid=8) INFO 08-20 17:28:07 [gpu_worker.py:298] Available KV cache memory: 49.90 GiB\n"
    )
    assert report.number("kv_cache_bytes") == pytest.approx(48.50 * GIB, abs=1)
    assert report.number("weights_bytes") == pytest.approx(106.69 * GIB, abs=1)
    assert report.notes == ("ranks differ by 2.12 GiB of KV; the smallest decides",)


def test_of_several_starts_in_one_log_the_last_is_read() -> None:
    again = V1_2025.replace("55.15", "44.15").replace(" Current kv cache memory in use is 59212694937 bytes.", "")
    report = read(V1_2025 + again)
    assert report.number("kv_cache_bytes") == pytest.approx(44.15 * GIB, abs=1)
    assert report.notes == ("the log holds 2 starts; the last one is read",)


def test_what_requests_say_is_not_what_the_server_says() -> None:
    serving = "INFO:     Application startup complete.\n"
    prompt = "INFO [logger.py:43] Received request: prompt: 'Available KV cache memory: 1.00 GiB, max_model_len=7'\n"
    report = read(V1_2025 + serving + prompt)
    assert report.facts["kv_cache_bytes"].value == 59212694937
    for said in ("CUDA out of memory, why?", "vLLM API server version 9.9", "Application startup complete"):
        quoted = read(V1_2025 + serving + prompt.replace("max_model_len=7", said))
        assert (quoted.facts, quoted.failures, quoted.notes) == (report.facts, (), ())
    broken = "ERROR [core.py:708] OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    assert [event.code for event in read(V1_2025 + serving + broken).failures] == ["out_of_memory"]
    again = V1_2025.replace("59212694937", "49212694937").replace("55.15", "45.83")
    assert read(V1_2025 + serving + prompt + again).facts["kv_cache_bytes"].value == 49212694937


@pytest.mark.parametrize(
    "spoil",
    [
        lambda log: log.replace(b"\n", b"\r\n"),
        lambda log: b"\x1b[32m" + log.replace(b" INFO ", b" \x1b[1;32mINFO\x1b[0m "),
        lambda log: log.replace(b"(EngineCore", b"\xff\xfe\x00(EngineCore"),
        lambda log: b"Capturing CUDA graphs:  10%|#  | 1/67\r" + log,
        lambda log: log + b"(EngineCore_DP0 pid=3) INFO 09-23 18:12:40 [gpu_worker.py:298] Available KV cache mem",
        lambda log: b"\n".join(b"2025-09-23T18:12:33Z stderr F " + line for line in log.splitlines()),
    ],
    ids=["CRLF", "colours", "bytes that are not UTF-8", "progress bars", "cut short", "container prefixes"],
)
def test_damage_on_the_way_changes_no_value(spoil: Any) -> None:
    clean, spoilt = read(V1_2025), read(spoil(V1_2025.encode()))
    assert {n: f.value for n, f in spoilt.facts.items()} == {n: f.value for n, f in clean.facts.items()}


def test_settings_are_read_from_arguments_and_the_engine_config() -> None:
    report = read(
        "(APIServer pid=1) INFO 01-23 15:48:30 [api_server.py:1839] vLLM API server version 0.11.0\n"
        "(APIServer pid=1) INFO 01-23 15:48:30 [utils.py:233] non-default args: {'model_tag': 'Qwen/Qwen3-32B', "
        "'max_model_len': 32768, 'gpu_memory_utilization': 0.95, 'max_num_seqs': 64}\n"
        "(APIServer pid=1) INFO 01-23 15:48:33 [scheduler.py:205] Chunked prefill is enabled with "
        "max_num_batched_tokens=2048.\n"
        "(EngineCore_DP0 pid=9) INFO 01-23 15:48:36 [core.py:77] Initializing a V1 LLM engine "
        "(v0.11.0+582e4e37.nv25.11) with config: model='Qwen/Qwen3-32B', speculative_config=None, "
        "dtype=torch.float16, max_seq_len=32768, tensor_parallel_size=2, pipeline_parallel_size=1, quantization=gptq, "
        "kv_cache_dtype=fp8, enable_prefix_caching=False, seed=0\n"
    )
    expected = {
        "model": "Qwen/Qwen3-32B", "max_model_len_tokens": 32768, "gpu_memory_utilization": 0.95, "max_num_seqs": 64,
        "max_num_batched_tokens": 2048, "tp_size": 2, "pp_size": 1, "quantization": "gptq", "kv_cache_dtype": "fp8",
        "enable_prefix_caching": False, "dtype": "float16", "engine_version": "0.11.0+582e4e37.nv25.11",
    }  # fmt: skip
    assert {name: report.value(name) for name in expected} == expected
    assert "speculative" not in report.facts


def test_sglang_reports_keys_and_values_in_its_own_gigabytes() -> None:
    report = read(
        "[2025-07-14 05:48:30] server_args=ServerArgs(model_path='Qwen/Qwen3-8B', tp_size=1, mem_fraction_static=0.85, "
        "kv_cache_dtype='auto', page_size=1, context_length=None)\n"
        "[2025-07-14 05:48:43] Load weight end. type=Qwen3ForCausalLM, dtype=torch.bfloat16, avail mem=7.37 GB, mem "
        "usage=15.30 GB.\n"
        "[2025-07-14 05:48:43] KV Cache is allocated. #tokens: 38141, K size: 2.62 GB, V size: 2.62 GB\n"
        "[2025-07-14 05:49:02] Capture cuda graph end. Time elapsed: 18.07 s. mem usage=0.11 GB. avail mem=0.83 GB.\n"
        "[2025-07-14 05:49:03] max_total_num_tokens=38141, chunked_prefill_size=2048, max_prefill_tokens=16384, "
        "max_running_requests=2048, context_len=40960\n"
    )
    assert report.engine == "sglang"
    assert report.number("kv_cache_bytes") == pytest.approx(5.24 * GIB, abs=2)
    assert (report.value("capacity_tokens"), report.value("max_model_len_tokens")) == (38141, 40960)
    assert (report.value("model"), report.value("gpu_memory_utilization")) == ("Qwen/Qwen3-8B", 0.85)


def test_sglangs_newer_wordings_with_a_draft_model_or_two_pools_read_as_the_model_itself() -> None:
    drafting = read(
        "[2026-08-15 TP0] Load weight end. elapsed=46.10 s, type=Main, avail mem=161.06 GB, mem usage=104.24 GB.\n"
        "[2026-08-15 TP0] KV Cache is allocated. dtype: torch.float8_e4m3fn, #tokens: 171008, K size: 5.22 GB, "
        "V size: 5.22 GB\n"
        "[2026-08-15 TP0] Load weight end. elapsed=2.10 s, type=Draft, avail mem=158.45 GB, mem usage=2.60 GB.\n"
        "[2026-08-15 TP0] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 171008, K size: 0.33 GB, "
        "V size: 0.33 GB\n"
        "[2026-08-15 TP0] Capture target verify CUDA graph end. elapsed=84 s, mem usage=0.19 GB, avail mem=8 GB.\n"
    )
    assert drafting.number("kv_cache_bytes") == pytest.approx(10.44 * GIB, abs=2)
    assert drafting.value("kv_cache_dtype") == "float8_e4m3fn"
    assert drafting.number("weights_bytes") == pytest.approx(104.24 * GIB, abs=1)
    assert drafting.number("graph_bytes") == pytest.approx(0.19 * GIB, abs=1)
    windows = read(
        "[2026-08-15] KV Cache is allocated. #tokens: 400000, K size: 2.00 GB, V size: 2.00 GB\n"
        "[2026-08-15] KV Cache is allocated. #tokens: 50000, K size: 1.00 GB, V size: 1.00 GB\n"
        "[2026-08-15] SWAKVPool mem usage: 6.00 GB, swa size: 50000, full size: 400000\n"
    )
    assert windows.number("kv_cache_bytes") == 6 * GIB
    assert windows.value("capacity_tokens") == 400000


def test_tensorrt_llm_reports_blocks_tokens_and_bytes() -> None:
    report = read(
        "[TensorRT-LLM] TensorRT-LLM version: 0.17.0\n"
        "[TensorRT-LLM][INFO] Memory usage when calculating max tokens in paged kv cache: total: 79.10 GiB, available: "
        "63.62 GiB\n"
        "[TensorRT-LLM][INFO] Number of blocks in KV cache primary pool: 4607\n"
        "[TensorRT-LLM][INFO] Number of tokens per block: 64.\n"
        "[TensorRT-LLM][INFO] [MemUsageChange] Allocated 62.99 GiB for max tokens in paged KV cache (294848).\n"
    )
    assert (report.engine, report.value("engine_version")) == ("tensorrt-llm", "0.17.0")
    assert (report.value("num_blocks"), report.value("observed_block_tokens")) == (4607, 64)
    assert report.value("capacity_tokens") == 4607 * 64 == 294848


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("ValueError: Free memory on device cuda:0 (24.85/31.39 GiB) on startup is less than desired GPU memory "
         "utilization (0.9, 28.25 GiB). Decrease GPU memory utilization", "gpu_in_use"),
        ("ValueError: To serve at least one request with the models's max seq len (131072), (16.00 GiB KV cache is "
         "needed, which is larger than the available KV cache memory (10.55 GiB). Based on the available memory, the "
         "estimated maximum model length is 86400.", "context_does_not_fit"),
        ("ERROR 03-25 21:32:48 engine.py:387] The model's max seq len (131072) is larger than the maximum number of "
         "tokens that can be stored in KV cache (37696). Try increasing `gpu_memory_utilization`",
         "context_does_not_fit"),
        ("(EngineCore_DP0 pid=1) ERROR [core.py:708] ValueError: No available memory for the cache blocks. "
         "Try increasing `gpu_memory_utilization` when initializing the engine.", "no_kv_memory"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a total capacity of 39.39 "
         "GiB of which 300.19 MiB is free.", "out_of_memory"),
    ],
)  # fmt: skip
def test_what_keeps_a_server_from_starting_is_a_failure(line: str, code: str) -> None:
    report = read(V1_2025.splitlines()[0] + "\n" + line + "\n" + line + "\n")
    assert [event.code for event in report.failures] == [code]
    assert report.failures[0].where == "line 2"


def test_a_log_without_a_known_line_says_what_was_looked_for() -> None:
    with pytest.raises(InputError, match="no start-up line of vLLM, SGLang or TensorRT-LLM") as error:
        read("hello\nworld\n" * 10)
    assert "Available KV cache memory" in (error.value.hint or "")
    with pytest.raises(InputError, match="no start-up line"):
        read(b"")


@pytest.mark.parametrize(
    "text",
    [
        "total_gpu_memory=1GiB" * 3000 + "kv_cache_size=1GiB" * 3000,
        "model weights take 1GiB; non_torch_memory takes 1GiB; PyTorch activation peak memory takes 1GiB; " * 1200,
        "max seq len (1) 1GiB KV cache is needed" * 3000,
        "Load weight end." * 7000,
    ],
)
def test_a_line_made_to_match_in_too_many_ways_is_done_with_at_once(text: str) -> None:
    began = time.monotonic()
    assert read(f"{text} GiB\n" * 5 + V1_2025).facts.keys() == read(V1_2025).facts.keys()
    assert time.monotonic() - began < 5


def test_a_progress_bar_of_any_length_hides_no_line() -> None:
    bar = "".join(f"Capturing CUDA graphs: {n}%|{'#' * n}\r" for n in range(100))
    assert read(bar + V1_2025).facts.keys() == read(V1_2025).facts.keys()


def test_a_line_without_an_end_is_read_in_constant_memory() -> None:
    report = read(b"x" * (5 * 2**20) + b"\n" + V1_2025.encode())
    assert report.facts["kv_cache_bytes"].where.startswith("line 6:")


@pytest.mark.skipif(
    not os.environ.get("KVPLAN_SLOW_TESTS"), reason="times a log of 200 MB: KVPLAN_SLOW_TESTS=1 runs it"
)
def test_200_mb_are_read_in_three_seconds_and_constant_memory(tmp_path: Path) -> None:
    """CPU time and peak memory of a process of its own, start-up included."""
    usual = (
        b"INFO [loggers.py:127] Engine 000: Avg prompt throughput: 12.3 tokens/s, Avg generation throughput: "
        b"345.6 tokens/s, Running: 3 reqs, Waiting: 0 reqs, GPU KV cache usage: 1.2%, Prefix cache hit rate: 0.0%\n"
        b'INFO:     10.0.0.1:48622 - "POST /v1/chat/completions HTTP/1.1" 200 OK\n'
    )
    path = tmp_path / "big.log"
    with path.open("wb") as file:
        file.write(V1_2025.encode())
        block = usual * 4096
        while file.tell() < 200e6:
            file.write(block)
    before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = read_log(path)
    after = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert report.facts["kv_cache_bytes"].value == 59212694937
    assert after[0] - before[0] <= 3.0
    assert (after[1] - before[1]) * 1024 <= 64 * 2**20
    done = subprocess.run([sys.executable, "-m", "kvplan", "check", "--log", str(path), "--model", "qwen2.5-7b"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode in (0, 3), done.stderr


def test_every_line_that_says_something_holds_a_needle() -> None:
    """A line without a needle would be skipped before its pattern is tried."""
    known = 0
    for path in sorted((Path(__file__).parent / "logs").glob("*.log")):
        for raw in path.read_bytes().splitlines():
            text = raw.decode()
            if any(line.pattern.search(text) for line in LINES) or any(words in text for words in ARGUMENT_LINES):
                known += 1
                assert any(needle in raw for needle in NEEDLES), text
    assert known > 20
