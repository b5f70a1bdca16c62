"""What SGLang sets aside of a GPU unless it is told. Expected fractions are what servers printed in public logs."""

from __future__ import annotations

from typing import Any

import pytest

import kvplan
from kvplan.latency.lines import make_line
from kvplan.memory.engines.sglang_memory import reserves
from kvplan.memory.request import make_request
from kvplan.memory.setup import Setup, set_up
from kvplan.units import GIB, MIB


def server(**request: Any) -> Setup:
    return set_up(make_request({"engine": "sglang", "context_tokens": 8192, **request}))


@pytest.mark.parametrize(
    ("printed", "request_fields"),
    [
        # SGLang's own notebooks, run in February and March 2026, and threads of that year; the last one names no GPU,
        # but has its 32 GB and its graphs
        (0.835, {"model": "8b", "gpu": "h100", "engine_version": "0.5.8"}),
        (0.907, {"model": "8b", "gpu": "h200", "engine_version": "0.5.9"}),
        (0.83, {"model": "8b", "gpu": "h100", "engine_version": "0.5.10"}),
        (0.903, {"model": "8b", "gpu": "h200", "engine_version": "0.5.10"}),
        (0.828, {"model": "qwen3-32b", "gpu": "h100", "tp_size": 2, "engine_version": "0.5.14"}),
        (0.897, {"model": "deepseek-v3.2", "gpu": "h200", "tp_size": 8, "engine_version": "0.5.10"}),
        (0.83, {"model": "qwen3-30b-a3b", "gpu": "h100", "engine_version": "0.5.20"}),
        (0.718, {"model": "gemma-4-26b-a4b", "gpu": "rtx-5090", "engine_version": "0.5.22"}),
    ],
)
def test_the_default_fraction_is_the_one_that_servers_print(printed: float, request_fields: dict[str, Any]) -> None:
    assert round(server(**request_fields).fraction, 3) == printed


def test_every_term_of_the_fraction_is_said() -> None:
    setup = server(model="8b", gpu="h200", tp_size=4)
    # 512 + 1.5 × 8,192 + 2 × 512 + 1,024 × 4 / 8 + 8 × 58 prompt lengths up to 8,192
    assert [term.mebibytes for term in reserves(setup.model, setup.options)] == [512, 12288, 1024, 512, 464]
    assert setup.fraction == round(1 - 14800 / 143771, 3) == 0.897
    plan = kvplan.size(model="8b", gpu="h200", tp_size=4, engine="sglang", context_tokens=8192)
    assert "14,800 MiB set aside / 143,771 MiB" in plan.memory.sources["usable_bytes"].detail
    rules = {rule.name: rule for rule in plan.rules}
    assert "1.5 MiB × 8,192 tokens" in rules["set aside for activations"].formula
    assert all("0.5.23" in rule.source for name, rule in rules.items() if name.startswith("set aside"))


def test_a_given_fraction_takes_the_place_of_the_default_and_of_its_derivation() -> None:
    plan = kvplan.size(model="8b", gpu="h200", engine="sglang", context_tokens=8192, gpu_memory_utilization=0.8)
    assert plan.memory.sources["usable_bytes"].source == "given"
    assert plan.request.gpu_memory_utilization == 0.8
    assert not [rule for rule in plan.rules if rule.name.startswith("set aside")]


def test_the_fraction_is_of_what_is_free_before_weights_are_loaded() -> None:
    memory = kvplan.size(model="8b", gpu="h200", engine="sglang", context_tokens=8192, overhead_bytes=GIB).memory
    assert memory.total_bytes is not None and memory.weights_bytes is not None
    assert memory.usable_bytes == int((memory.total_bytes - GIB) * 0.903)
    assert memory.kv_cache_bytes == memory.usable_bytes - memory.weights_bytes


def test_a_fraction_that_leaves_no_room_for_activations_and_graphs_does_not_fit() -> None:
    """0.99 of the 78.6 GiB free before weights leave 0.79 for activations, graphs and tables, which take 1.61."""
    asked: dict[str, Any] = {"model": "8b", "gpu": "h100", "engine": "sglang", "context_tokens": 8192}
    plan = kvplan.size(**asked, gpu_memory_utilization=0.99)
    memory = plan.memory
    outside = (memory.activation_bytes or 0) + (memory.graph_bytes or 0) + (memory.overhead_bytes or 0)
    assert memory.excess_bytes == (memory.usable_bytes or 0) + outside - (memory.total_bytes or 0) > 0
    assert plan.fits is False and plan.verdict is False
    assert plan.advice[0].message.endswith("at most --mem-fraction-static 0.97 would do")
    assert kvplan.size(**asked, gpu_memory_utilization=0.97).fits
    report = kvplan.report(**asked, gpu_memory_utilization=0.99)
    assert not report.answers.fits and report.answers.headline.startswith("No: ")


