"""How SGLang deals KV memory to pools. Expected tokens are those that servers printed in public logs."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest

import kvplan
from kvplan.check.basis import basis_of
from kvplan.check.log import read_stream
from kvplan.errors import InputError, UnsupportedError
from kvplan.latency.capacity import max_batches
from kvplan.memory.explain import explained
from kvplan.memory.plan import SizePlan
from kvplan.memory.request import make_request
from kvplan.memory.setup import cache_plan, set_up
from kvplan.units import GIB


def plan(**request: Any) -> SizePlan:
    return kvplan.size(engine="sglang", **{"context_tokens": 8192, **request})


def test_full_and_sliding_layers_have_pools_of_their_own() -> None:
    """Gemma 4 26B-A4B with fp8 KV: 3.18 GiB were printed as 37,081 full and 29,664 sliding tokens.

    Full layers take 5 × 2 heads × 512 × 2 B a token, sliding ones 25 × 8 × 256 × 2 B for 0.8 of the tokens: 92,160 B.
    """
    memory = 37_081 * 92_160 + 5_000
    assert round(memory / GIB, 2) == 3.18
    found = plan(model="gemma-4-26b-a4b", kv_cache_dtype="fp8", gpu="rtx-5090", kv_cache_memory_bytes=memory,
                 context_tokens=1152)  # fmt: skip
    assert found.kv_cache.capacity_tokens == 37_081
    # of the 1,152 tokens of a request 1,024 and the one that is written stay in the sliding pool: 29,664 // 1,025
    assert found.answers.max_batch_at_context == 28


@pytest.mark.parametrize(("model", "version"), [("gemma-3-27b", None), ("gemma-4-26b-a4b", "0.5.10")])
def test_without_a_pool_for_windows_sliding_layers_keep_every_token(model: str, version: str | None) -> None:
    kinds = {group.kind for group in plan(model=model, gpu="h200", engine_version=version).kv_cache.groups}
    assert kinds == {"full"}


def test_states_and_tokens_share_the_memory_nine_to_ten() -> None:
    """Nemotron 3 Nano on four ranks: 25.28 GiB are 2,211 states and one of padding, beside 28.10 GiB of tokens.

    A token is 6 layers × 1 head × 128 × 2 B; 19,644,177 were printed.
    """
    found = plan(model="nemotron-3-nano-30b-a3b", gpu="h100", tp_size=4, kv_cache_dtype="fp8",
                 kv_cache_memory_bytes=int(53.38 * GIB))  # fmt: skip
    assert found.kv_cache.capacity_tokens == pytest.approx(19_644_177, rel=0.001)
    assert found.answers.max_running == 2211 // 5  # three states a request, and two more for prefixes
    older = plan(model="nemotron-3-nano-30b-a3b", gpu="h100", tp_size=4, kv_cache_dtype="fp8", engine_version="0.5.14",
                 kv_cache_memory_bytes=int(53.38 * GIB))  # fmt: skip
    assert older.answers.max_running == 2211 // 3


def test_tokens_are_whole_pages() -> None:
    memory = 10 * GIB + 12345
    for gpu, page in (("h100", 1), ("b200", 64)):
        cache = plan(model="8b", gpu=gpu, kv_cache_memory_bytes=memory).kv_cache
        assert cache.block_size_tokens == page
        assert cache.capacity_tokens == memory // (131_072 * page) * page
    assert plan(model="deepseek-v3.2", gpu="h200", tp_size=8).kv_cache.block_size_tokens == 64
    assert plan(model="8b", gpu="b200", block_size_tokens=32).kv_cache.block_size_tokens == 32


def test_auto_is_fp8_where_a_checkpoint_asks_for_it_and_for_sparse_latents_on_blackwell() -> None:
    def auto(**request: Any) -> str:
        return plan(tp_size=8, **request).kv_cache.kv_cache_dtype

    assert auto(model="kimi-k2.5-nvfp4", gpu="b200") == "fp8"
    assert auto(model="deepseek-v3.2", gpu="b200") == "fp8"
    assert auto(model="deepseek-v3.2", gpu="h200") == "bfloat16"
    assert auto(model="deepseek-r1", gpu="b200") == "bfloat16"
    assert auto(model="deepseek-v3.2", gpu="b200", kv_cache_dtype="bfloat16") == "bfloat16"


def test_fp8_of_sparse_latents_is_stored_in_rows_of_656_bytes_below_blackwell() -> None:
    """512 latents, their 4 scales of 4 B and 64 RoPE values of 2 B, or 576 B; beside an indexer of 132 B; 61 layers."""

    def per_token(gpu: str, dtype: str = "fp8", model: str = "deepseek-v3.2") -> int | float:
        return plan(model=model, gpu=gpu, tp_size=8, kv_cache_dtype=dtype).kv_cache.bytes_per_token

    assert per_token("h200") == per_token("h200", "fp8_ds_mla") == 61 * (512 + 16 + 128 + 132)
    assert per_token("b200") == per_token("mi300x") == 61 * (576 + 132)
    assert per_token("h200", "bfloat16") == 61 * (1152 + 132)
    # before 0.5.10 on Blackwell too: 43.67 GB of it are 975,424 tokens (sgl-project/sglang#11309, 8 B200, DP attention)
    older = plan(model="deepseek-v3.2", gpu="b200", tp_size=8, kv_cache_dtype="fp8", engine_version="0.5.5").kv_cache
    assert older.bytes_per_token == 61 * (656 + 132) == pytest.approx(43.67 * GIB / 975_424, rel=0.005 / 43.67)
    assert per_token("h200", model="deepseek-v3") == 61 * 576
    report = kvplan.report(model="deepseek-v3.2", gpu="h200", tp_size=8, kv_cache_dtype="fp8_ds_mla", engine="sglang",
                           context_tokens=8192)  # fmt: skip
    assert "--kv-cache-dtype fp8_e4m3 " in (report.launch[0].command or "")


def test_requests_at_once_follow_from_the_tokens() -> None:
    def running(**request: Any) -> int | None:
        return plan(model="8b", gpu="h200", **request).answers.max_running

    assert running() == 4096  # 512 × 860 thousand tokens / 8,192 is more
    assert running(max_model_len_tokens=131_072) == 512 * (
        plan(model="8b", gpu="h200", max_model_len_tokens=131_072).kv_cache.capacity_tokens or 0
    ) // 131_072 > 2048  # fmt: skip
    assert running(kv_cache_memory_bytes=GIB) == 2048
    assert running(kv_cache_memory_bytes=1000 * 131_072) == 500
    assert running(max_num_seqs=64) == 64


@pytest.mark.parametrize("model", ["gpt-oss-20b", "qwen3.5-27b", "llama-4-scout", "8b"])
def test_the_ledger_adds_up_and_latency_counts_the_same_requests(model: str) -> None:
    setup = set_up(make_request({"model": model, "gpu": "h200", "tp_size": 2, "engine": "sglang",
                                 "context_tokens": 8192}))  # fmt: skip
    found, memory = plan(model=model, gpu="h200", tp_size=2), 40 * GIB
    assert sum(line.bytes for line in found.ledger) == found.memory.kv_cache_bytes
    contexts = np.array([1, 100, 1024, 8192, 100_000])
    cache = cache_plan(setup)
    assert max_batches(cache, memory, contexts).tolist() == [cache.max_batch(memory, int(c)) for c in contexts]
    assert sum(pool.share for pool in cache.pools) == pytest.approx(1)


def test_a_log_with_two_pools_or_states_reads_as_the_whole_cache() -> None:
    start = "[2026-08-15] server_args=ServerArgs(model_path='google/gemma-4', tp_size=1)\n"
    windows = read_stream(io.BytesIO((
        start + "[2026-08-15] KV Cache is allocated. #tokens: 798276, K size: 30.45 GB, V size: 30.45 GB\n"
        "[2026-08-15] KV Cache is allocated. #tokens: 997846, K size: 9.52 GB, V size: 9.52 GB\n"
        "[2026-08-15] SWAKVPool mem usage: 79.94 GB, swa size: 798276, full size: 997846\n"
    ).encode()), "log")  # fmt: skip
    assert windows.value("capacity_tokens") == 997_846
    assert windows.number("kv_cache_bytes") == pytest.approx(79.94 * GIB, abs=2)
    states = read_stream(io.BytesIO((
        start + "[2026-09-20] Mamba Cache is allocated. max_mamba_cache_size: 360, conv_state size: 0.99GB, "
        "ssm_state size: 50.77GB\n"
        "[2026-09-20] KV Cache is allocated. #tokens: 228520, K size: 3.49 GB, V size: 3.49 GB\n"
    ).encode()), "log")  # fmt: skip
    assert states.number("kv_cache_bytes") == pytest.approx((6.98 + 51.76) * GIB, abs=4)


def test_shares_that_fit_the_requests_better_are_advised() -> None:
    """gpt-oss-120b on an H200: 36,864 B a token in full layers, as many in sliding ones, whose window is 128."""
    found = plan(model="gpt-oss-120b", gpu="h200", context_tokens=32768)
    advice = next(advice for advice in found.advice if advice.code == "pool_split")
    kv = found.memory.kv_cache_bytes or 0
    chunks = 2 * 8192  # of two prefills in flight, beside 128 tokens a request
    requests = (kv - chunks * 36_864) / (32768 * 36_864 + 128 * 36_864)
    assert advice.gain == pytest.approx(1.8 / 1.02, rel=1e-3)  # tokens take 1 of 1.02 parts, not of 1.8
    assert (128 + chunks / requests) / 32768 < 0.02 and "--swa-full-tokens-ratio 0.02" in advice.message
    states = plan(model="qwen3.5-27b", gpu="h200", context_tokens=65536).advice
    # 5 × 153,944,064 B of states beside 65,536 × 65,536 B of tokens
    assert "--mamba-full-memory-ratio 0.18" in next(a.message for a in states if a.code == "pool_split")
    assert not [a for a in plan(model="8b", gpu="h200").advice if a.code == "pool_split"]


@pytest.mark.parametrize("model", ["gpt-oss-120b", "qwen3.5-27b", "8b"])
def test_the_blocks_of_a_pool_can_be_worked_out_from_what_is_explained(model: str) -> None:
    rules = {rule.name: rule.formula for rule in explained(plan(model=model, gpu="h200", context_tokens=8192)).rules}
    room, size, blocks = (int(text.replace(",", "")) for text in re.findall(r"\d[\d,]*", rules["num_blocks"]))
    assert room // size == blocks


def test_scales_are_a_share_of_what_a_request_holds_not_of_what_its_pools_set_aside() -> None:
    """NVFP4 keeps a byte of scale for 16 values of half a byte: a ninth."""
    found = plan(model="gpt-oss-120b", gpu="b200", tp_size=2, context_tokens=65536, kv_cache_dtype="nvfp4")
    row = next(row for row in found.comparison if row.kv_cache_dtype == "nvfp4")
    assert row.scale_share == pytest.approx(1 / 9)
    assert next(a for a in found.advice if a.code == "less_than_advertised").message.endswith("(scales take 11.1%)")


def test_a_state_of_padding_holds_no_request() -> None:
    """Qwen3.5-27B on an H100: 30 states are one of padding and five for each request, so five run, not six."""

    def batch(count: int) -> SizePlan:
        return plan(model="qwen3.5-27b", gpu="h100", batch_size=count)

    five, six = batch(5), batch(6)
    assert (five.fits, five.answers.max_batch_at_context, five.answers.max_running) == (True, 5, 5)
    assert (six.fits, six.answers.max_batch_at_context) == (False, 5)
    short = six.answers.kv_short_bytes_per_gpu
    kv = six.memory.kv_cache_bytes
    assert short and kv
    more = plan(model="qwen3.5-27b", gpu="h100", batch_size=6, kv_cache_memory_bytes=kv + short + 1)
    assert (more.fits, more.answers.max_running) == (True, 6)


def test_more_requests_than_the_engine_runs_at_once_are_told_what_to_set() -> None:
    def advice(**request: Any) -> str | None:
        found = plan(model="8b", gpu="h200", context_tokens=128, **request).advice
        return next((a.message for a in found if a.code == "max_num_seqs"), None)

    assert advice() == "sglang 0.5 runs 4,096 requests at once unless told: more, up to the 7,088 that are held, " \
        "take --max-num-seqs"  # fmt: skip
    assert "this plan takes --max-num-seqs 5000" in (advice(batch_size=5000) or "")
    assert advice(max_num_seqs=8000) is None


def test_a_request_that_was_echoed_gives_the_same_plan() -> None:
    found = plan(model="8b", gpu="h200", context_tokens=128, batch_size=5000)
    assert found.request.max_num_seqs is None
    again = {name: value for name, value in found.as_dict()["request"].items() if value is not None}
    assert kvplan.size(**again).answers == found.answers


def test_the_longest_request_is_no_longer_than_the_capacity() -> None:
    """Llama 4 Scout on eight H100s, whose full layers take a share of the memory that is no binary fraction."""
    found = plan(model="llama-4-scout", gpu="h100", tp_size=8, context_tokens=131_072)
    assert (found.kv_cache.capacity_tokens or 0) >= (found.answers.max_context_at_batch_tokens or 0) > 10**6


def test_ratios_that_are_advised_can_be_planned_and_hold_what_was_promised() -> None:
    for model, flag in (("qwen3.5-27b", "mamba_full_memory_ratio"), ("gpt-oss-120b", "swa_full_tokens_ratio")):
        before = plan(model=model, gpu="h200", context_tokens=32768)
        advice = next(advice for advice in before.advice if advice.code == "pool_split")
        words = advice.message.split()
        ratio = float(words[words.index("--" + flag.replace("_", "-")) + 1])
        after = plan(model=model, gpu="h200", context_tokens=32768, **{flag: ratio})
        gain = (after.answers.max_batch_at_context or 0) / (before.answers.max_batch_at_context or 1)
        assert advice.gain and gain >= advice.gain * 0.95
        assert any(f"{ratio:g}" in rule.formula for rule in after.rules if rule.name != "block size")
    with pytest.raises(InputError, match="vllm has no swa_full_tokens_ratio"):
        kvplan.size(model="gpt-oss-120b", gpu="h200", context_tokens=8192, swa_full_tokens_ratio=0.5)
    with pytest.raises(InputError, match="above 0 and at most 1"):
        plan(model="gpt-oss-120b", gpu="h200", swa_full_tokens_ratio=2)


def test_the_ratios_of_a_servers_pools_are_those_of_its_plan() -> None:
    log = read_stream(io.BytesIO(
        b"server_args=ServerArgs(model_path='Qwen/Qwen3.5-27B', tp_size=1, mem_fraction_static=0.768, "
        b"mamba_full_memory_ratio=1.44, swa_full_tokens_ratio=0.5, context_length=8192)\n"
        b"KV Cache is allocated. dtype: torch.bfloat16, #tokens: 62900, K size: 1.92 GB, V size: 1.92 GB\n"
    ), "log")  # fmt: skip
    request = basis_of(log, {"gpu": "h100"}).options
    assert (request["mamba_full_memory_ratio"], request["swa_full_tokens_ratio"]) == (1.44, 0.5)
    assert kvplan.size(**request).kv_cache.capacity_tokens == pytest.approx(62_900, rel=0.005)


def test_without_a_radix_cache_states_are_as_many_as_the_requests_that_were_stated() -> None:
    """And one of padding; tokens have the rest, and no ratio is advised."""
    found = plan(model="qwen3.5-27b", gpu="h100", enable_prefix_caching=False, max_num_seqs=8, batch_size=8)
    kv = found.memory.kv_cache_bytes
    state = 153_944_064
    assert kv and found.kv_cache.capacity_tokens == pytest.approx((kv - 9 * state) / 65_536, abs=1)
    assert (found.fits, found.answers.max_batch_at_context) == (True, 8)
    assert not [advice for advice in found.advice if advice.code == "pool_split"]
    assert f"8 requests and one of padding × {state:,} B" in "".join(rule.formula for rule in found.rules)
    assert sum(line.bytes for line in found.ledger) == kv
    more = plan(model="qwen3.5-27b", gpu="h100", enable_prefix_caching=False, max_num_seqs=32, batch_size=32)
    short = 33 * state + 32 * 8192 * 65_536 - (more.memory.kv_cache_bytes or 0)
    assert (more.fits, more.answers.kv_short_bytes_per_gpu) == (False, pytest.approx(short, abs=2))
    with pytest.raises(UnsupportedError, match="the states of 8,192 requests take"):
        plan(model="qwen3.5-27b", gpu="h100", enable_prefix_caching=False, max_num_seqs=8192)
