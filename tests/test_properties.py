"""Properties that hold for any input: hostile configs end in a plan or a clear error, and more never means less."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvplan
from kvplan import profiles
from kvplan.errors import KvplanError
from kvplan.gpu import resolve_gpu
from kvplan.memory.engines import resolve_engine
from kvplan.memory.engines.options import EngineOptions
from kvplan.memory.ledger import waste_ledger
from kvplan.memory.request import make_request
from kvplan.memory.setup import cache_plan, set_up
from kvplan.model_config import read_model_config, resolve_model
from kvplan.units import GIB
from kvplan.weights import weight_bytes

SLOWEST_S = 2.0
RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

MODELS = profiles.names("models")
CONFIGS: list[dict[str, Any]] = [profiles.load("models", name)["config"] for name in MODELS]
KEYS = sorted({key for config in CONFIGS for key in config} | {
    key for config in CONFIGS for child in config.values() if isinstance(child, dict) for key in child
})  # fmt: skip
WORDS = sorted({value for config in CONFIGS for value in config.values() if isinstance(value, str)})
ARCHITECTURES = sorted({name for config in CONFIGS for name in config["architectures"]})

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([0, -1, 1, 2, 10**9, 10**30, 2**31, 2**63]),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e30, 0.5, 128.0]), st.sampled_from(["", "128", "auto", "S"]),
    st.sampled_from(WORDS), st.text(max_size=8),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
any_objects = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), values, max_size=12)
realistic = st.fixed_dictionaries(
    {"architectures": st.sampled_from(ARCHITECTURES).map(lambda name: [name])},
    optional={key: values for key in KEYS if key != "architectures"},
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A bundled config with one to four fields replaced, removed or added, some of them in nested objects."""
    config = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    for _ in range(draw(st.integers(1, 4))):
        target = config
        children = [key for key, value in config.items() if isinstance(value, dict)]
        if children and draw(st.booleans()):
            target = config[draw(st.sampled_from(children))]
        key = draw(st.sampled_from(sorted(target)) | st.sampled_from(KEYS)) if target else draw(st.sampled_from(KEYS))
        if draw(st.integers(0, 3)) == 0:
            target.pop(key, None)
        else:
            target[key] = draw(values)
    return config


def read_and_plan(config: dict[str, Any], gpu: str, tp: int, dtype: str) -> None:
    """A plan or a ``KvplanError``; anything else fails the test by itself, and so does a slow answer."""
    started = time.perf_counter()
    try:
        model = read_model_config(config, where="config.json", name="m", source="config.json")
        options = EngineOptions(dtype, resolve_gpu(gpu), tp_size=tp, tokens_in_flight=16384)
        plan = resolve_engine("vllm").plan_cache(model, options)
        if plan.groups and plan.pool_bytes_per_block:
            assert plan.bytes_per_request(4096) > 0
        weights = weight_bytes(model, tp_size=tp)
        assert weights.total_bytes > 0
    except KvplanError as error:
        assert error.message
        assert "\n" not in error.message
    assert time.perf_counter() - started < SLOWEST_S


gpus = st.sampled_from(["h100", "b200", "a100", "mi300x"])
tps = st.sampled_from([1, 2, 8])
dtypes = st.sampled_from(["auto", "fp8", "int4_per_token_head", "turboquant_k8v4"])


@settings(max_examples=200, deadline=None, suppress_health_check=RELAXED)
@given(any_objects, gpus, tps, dtypes)
def test_any_json_object_is_a_plan_or_a_clear_error(config: dict[str, Any], gpu: str, tp: int, dtype: str) -> None:
    read_and_plan(config, gpu, tp, dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=RELAXED)
@given(realistic, gpus, tps, dtypes)
def test_any_values_under_real_keys_are_a_plan_or_a_clear_error(
    config: dict[str, Any], gpu: str, tp: int, dtype: str
) -> None:
    read_and_plan(config, gpu, tp, dtype)


