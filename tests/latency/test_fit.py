"""The fit of the serving parameters: what a row may move, and that odd deployments keep their oddity."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvplan.latency.fit import Observations, fit, observe, predict
from kvplan.latency.hierarchy import Design
from kvplan.latency.request import make_itl_request
from kvplan.latency.serve import serve
from kvplan.latency.served import Served

POINTS = [(isl, osl, c) for isl, osl in ((1024, 1024), (8192, 1024)) for c in (1, 4, 16, 64)]


def served(gpu: str, engine: str, version: str = "1.0", tp_size: int = 4) -> Served:
    request = {"model": "70b", "gpu": gpu, "engine": engine, "engine_version": version, "tp_size": tp_size,
               "kv_cache_dtype": "bf16", "weight_dtype": "fp8"}  # fmt: skip
    return serve(make_itl_request(request))


def rows(deployments: list[Served], slower: list[float], doubtful: list[float]) -> Observations:
    """Measurements that the priors predict, each deployment ``slower`` by a factor."""
    each = [one for one in deployments for _ in POINTS]
    points = [(float(a), float(b), float(c)) for _ in deployments for a, b, c in POINTS]
    ones = np.ones(len(each))
    data = observe(each, points, ones, ones, np.repeat(doubtful, len(POINTS)))
    design = Design(data.traits)
    truth = predict(design, design.center, data)
    factor = np.repeat(slower, len(POINTS))
    return observe(each, points, truth[0] * factor, truth[1] * factor, np.repeat(doubtful, len(POINTS)))


def offsets(design: Design, beta: Any, level: str) -> Any:
    return np.abs([beta[i] for (name, _, _), i in design.index.items() if name == level])


def test_measurements_that_the_priors_predict_leave_them_alone() -> None:
    design, beta = fit(rows([served("h200", "vllm"), served("h100", "vllm")], [1.0, 1.0], [0.0, 0.0]))
    assert np.abs(beta - design.center).max() < 1e-3


def test_doubtful_rows_move_their_engine_version_only() -> None:
    deployments = [served("h200", "vllm", "1.0"), served("h100", "vllm", "1.0"), served("h200", "vllm", "2.0")]
    data = rows(deployments, [1.0, 1.0, 0.6], [0.0, 0.0, 1.0])
    design, beta = fit(data)
    assert offsets(design, beta, "engine_version").max() > 0.1
    for level in ("engine", "gpu", "family", "deployment"):
        assert offsets(design, beta, level).max() < 0.02
    sound = data.take(data.doubtful == 0)
    assert np.abs(predict(design, beta, sound)[0] / sound.tpot_s - 1).max() < 0.02


def test_an_odd_deployment_keeps_its_oddity() -> None:
    """One of four GPUs half as fast as its datasheet says: the others' predictions stay within 3%."""
    deployments = [served(gpu, "vllm") for gpu in ("h100", "h200", "b200", "b300")]
    data = rows(deployments, [1.0, 1.0, 1.0, 2.0], [0.0] * 4)
    design, beta = fit(data)
    errors = predict(design, beta, data)[0] / data.tpot_s - 1
    assert np.abs(errors[: 3 * len(POINTS)]).max() < 0.03
    assert np.median(np.abs(errors[3 * len(POINTS) :])) < 0.15


def test_requests_that_wait_longer_than_they_decode_count_only_where_memory_makes_them_wait() -> None:
    """10 s of decoding after 20 s; 70B in FP8 with 16-bit KV leaves one H200 room for some 200,000 tokens."""
    one = served("h200", "vllm", tp_size=1)
    tpot, long_wait = np.full(4, 0.01), np.array([1.0, 20.0, 20.0, 20.0])
    points = [(1024.0, 1024.0, clients) for clients in (8.0, 8.0, 512.0, 512.0)]
    found = observe([one] * 4, points, tpot, long_wait, np.array([0.0, 0.0, 0.0, 1.0]))
    assert (found.weight > 0).tolist() == [True, False, True, False]


def test_prompts_that_arrive_together_move_time_from_tpot_to_ttft() -> None:
    data = rows([served("h200", "vllm")], [1.0], [0.0])
    design = Design(data.traits)
    alone, together = (design.center.copy() for _ in range(2))
    together[design.index["common", "", "together_spread"]] += 2
    (tpot, ttft), (later, first) = (predict(design, beta, data) for beta in (alone, together))
    busy = np.asarray(data.step.sequences) > 1
    assert (later[busy] < tpot[busy]).all() and (first[busy] > ttft[busy]).all()
