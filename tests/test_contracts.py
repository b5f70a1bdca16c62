"""What other programs rely on: JSON keys, types, the public names, what an import loads."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError
from support import Ran

import kvplan
from kvplan import SizePlan

Cli = Callable[..., Ran]

KV_CACHE_KEYS = {
    "bytes_per_token", "scale_bytes_per_token", "block_size_tokens", "bytes_per_block", "num_blocks",
    "capacity_tokens", "max_concurrency", "groups",
}  # fmt: skip
GROUP_KEYS = {"kind", "num_layers", "page_bytes", "scale_bytes_per_page", "block_size_tokens"}
MEMORY_KEYS = {
    "total_bytes", "usable_bytes", "weights_bytes", "activation_bytes", "graph_bytes", "overhead_bytes",
    "kv_cache_bytes",
}  # fmt: skip
REQUEST_KEYS = {
    "model", "gpu", "engine", "tp_size", "pp_size", "dp_size", "dcp_size", "ep", "enable_prefix_caching",
    "kv_cache_dtype", "block_size_tokens", "max_model_len_tokens", "max_num_seqs", "max_num_batched_tokens",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "context_tokens", "batch_size",
}  # fmt: skip

REQUESTS: list[dict[str, Any]] = [
    {"model": "70b", "context_tokens": "32k", "batch_size": 128},
    {"model": "70b", "gpu": "h200", "tp_size": 4, "context_tokens": 131072, "kv_cache_dtype": "fp8_per_token_head"},
    {"model": "deepseek-v4-flash", "gpu": "b200", "tp_size": 4, "context_tokens": 65536},
    {"model": "qwen3.5-27b", "gpu": "h100", "context_tokens": 65536},
    {"model": "405b", "gpu": "l4", "context_tokens": 4096},
    {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64, "context_tokens": 4096},
    {"model": "gpt-oss-120b", "gpu": "mi300x", "engine": "sglang", "context_tokens": 8192},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: str(r.get("model")))
@pytest.mark.parametrize("compare", [True, False])
def test_a_plan_as_json_is_a_plan_again(request_: dict[str, Any], compare: bool) -> None:
    """Strict: no number in text, no float where bytes or tokens are whole, no key that the types do not have."""
    plan = kvplan.size(compare=compare, **request_)
    text = plan.to_json()
    assert json.loads(text) == plan.as_dict()
    assert TypeAdapter(SizePlan).validate_json(text, strict=True) == plan
    broken = plan.as_dict()
    broken["answers"]["num_gpus"] = "one"
    with pytest.raises(ValidationError):
        TypeAdapter(SizePlan).validate_json(json.dumps(broken), strict=True)


def test_size_json_has_the_keys_of_the_contract(kvplan_cli: Cli) -> None:
    result = kvplan_cli("size", "--model", "70b", "--gpu", "h100", "--tp", "4", "--ctx", "32k", "--json").json
    assert set(result) >= {"request", "kv_cache", "memory", "fits", "advice"}
    assert set(result["request"]) >= REQUEST_KEYS
    assert set(result["kv_cache"]) >= KV_CACHE_KEYS
    assert all(set(group) >= GROUP_KEYS for group in result["kv_cache"]["groups"])
    assert set(result["memory"]) >= MEMORY_KEYS
    assert set(result["memory"]["sources"]) == MEMORY_KEYS
    allowed = {"exact", "assumed", "calibrated", "given", "reported", "roofline", None}
    assert {term["source"] for term in result["memory"]["sources"].values()} <= allowed
    assert all(set(advice) >= {"code", "message"} for advice in result["advice"])


def test_no_unit_but_si_hides_in_a_key() -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for child in value.values() for key in keys(child)}
        return {key for item in value for key in keys(item)} if isinstance(value, list) else set()

    found = keys(kvplan.size(**REQUESTS[1]).as_dict())
    assert not [key for key in found if key.endswith(("_ms", "_gib", "_gb", "_mb", "_us", "_kib"))]


def test_unknown_is_null_and_never_zero() -> None:
    plan = kvplan.size(model="70b", context_tokens=32768)
    assert plan.fits is None
    assert plan.kv_cache.num_blocks is None
    assert plan.memory.total_bytes is None
    assert plan.memory.kv_cache_bytes is None


def test_cases_print_what_json_prints(kvplan_cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    lines = kvplan_cli("size", "--cases", str(path)).out.splitlines()
    assert len(lines) == len(REQUESTS)
    for line, request in zip(lines, REQUESTS, strict=True):
        assert json.loads(line) == kvplan.size(compare=False, **request).as_dict()


def test_a_resolved_request_asks_the_same_question_again() -> None:
    """The echo is complete: fed back, it gives the same blocks."""
    first = kvplan.size(compare=False, model="70b", gpu="h100", tp_size=4, context_tokens=32768, kv_cache_dtype="fp8")
    echoed = first.as_dict()["request"]
    second = kvplan.size(compare=False, **echoed)
    assert second.kv_cache == first.kv_cache
    assert second.memory.kv_cache_bytes == first.memory.kv_cache_bytes


def test_the_ledger_of_a_plan_sums_to_its_kv_budget() -> None:
    for request in REQUESTS:
        plan = kvplan.size(**request)
        if plan.ledger:
            assert sum(line.bytes for line in plan.ledger) == plan.memory.kv_cache_bytes


def test_scale_bytes_have_a_line_of_their_own_and_the_gain_is_1_94() -> None:
    rows = {row.kv_cache_dtype: row for row in kvplan.size(**REQUESTS[1]).comparison}
    row = rows["fp8_per_token_head"]
    assert row.advertised_gain == 2
    assert row.effective_gain == 512 / 264  # 1.939: 256 values and 8 bytes of scales a (token, head)
    assert row.scale_share == 8 / 264
    assert rows["nvfp4"].forbidden


# ------------------------------------------------------------------------------------------------------ the package


def test_all_names_every_public_name_and_each_can_be_had() -> None:
    sizing = {"KvplanError", "SizePlan", "SizeRequest", "__version__", "size", "size_from_log"}
    latency = {"ItlPlan", "itl", "itl_cases"}
    checking = {"CheckResult", "check_log", "check_url"}
    reporting = {"Fleet", "Report", "fleet", "report"}
    assert set(kvplan.__all__) == sizing | latency | checking | reporting
    assert all(getattr(kvplan, name) is not None for name in kvplan.__all__)
    assert set(dir(kvplan)) >= set(kvplan.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        kvplan.nonsense  # noqa: B018


def test_report_is_a_function_after_every_module_was_imported() -> None:
    """A subpackage of a public function's name would hide it."""
    names = [
        module.name for module in pkgutil.walk_packages(kvplan.__path__, "kvplan.") if "kernels" not in module.name
    ]
    hidden = {f"kvplan.{name}" for name in kvplan.__all__} & set(names)
    assert not hidden
    assert callable(kvplan.report)