@settings(max_examples=400, deadline=None, suppress_health_check=RELAXED)
@given(mutated(), gpus, tps, dtypes)
def test_a_damaged_real_config_is_a_plan_or_a_clear_error(
    config: dict[str, Any], gpu: str, tp: int, dtype: str
) -> None:
    read_and_plan(config, gpu, tp, dtype)


@settings(max_examples=100, deadline=None, suppress_health_check=RELAXED)
@given(mutated(), any_objects)
def test_a_damaged_hf_quant_config_is_a_plan_or_a_clear_error(config: dict[str, Any], quant: dict[str, Any]) -> None:
    try:
        read_model_config(config, where="config.json", name="m", source="config.json", hf_quant=quant)
        read_model_config(config, where="config.json", name="m", source="c", hf_quant={"quantization": quant})
    except KvplanError as error:
        assert error.message


@settings(max_examples=200, deadline=None, suppress_health_check=RELAXED)
@given(st.dictionaries(st.sampled_from(sorted(kvplan.SizeRequest.__dataclass_fields__)) | st.text(max_size=5),
                       scalars | st.sampled_from(["8b", "h100", "32k", "80GiB"]), max_size=8))  # fmt: skip
def test_any_request_is_a_plan_or_a_clear_error(options: dict[str, Any]) -> None:
    options.pop("compare", None)
    if options.get("gpu") == "local" or "/" in str(options.get("model")):
        return
    try:
        plan = kvplan.size(compare=False, **options)
        json.loads(plan.to_json())
    except KvplanError as error:
        assert error.message