def test_the_fraction_follows_the_chunk_the_graphs_and_the_ranks() -> None:
    def reserved(model: str = "8b", **request: Any) -> float:
        setup = server(model=model, gpu="h100", **request)
        return sum(term.mebibytes for term in reserves(setup.model, setup.options))

    assert reserved() == 512 + 12288 + 512 + 128 + 464
    # 42 prompt lengths up to 2,048 tokens; less than 10 GiB is not set aside on a GPU of more than 60 GiB
    assert reserved(max_num_batched_tokens=2048) == 10 * 1024
    assert reserved(max_num_batched_tokens=16384) == 512 + 24576 + 512 + 128 + 8 * 74
    assert reserved(max_num_seqs=64) == reserved() - 2 * (256 - 64)
    assert reserved(max_num_seqs=64, engine_version="0.5.21") == reserved()
    assert reserved(pp_size=4) == 512 + 12288 + 512 + 512  # no graphs of prefill in a pipeline
    # attention on 8 data-parallel ranks: 512 × 8 × 4.5 MiB more, and TP is the 8 of all ranks
    shared = {"model": "qwen3-30b-a3b", "dp_size": 8, "ep": True}
    assert reserved(**shared) == 512 + 12288 + 1024 + 1024 + 512 * 8 * 4.5 + 464
    assert reserved(dp_size=8, ep=True) == reserved(dp_size=8) == reserved()  # no experts to share: replicas


def test_ranks_of_attention_share_the_chunk_after_memory_is_set_aside_for_it() -> None:
    """``_handle_data_parallelism`` divides ``--chunked-prefill-size`` when the fraction is set."""
    shared = {"model": "qwen3-30b-a3b", "gpu": "h100", "dp_size": 8, "ep": True}
    unasked = server(**shared)
    assert unasked.batched_tokens == 8192 // 8
    assert server(**shared, max_num_batched_tokens=1024).fraction == unasked.fraction
    assert server(**shared, max_num_batched_tokens=2048).fraction < unasked.fraction
    assert server(**{**shared, "ep": False}).batched_tokens == 8192  # eight servers


def test_latent_attention_takes_more_for_prefill_graphs_and_none_on_blackwell() -> None:
    def terms(gpu: str, model: str = "deepseek-r1") -> dict[str, float]:
        setup = server(model=model, gpu=gpu, tp_size=8)
        return {term.what: term.mebibytes for term in reserves(setup.model, setup.options)}

    assert terms("h200")["prefill graphs"] == 1536
    assert "prefill graphs" not in terms("b200")
    assert "prefill graphs" not in terms("mi300x", "qwen3-32b")


def test_a_vision_tower_takes_a_share_of_the_fraction() -> None:
    # Qwen3-VL names its layers "depth": 24 are taken; 24 × 1,152² is 1.2656 of ViT-L/14, so 0.95 × (1 − 0.02656)
    whole = 1 - (512 + 12288 + 512 + 128) / 81559
    assert server(model="qwen3-vl-8b", gpu="h100").fraction == pytest.approx(
        round(whole, 3) * 0.95 * (1 - 0.02656), 1e-4
    )
    assert server(model="gemma-3-27b", gpu="h100").fraction == 0.83  # served as text unless asked


def test_aiter_on_amd_keeps_part_of_any_fraction_for_long_requests() -> None:
    def usable(**request: Any) -> int:
        plan = kvplan.size(model="qwen3-32b", gpu="mi300x", engine="sglang", gpu_memory_utilization=0.8, **request)
        assert plan.memory.usable_bytes is not None
        return plan.memory.usable_bytes

    assert usable(context_tokens=16384) == pytest.approx(0.85 * usable(context_tokens=8192))


@pytest.mark.parametrize(("model", "tp_size", "batch_size"), [("qwen3-32b", 1, 64), ("minimax-m2.5", 2, 256),
                                                             ("deepseek-v3", 1, 16)])  # fmt: skip
