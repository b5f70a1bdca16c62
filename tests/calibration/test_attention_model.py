"""The physical form of decode attention: what must hold whatever the parameters are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplan.calibration.attention import find_attention, make_geometry
from kvplan.calibration.attention_model import INDEX, PARAMETERS, latency_s
from kvplan.calibration.geometry import ONE_KERNEL, Dispatch, default_head_dim_v, hardware_of, token_bytes_of
from kvplan.errors import InputError
from kvplan.gpu import load_gpu

GPUS = ("a100-80gb-sxm", "h200", "b200", "l40s", "rtx-pro-6000-server")
SHIPPED = (("h200", "vllm"), ("l40s", "sglang"), ("a100-80gb-sxm", "vllm"), ("b200", "tensorrt-llm"))


@st.composite
def parameters(draw: st.DrawFn) -> np.ndarray:
    """Log parameters within two spreads of their priors."""
    return np.array([np.log(p.prior) + draw(st.floats(-2, 2)) * p.spread for p in PARAMETERS])


shapes = st.fixed_dictionaries({
    "batch": st.integers(1, 2048), "context": st.integers(1, 200_000), "kv_heads": st.sampled_from([1, 2, 4, 8, 32]),
    "group": st.sampled_from([1, 2, 4, 8, 16, 64]), "head_dim": st.sampled_from([64, 128, 192, 256, 512]),
    "window": st.sampled_from([0, 128, 1024, 8192]),
})  # fmt: skip


def cases(shape: dict[str, int], kv_dtype: str = "bf16", **changed: list[int]):
    values = {name: [value] for name, value in shape.items()} | changed
    rows = max(len(value) for value in values.values())
    column = {name: np.resize(np.array(value, dtype=float), rows) for name, value in values.items()}
    arrays = [column["batch"], column["context"], column["kv_heads"] * column["group"], column["kv_heads"],
              column["head_dim"], default_head_dim_v(column["head_dim"]), column["window"]]  # fmt: skip
    return make_geometry(arrays, kv_dtype)


@settings(max_examples=150, deadline=None)
@given(theta=parameters(), shape=shapes, gpu=st.sampled_from(GPUS))
def test_more_context_is_never_faster(theta, shape, gpu):
    contexts = sorted({shape["context"], *np.unique(np.geomspace(1, 400_000, 60).astype(int)).tolist()})
    times = latency_s(theta, cases(shape, context=contexts), hardware_of(load_gpu(gpu)))
    assert (np.diff(times) >= -1e-9 * times[1:]).all()  # the roundings of a few powers, nothing more


@settings(max_examples=150, deadline=None)
@given(theta=parameters(), shape=shapes, gpu=st.sampled_from(GPUS))
def test_a_larger_batch_is_never_faster(theta, shape, gpu):
    batches = [*list(range(1, 400)), 512, 700, 1024, 2048, 4096]
    times = latency_s(theta, cases(shape, batch=batches), hardware_of(load_gpu(gpu)))
    assert (np.diff(times) >= -1e-9 * times[1:]).all()


@settings(max_examples=150, deadline=None)
@given(theta=parameters(), shape=shapes, gpu=st.sampled_from(GPUS), factor=st.floats(0.3, 0.99))
def test_fewer_bytes_an_element_never_raise_the_latency(theta, shape, gpu, factor):
    whole = cases(shape)
    hw = hardware_of(load_gpu(gpu))
    assert (
        latency_s(theta, replace(whole, token_bytes=whole.token_bytes * factor), hw)[0]
        <= latency_s(theta, whole, hw)[0]
    )


def test_a_window_reads_no_more_than_the_whole_context():
    theta = np.log([p.prior for p in PARAMETERS])
    hw = hardware_of(load_gpu("h200"))
    shape = {"batch": 64, "context": 65_536, "kv_heads": 8, "group": 8, "head_dim": 128, "window": 0}
    assert latency_s(theta, cases(shape, window=[1024]), hw) < 0.2 * latency_s(theta, cases(shape), hw)


def test_large_kv_runs_at_the_fitted_bandwidth():
    """d(latency)/d(context) × B·Hkv·bytes a token = 1/bandwidth, within what fixed work adds."""
    theta = np.log([p.prior for p in PARAMETERS])
    hw = hardware_of(load_gpu("h200"))
    shape = {"batch": 64, "context": 1, "kv_heads": 8, "group": 1, "head_dim": 128, "window": 0}
    times = latency_s(theta, cases(shape, context=[200_000, 400_000]), hw)
    bandwidth = 64 * 8 * 512 * 200_000 / (times[1] - times[0])
    assert bandwidth == pytest.approx(0.92 * 4.8e12, rel=0.02)


def test_bytes_of_a_token_count_scales_and_narrow_values():
    assert token_bytes_of("bf16", 128, 128) == 512
    assert token_bytes_of("fp8", 128, 128) == 256
    assert token_bytes_of("fp8_per_token_head", 128, 128) == 264  # two FP32 scales
    assert token_bytes_of("bf16", 192, default_head_dim_v(192)) == 640  # 192 + 128 elements
    assert token_bytes_of("nvfp4", 128, 128) == 144  # 128 nibble pairs + 16 scales


def test_tensorrt_llm_leaves_xqa_for_few_16_bit_pieces_and_for_other_groups():
    """33 pieces of 128 tokens on 132 SMs; 8-bit KV goes to XQA whatever its size; MHA, groups above 32 and heads wider
    than 256 never."""
    rule = Dispatch(rule="tensorrt-llm-xqa")
    one = {"batch": 1, "context": 1, "kv_heads": 1, "group": 8, "head_dim": 128, "window": 0}
    assert rule.num_kernels == 2 and ONE_KERNEL.num_kernels == 1
    assert rule.other(cases(one, context=[4096, 33 * 128])).tolist() == [True, False]
    assert rule.other(cases(one, "fp8", context=[1, 4096])).tolist() == [False, False]
    assert rule.other(cases({**one, "batch": 512}, group=[1, 2, 32, 64])).tolist() == [True, False, False, True]
    assert rule.other(cases({**one, "batch": 512}, head_dim=[64, 192, 512])).tolist() == [False, False, True]


def test_listed_shapes_go_to_the_other_kernel():
    listed = Dispatch(((64, False, None), (128, True, 5)))
    shape = {"batch": 1, "context": 64, "kv_heads": 1, "group": 5, "head_dim": 128, "window": 0}
    assert listed.other(cases(shape, head_dim=[64, 128])).tolist() == [True, False]
    assert listed.other(cases({**shape, "window": 32}, head_dim=[64, 128])).tolist() == [False, True]
    assert listed.other(cases({**shape, "window": 32}, group=[4, 5])).tolist() == [False, True]


def test_parameter_names_are_unique_and_priors_positive():
    assert len(INDEX) == len(PARAMETERS)
    assert all(p.prior > 0 and p.spread > 0 and p.unit and p.meaning for p in PARAMETERS)


@pytest.mark.parametrize(("gpu", "engine"), SHIPPED)
def test_shipped_calibrations_grow_with_context_and_fp8_reads_less(gpu, engine):
    calibration = find_attention(gpu, engine)
    assert calibration is not None
    times = calibration.latency_s(64, np.geomspace(1, 1e6, 200), 64, 8, 128)
    assert (np.diff(times) >= 0).all()
    ratio = calibration.slope_ratio("fp8")
    assert 0.35 < ratio.low < ratio.value < ratio.high < 1.1
    assert calibration.slope_ratio("bf16").value == 1
    assert calibration.slope_ratio("fp8_per_token_head").value > ratio.value


def test_an_assumed_dtype_and_a_far_context_widen_the_interval():
    calibration = find_attention("h200", "vllm")

    def width(**about) -> float:
        low, high = calibration.interval(64, about.get("context", 8192), 64, 8, 128, kv_dtype=about.get("dtype", "fp8"))
        return float(np.log(high / low))

    assert width(dtype="int8_per_token_head") == pytest.approx(2 * width())
    assert width(context=10**7) == pytest.approx(1.5 * width())
    assert "shipped" in calibration.source and "vllm 0.22.0" in calibration.source


def test_arguments_broadcast_and_bad_ones_are_refused():
    calibration = find_attention("h200", "vllm")
    assert calibration.latency_s(np.ones((3, 1)), np.array([1024, 2048]), 64, 8, 128, 128, 0, "fp8").shape == (3, 2)
    with pytest.raises(InputError):
        calibration.latency_s(0, 1024, 64, 8, 128)
    with pytest.raises(InputError):
        calibration.latency_s(1, 1024, 4, 8, 128)
    assert find_attention("h20", "vllm") is None


def test_a_hundred_thousand_cases_are_one_call():
    calibration = find_attention("h200", "vllm")
    contexts = np.linspace(1, 131072, 100_000)
    assert calibration.latency_s(32, contexts, 64, 8, 128).shape == (100_000,)