# --------------------------------------------------------------------------------------------------- invariants


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request that an engine may take."""
    return {
        "model": draw(st.sampled_from(MODELS)),
        "gpu": draw(st.sampled_from(["h100", "b200", "a100", "h200"])),
        "engine": draw(st.sampled_from(["vllm", "vllm", "vllm", "sglang", "tensorrt-llm", "generic"])),
        "tp_size": draw(st.sampled_from([1, 1, 2, 4, 8])),
        "pp_size": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "kv_cache_dtype": draw(st.sampled_from(["auto", "auto", "fp8", "fp8_per_token_head", "int4_per_token_head"])),
        "context_tokens": draw(st.integers(1, 200_000)),
        "kv_cache_memory_bytes": draw(st.integers(GIB // 8, 300 * GIB)),
    }


def planned(**options: Any) -> kvplan.SizePlan | None:
    """A plan, or None where the engine refuses the combination."""
    try:
        return kvplan.size(compare=False, **options)
    except KvplanError:
        return None


@settings(max_examples=200, deadline=None, suppress_health_check=RELAXED)
@given(requests(), st.integers(0, 50 * GIB))
def test_more_memory_never_gives_fewer_blocks_tokens_or_requests(request: dict[str, Any], extra: int) -> None:
    less = planned(**request)
    if less is None:
        return
    more = planned(**{**request, "kv_cache_memory_bytes": request["kv_cache_memory_bytes"] + extra})
    assert more is not None
    too_much = more.memory.excess_bytes > 0  # more than the GPU has, which no engine starts with
    for before, after in (
        (less.kv_cache.num_blocks, more.kv_cache.num_blocks),
        (less.kv_cache.capacity_tokens, more.kv_cache.capacity_tokens),
        (less.answers.max_batch_at_context, more.answers.max_batch_at_context),
        (less.answers.max_context_at_batch_tokens or 0, more.answers.max_context_at_batch_tokens or 0),
        (less.fits, more.fits or too_much),
    ):
        assert before is not None
        assert after is not None
        assert before <= after


@settings(max_examples=200, deadline=None, suppress_health_check=RELAXED)
@given(requests())
def test_blocks_times_bytes_never_exceed_the_budget(request: dict[str, Any]) -> None:
    plan = planned(**request)
    if plan is None:
        return
    cache, budget = plan.kv_cache, request["kv_cache_memory_bytes"]
    assert cache.num_blocks is not None
    # a block of a pool with a share of the memory takes no whole number of bytes: it is shown rounded up
    down = int(request["engine"] == "sglang")
    assert cache.num_blocks * (cache.bytes_per_block - down) <= budget < (cache.num_blocks + 1) * cache.bytes_per_block
    assert plan.answers.max_batch_at_context is not None
    assert plan.answers.max_batch_at_context * cache.bytes_per_request <= budget
    assert cache.scale_bytes_per_request <= cache.bytes_per_request
    if cache.engine == "vllm" and {group.kind for group in cache.groups} == {"full"}:
        assert cache.capacity_tokens is not None
        assert cache.capacity_tokens * cache.bytes_per_token <= budget


@settings(max_examples=200, deadline=None, suppress_health_check=RELAXED)
@given(requests(), st.integers(0, 50))
def test_the_ledger_sums_to_the_budget_and_no_line_is_negative(request: dict[str, Any], wanted: int) -> None:
    try:
        plan = cache_plan(set_up(make_request(request)))
    except KvplanError:
        return
    budget, context = request["kv_cache_memory_bytes"], request["context_tokens"]
    if not plan.groups or plan.num_blocks(budget) == 0:
        return
    count = min(wanted, plan.max_batch(budget, context))
    ledger = waste_ledger(plan, budget, context, count)
    assert sum(ledger.lines.values()) == budget == ledger.total_bytes
    assert all(value >= 0 for value in ledger.lines.values()), ledger.lines


@settings(max_examples=150, deadline=None, suppress_health_check=RELAXED)
@given(requests(), st.integers(0, 100_000))
def test_more_context_never_lowers_the_bytes_of_a_request(request: dict[str, Any], extra: int) -> None:
    short = planned(**request)
    if short is None:
        return
    long = planned(**{**request, "context_tokens": request["context_tokens"] + extra})
    assert long is not None
    assert short.kv_cache.bytes_per_request <= long.kv_cache.bytes_per_request


@settings(max_examples=150, deadline=None, suppress_health_check=RELAXED)
@given(requests())
def test_doubling_tp_never_raises_the_bytes_a_gpu_stores_per_token(request: dict[str, Any]) -> None:
    half = planned(**request)
    full = planned(**{**request, "tp_size": request["tp_size"] * 2})
    if half is None or full is None:
        return
    assert full.kv_cache.bytes_per_token <= half.kv_cache.bytes_per_token


@settings(max_examples=150, deadline=None, suppress_health_check=RELAXED)
@given(requests())
def test_fp8_never_stores_more_than_bf16(request: dict[str, Any]) -> None:
    """Per token always. Per request too where both have one block size; see the next test for where they have not."""
    wide = planned(**{**request, "kv_cache_dtype": "bf16"})
    narrow = planned(**{**request, "kv_cache_dtype": "fp8"})
    if wide is None or narrow is None:
        return
    assert narrow.kv_cache.bytes_per_token <= wide.kv_cache.bytes_per_token
    if narrow.kv_cache.block_size_tokens == wide.kv_cache.block_size_tokens:
        assert narrow.kv_cache.bytes_per_request <= wide.kv_cache.bytes_per_request


def test_a_request_of_one_token_may_take_more_bytes_in_fp8_because_its_block_is_longer() -> None:
    # DeepSeek on Hopper: bf16 blocks of 16 × 1,152 = 18,432 B a layer, fp8 blocks of 64 × 576 = 36,864 B
    one = {"model": "deepseek-r1", "gpu": "h200", "tp_size": 8, "context_tokens": 1}
    assert kvplan.size(compare=False, **one, kv_cache_dtype="bf16").kv_cache.bytes_per_request == 61 * 18_432
    assert kvplan.size(compare=False, **one, kv_cache_dtype="fp8").kv_cache.bytes_per_request == 61 * 36_864


@pytest.mark.parametrize("name", MODELS)
def test_every_bundled_model_is_planned_on_a_gpu(name: str) -> None:
    model = resolve_model(name)
    plan = kvplan.size(compare=False, model=name, gpu="b200", tp_size=1, context_tokens=4096)
    assert plan.kv_cache.bytes_per_request > 0
    assert plan.model is not None
    assert plan.model.num_layers == model.num_layers
