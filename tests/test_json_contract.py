"""What every ``--json`` keeps: a version, units in names, sources of what is not exact, null for unknown, no NaN."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Ran

Cli = Callable[..., Ran]
LOG = str(Path(__file__).parent / "check" / "logs" / "vllm-0.31-llama-3.1-8b-a100.log")
SAMPLES = "\n".join([
    "batch_size,context_tokens,num_q_heads,num_kv_heads,head_dim,window_tokens,kv_dtype,latency_s",
    *(f"{b},{c},32,8,128,0,bf16,{9e-6 + b * c * 4096 / 4e12}" for b in (1, 8, 64) for c in (1024, 8192, 32768)),
])  # fmt: skip
OBJECTS = {
    "size": "size --model 8b --gpu h100 --ctx 8k --batch 4",
    "size without a GPU": "size --model deepseek-v3 --ctx 8k",
    "size of a hybrid": "size --model qwen3.5-27b --gpu h200 --ctx 64k --engine sglang",
    "size that does not fit": "size --model 405b --gpu l4 --ctx 8k",
    "size from a log": f"size --from-log {LOG} --ctx 8k",
    "sweep": "size --model 8b --gpu h100,l4 --tp 1,3 --ctx 8k",
    "itl": "itl --model 8b --gpu h100 --ctx 8k --kv-cache-dtype fp8",
    "itl of lines": "itl --model deepseek-v3 --gpu h200 --tp 8 --kv-cache-dtype fp8,bf16",
    "itl under load": "itl --model 8b --gpu h100 --isl 1k --osl 1k --concurrency 4",
    "itl under loads": "itl --model 70b --gpu h100 --tp 1,4 --isl 1k --osl 1k --concurrency 4,64",
    "check": f"check --log {LOG}",
    "profiles": "profiles",
    "profiles show": "profiles show attention-h200-vllm",
    "profiles show of products": "profiles show gemm-h200-vllm",
    "calibrate": "calibrate SAMPLES --gpu h200 -o OUT/fit.json --evaluate SAMPLES",
    "report": "report --model 8b --gpu h100 --ctx 8k",
    "fleet": "report FLEET -o OUT/fleet",
    "measure": "measure --device cpu --batch 1 --ctx 32,64 --num-q-heads 4 --num-kv-heads 2 --head-dim 64 -o OUT/run",
}
LISTS = ("models", "gpus", "dtypes")
WITH_UNIT = re.compile(
    r"(^|_)(bytes|tokens|s|flops)$|(^|_)(bytes|flops|tokens)_per_s(_|$)"
    r"|_per_(token|element|block|request|token_head|page|gpu)(_|$)"
    r"|(^|_)(num|max|min)_|_(size|sizes|count|dim|version)$"
    r"|(^|_)(ratio|share|gain|error|fraction|tolerance|utilization|spread|floor|sharpness|scale)(_|$)"
)
"""What a number's key, or the key of the object around it, says: a unit, that it counts, or that it is a ratio."""
COUNTS = {"group", "users", "wins_users", "ledger_requests", "running_requests", "concurrency", "count", "layer_kinds",
          "registers", "spills", "line_number", "seed"}  # fmt: skip
RATIOS = {"wins_capacity", "low", "high", "median", "p90", "covered", "relative", "residuals", "half_width_log",
          "covariance_log", "log_spread"}  # fmt: skip
SAID_BESIDE = {"breakdown", "parameters", "terms", "reported", "valid_range"}
"""Objects whose numbers have their unit beside them (``unit``), in ``definitions``, or in the name of what they are."""


def numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each number."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from numbers(child, (*path, key))
    elif isinstance(value, list):
        for child in value:
            yield from numbers(child, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def strict(text: str) -> Any:
    """JSON as its standard has it, which Python's reader does not insist on."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def answer(kvplan_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """What a command prints with ``--json``."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "samples.csv").write_text(SAMPLES)
    (tmp_path / "fleet.yaml").write_text(
        "gpu: h200\ndeployments:\n  - {name: a, model: 8b, ctx: 8k}\n  - {name: b, model: 8b, tp: 3, ctx: 8k}\n"
    )
    names = {"SAMPLES": str(tmp_path / "samples.csv"), "FLEET": str(tmp_path / "fleet.yaml"), "OUT": str(tmp_path)}

    def run(command: str) -> Any:
        words = [re.sub("|".join(names), lambda name: names[name[0]], word) for word in command.split()]
        return strict(kvplan_cli(*words, "--json").out)

    return run


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_says_its_version_and_the_unit_of_each_number(answer: Callable[[str], Any], name: str) -> None:
    if name == "measure":
        pytest.importorskip("torch", reason="torch is not installed (the `measure` extra brings it)")
    found = answer(OBJECTS[name])
    assert isinstance(found["schema_version"], int)
    bare = {
        ".".join(path) for path in numbers(found)
        if not any(WITH_UNIT.search(key) or key in COUNTS | RATIOS for key in path[-2:])
        and not SAID_BESIDE & set(path)
    }  # fmt: skip
    assert not bare
    assert not [path for path in numbers(found) if path[-1].endswith(("_ms", "_us", "_gib", "_gb", "_mb", "_kib"))]


@pytest.mark.parametrize("name", LISTS)
def test_a_list_has_one_object_a_thing_and_units_in_its_names(answer: Callable[[str], Any], name: str) -> None:
    found = answer(name)
    assert found and all(entry["name"] for entry in found)
    assert not {path for path in numbers(found) if not any(WITH_UNIT.search(key) for key in path[-2:])}


def test_a_bare_number_and_nan_would_be_found() -> None:
    assert list(numbers({"a": {"latency": [1.5]}, "b": True, "c": None})) == [("a", "latency")]
    assert not WITH_UNIT.search("latency") and WITH_UNIT.search("latency_s")
    with pytest.raises(AssertionError, match="NaN is no JSON"):
        strict('{"itl_s": NaN}')


def test_what_is_estimated_names_its_source(answer: Callable[[str], Any]) -> None:
    """Memory term by term, times as a whole, slopes, precisions and every figure of a report's audit."""
    plan, line = answer(OBJECTS["size"]), answer(OBJECTS["itl"])
    sources = {"exact", "assumed", "calibrated", "given", "reported", "planned", "roofline"}
    assert {term["source"] for term in plan["memory"]["sources"].values()} <= sources
    assert all(term["detail"] for term in plan["memory"]["sources"].values())
    assert line["source"] in sources and line["source_detail"] and line["slope_ratio_source"] in sources
    assert len(line["interval_s"]) == 2 and line["interval_note"]
    audit = answer(OBJECTS["report"])["audit"]
    assert audit and {figure["source"] for figure in audit} <= sources | {"unknown"}
    assert all(entry["engine_slopes"] == [] or entry["engine_slopes"][0]["source"] for entry in answer("dtypes"))


def test_what_is_not_known_is_null(answer: Callable[[str], Any]) -> None:
    plan = answer(OBJECTS["size without a GPU"])
    assert plan["fits"] is plan["kv_cache"]["num_blocks"] is plan["memory"]["total_bytes"] is None
    failed = answer(OBJECTS["fleet"])["entries"][1]
    assert failed["problem"] and failed["fits"] is failed["itl_s"] is failed["num_gpus"] is None


@pytest.mark.parametrize("command", ["size", "itl"])
def test_cases_say_the_same_as_one_object(kvplan_cli: Cli, command: str, tmp_path: Path) -> None:
    case = {"model": "8b", "gpu": "h100", "context_tokens": 8192, "batch_size": 4}
    (tmp_path / "cases.jsonl").write_text(f"{json.dumps(case)}\n{json.dumps(case | {'gpu': 'h1000'})}\n")
    answered, failed = map(strict, kvplan_cli(command, "--cases", str(tmp_path / "cases.jsonl")).out.splitlines())
    assert answered["schema_version"] == 1 and answered["request"]["model"]
    assert set(failed) == {"error"} and set(failed["error"]) == {"code", "message", "hint"}