@pytest.mark.parametrize("context_tokens", [4096, 8193, 32768])
def test_size_itl_and_report_agree_on_what_amd_keeps(model: str, tp_size: int, batch_size: int, context_tokens: int
                                                     ) -> None:  # fmt: skip
    """Whether a batch fits, and the longest context that it holds, planned at either side of 8,192 tokens."""
    asked: dict[str, Any] = {"model": model, "gpu": "mi300x", "engine": "sglang", "tp_size": tp_size}
    plan = kvplan.size(**asked, context_tokens=context_tokens, batch_size=batch_size)
    line = make_line("", asked, [context_tokens], batch_size)
    assert line.plans[0].fits is plan.fits
    assert line.max_context_tokens == plan.answers.max_context_at_batch_tokens
    report = kvplan.report(**asked, context_tokens=context_tokens, concurrency=batch_size)
    chosen = next(row for row in report.precisions if row.is_chosen)
    assert chosen.max_context_tokens == line.max_context_tokens


def test_the_longest_context_of_amd_is_held_by_a_server_that_is_told_of_it() -> None:
    asked: dict[str, Any] = {"model": "mistral-7b-v0.1", "gpu": "mi355x", "engine": "sglang", "batch_size": 256}
    longest = kvplan.size(**asked, context_tokens=16384).answers.max_context_at_batch_tokens
    assert longest is not None and longest < 8192
    assert kvplan.size(**asked, context_tokens=longest).fits is True
    assert kvplan.size(**asked, context_tokens=longest + 64).fits is False


def test_a_table_of_requests_and_their_tokens_is_allocated_beside_the_fraction() -> None:
    """4 B × 2,049 requests × 1,048,580 tokens are 8.0 GiB; 64 requests are told to need 0.25 GiB."""

    def activation(**request: Any) -> int:
        plan = kvplan.size(model="llama-4-scout", gpu="b200", engine="sglang", tp_size=8, **request)
        assert plan.memory.activation_bytes is not None
        return plan.memory.activation_bytes

    short, long = activation(context_tokens=1024), activation(context_tokens=2**20)
    assert long - short == 4 * 2049 * (2**20 - 1024)
    few = activation(context_tokens=2**20, max_num_seqs=64) - activation(context_tokens=1024, max_num_seqs=64)
    assert few == 4 * 65 * (2**20 - 1024)


@pytest.mark.parametrize(("fraction", "says"), [(None, False), (0.9, False), (0.92, False), (0.95, True), (0.97, True)])
def test_a_fraction_that_leaves_less_than_sglangs_guide_wants_says_so(fraction: float | None, says: bool) -> None:
    """An H100: 78.6 GiB free, of which 0.95 leaves 3.9 for graphs, the table of requests and activations."""
    asked: dict[str, Any] = {"model": "8b", "gpu": "h100", "engine": "sglang", "context_tokens": 8192}
    plan = kvplan.size(**asked, gpu_memory_utilization=fraction)
    assert plan.fits is True
    said = [advice.message for advice in plan.advice if advice.code == "little_left"]
    assert bool(said) is says
    if says:
        assert "--mem-fraction-static 0.92 would leave that" in said[0]


def test_a_table_of_long_requests_is_named_where_it_leaves_too_little() -> None:
    asked: dict[str, Any] = {"model": "llama-4-scout", "gpu": "h200", "engine": "sglang", "tp_size": 8}
    many = kvplan.size(**asked, context_tokens=2**20, max_num_seqs=3072)
    said = next(advice.message for advice in many.advice if advice.code == "little_left")
    assert many.fits is True and "12.00 GiB are the table" in said
    beyond = kvplan.size(**asked, context_tokens=2**20, max_num_seqs=100_000)  # 391 GiB
    assert beyond.fits is False and beyond.advice[0].message.endswith("; a lower --max-num-seqs takes less")
    no_kv = kvplan.size(model="70b", gpu="h100", engine="sglang", context_tokens=2**20)
    assert no_kv.advice[0].code == "weights_do_not_fit"  # such a server never starts
    few = kvplan.size(**asked, context_tokens=2**20, max_num_seqs=64)
    assert not any(advice.code == "little_left" for advice in no_kv.advice)
    assert not any(advice.code == "little_left" for advice in few.advice)


@pytest.mark.parametrize("context_tokens", [8193, 2**20])
def test_itl_and_size_reckon_with_the_same_table_of_requests(context_tokens: int) -> None:
    """2,049 requests × 1 M tokens × 4 B are 8.0 GiB, and 0.97 of a GB200 leaves 5.5: such a server runs out of memory.

    The longest context that is held is then of a shorter server, whose table has room.
    """
    asked: dict[str, Any] = {"model": "jamba-mini", "gpu": "gb200", "engine": "sglang", "tp_size": 2}
    asked |= {"gpu_memory_utilization": 0.97}
    size = kvplan.size(**asked, context_tokens=context_tokens, batch_size=2)
    line = make_line("", asked, [context_tokens], 2)
    assert size.fits is line.plans[0].fits is (context_tokens < 2**20)
    longest = size.answers.max_context_at_batch_tokens
    assert longest is not None and longest == line.max_context_tokens
    assert kvplan.size(**asked, context_tokens=longest, batch_size=2).fits is True
    models_limit = 262_144  # as far as is looked for unless the plan itself goes beyond
    assert longest == models_limit or not kvplan.size(**asked, context_tokens=longest + 1, batch_size=2).fits