@pytest.mark.parametrize("name", ["kvplan", "kvplan.api", "kvplan.units"])
def test_examples_in_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name == "kvplan.units"


HEAVY = ("torch", "triton", "huggingface_hub", "numpy", "pydantic")


def loaded(statement: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of ``names`` a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(n for n in {names!r} if n in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


PLAN = "import kvplan; kvplan.size(model='70b', gpu='h100', tp_size=4, context_tokens=4096)"


@pytest.mark.parametrize("statement", ["import kvplan", "import kvplan.cli", "import kvplan.cli.app", PLAN])
def test_sizing_loads_neither_torch_nor_anything_else_heavy(statement: str) -> None:
    assert loaded(statement) == []


def test_the_import_check_can_fail() -> None:
    assert loaded("import kvplan.cli.app, numpy, pydantic") == ["numpy", "pydantic"]


def test_keywords_are_typed_one_by_one() -> None:
    """A type checker knows every field that a function takes, and no other."""
    from kvplan import keywords
    from kvplan.document.question import OWN_FIELDS, SHAPE_FIELDS
    from kvplan.latency.request import ALL_FIELDS
    from kvplan.memory.request import FIELDS

    reported = {*FIELDS, *OWN_FIELDS, "concurrency"} - {*SHAPE_FIELDS, "id"}
    for typed, taken in (("Size", set(FIELDS)), ("Itl", set(ALL_FIELDS)), ("Report", reported)):
        assert set(get_type_hints(getattr(keywords, f"{typed}Keywords"))) == taken, typed


@pytest.mark.slow
def test_a_strictly_typed_script_is_told_a_wrong_keyword(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import kvplan\n"
        'print(kvplan.size(model="70b", gpu="h100", context_tokens="32k").memory.kv_cache_bytes)\n'
        'print(kvplan.itl(model="70b", gpu="h100", context_tokens=8192).itl_s)\n'
        "kvplan.size(tp=4)\n"
    )
    where = {
        **os.environ,
        "MYPYPATH": str(Path(__file__).parents[1]),
    }  # mypy does not follow the import hook of an editable install
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "script.py"], cwd=tmp_path, capture_output=True, text=True, env=where
    )
    assert [line.partition(": error: ")[2] for line in done.stdout.splitlines() if "script.py:4: error" in line] == [
        'Unexpected keyword argument "tp" for "size"  [call-arg]'
    ]


def test_a_model_and_files_may_be_paths(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }))  # fmt: skip
    log = Path(__file__).parent / "check" / "logs" / "vllm-0.31-llama-3.1-8b-a100.log"
    asked: dict[str, Any] = {"model": config, "gpu": "h100", "context_tokens": 8192}
    document = kvplan.report(**asked, date="2026-11-24")
    assert f'"model": "{config}"' in document.as_json()
    plans = [kvplan.size(**asked), document, kvplan.itl(**asked), kvplan.size_from_log(log, model=config)]
    assert [plan.as_json() if plan is document else plan.to_json() for plan in plans]  # type: ignore[attr-defined]
    for option in ("measured", "calibration"):
        with pytest.raises(kvplan.KvplanError, match=str(tmp_path / "absent")):
            kvplan.report(**asked, **{option: tmp_path / "absent"})