def test_a_server_that_runs_out_of_memory_holds_nothing() -> None:
    """A longest request of 1 M tokens takes 8.0 GiB for the table alone, and 0.84 of an L40S leaves 7.0."""
    asked: dict[str, Any] = {"model": "qwen3-32b", "gpu": "l40s", "engine": "sglang", "tp_size": 2}
    plan = kvplan.size(**asked, max_model_len_tokens=2**20, context_tokens=8193, batch_size=4)
    assert plan.memory.excess_bytes > 0 and plan.fits is False
    assert plan.answers.max_batch_at_context == 0
    assert plan.answers.max_context_at_batch_tokens is None
    assert plan.advice[0].message.endswith("a --max-num-seqs below 2,048 takes less")
    few = kvplan.size(**asked, max_model_len_tokens=2**20, context_tokens=8193, batch_size=4, max_num_seqs=64)
    assert few.memory.excess_bytes == 0
    assert kvplan.size(**asked, context_tokens=8193, batch_size=4).fits is True


def test_a_limit_whose_logits_take_more_than_is_left_says_so() -> None:
    """20,000 requests × 128,256 logits × 8 B are 19.1 GiB, and 0.83 of an H100 leaves 12.7 beside graphs and table."""
    asked: dict[str, Any] = {"model": "8b", "gpu": "h100", "engine": "sglang", "context_tokens": 16}
    many = kvplan.size(**asked, max_num_seqs=20_000)
    said = [advice.message for advice in many.advice if advice.code == "little_left"]
    assert said and "they may take 19.11 GiB" in said[0] and "so would a lower --max-num-seqs" in said[0]
    few = kvplan.size(**asked, max_num_seqs=4096)
    assert not any(advice.code == "little_left" for advice in few.advice)


def test_small_gpus_changed_their_defaults_in_0_5_20() -> None:
    assert server(model="8b", gpu="rtx-4090").batched_tokens == 4096
    assert server(model="8b", gpu="rtx-4090", engine_version="0.5.18").batched_tokens == 2048
    assert server(model="8b", gpu="a100-80gb").batched_tokens == 8192
    assert server(model="8b", gpu="b200").batched_tokens == 16384


def test_nvidia_smi_shows_a_little_more_than_programs_see() -> None:
    for name in ("h100", "h200", "b200", "a100-80gb", "l40s", "rtx-5090"):
        gpu = server(model="8b", gpu=name).gpu
        assert gpu is not None and gpu.smi_memory_bytes is not None
        assert 0 < gpu.smi_memory_bytes - gpu.memory_bytes < 1100 * MIB
    named = server(model="8b", gpu="h100", gpu_memory_bytes=70 * GIB).gpu
    assert named is not None and named.reported_memory_bytes == 70 * GIB


def test_a_start_on_an_h100_is_planned_within_a_percent() -> None:
    """Qwen3-30B-A3B-FP8 on one H100, August 2026: fraction 0.83, weights 29.15 GiB, 392,920 tokens of bf16 KV."""
    plan = kvplan.size(model="qwen3-30b-a3b", gpu="h100", engine="sglang", weight_dtype="fp8_block",
                       context_tokens=8192)  # fmt: skip
    assert plan.memory.weights_bytes == pytest.approx(29.15 * GIB, rel=0.005)
    assert plan.kv_cache.capacity_tokens == pytest.approx(392_920, rel=0.01)
    taken = int(79.19 * GIB) - int(78.48 * GIB)
    reported = kvplan.size(model="qwen3-30b-a3b", gpu="h100", engine="sglang", context_tokens=8192,
                           weights_bytes=int(29.15 * GIB), overhead_bytes=taken)  # fmt: skip
    assert reported.kv_cache.capacity_tokens == pytest.approx(392_920, rel=0.002)


def test_a_start_with_a_given_fraction_is_planned_within_half_a_percent() -> None:
    """Llama 3.1 8B on one H100, January 2025: 0.88 of 78.81 GiB, less 15.09 GiB of weights, gave 54.26 of K and V."""
    plan = kvplan.size(model="8b", gpu="h100", engine="sglang", gpu_memory_utilization=0.88, context_tokens=8192)
    assert plan.memory.kv_cache_bytes == pytest.approx(54.26 * GIB, rel=0.005)
