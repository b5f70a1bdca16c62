"""What a person sees at 80 columns without colour. ``pytest --update-snapshots`` rewrites; the diff is reviewed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import Ran

import kvplan

Cli = Callable[..., Ran]

SNAPSHOTS = {
    "seed": "size --model 70b --ctx 32k --batch 128",
    "h100_tp4": "size --model 70b --gpu h100 --tp 4 --ctx 32k",
    "fp8_per_token_head_h200": "size --model 70b --gpu h200 --tp 4 --ctx 128k --batch 64 "
    "--kv-cache-dtype fp8_per_token_head",
    "hybrid": "size --model qwen3.5-27b --gpu h100 --ctx 64k --batch 8 --kv-cache-dtype fp8",
    "latent_replicated": "size --model deepseek-r1 --gpu h200 --tp 8 --ctx 32k --batch 32",
    "does_not_fit": "size --model 405b --gpu h100 --tp 8 --ctx 128k --batch 16",
    "sweep": "size --model 70b --gpu h100 --tp 1,2,4,8 --ctx 32k",
    "sweep_without_gpu": "size --model 70b --ctx 8k,16k --batch 1,2",
    "explain": "size --model gpt-oss-120b --gpu h100 --ctx 32k --batch 4 --explain",
    "flags_only": "size --layers 80 --kv-heads 8 --head-dim 128 --ctx 32k --params 70B --gpu h200 --tp 2",
    "gpus": "gpus",
    "dtypes": "dtypes",
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_output_is_as_reviewed(kvplan_cli: Cli, snapshot: Callable[[str, str], None], name: str) -> None:
    ran = kvplan_cli(*SNAPSHOTS[name].split())
    assert (ran.code, ran.err) == (0, "")
    snapshot(name, f"$ kvplan {SNAPSHOTS[name]}\n" + ran.out)


def test_the_list_of_models_starts_as_reviewed(kvplan_cli: Cli, snapshot: Callable[[str, str], None]) -> None:
    lines = kvplan_cli("models").out.splitlines(keepends=True)
    snapshot("models", "$ kvplan models\n" + "".join(lines[:12]) + "…\n")


@pytest.mark.parametrize("name", [*SNAPSHOTS, "models"])
def test_nothing_is_wider_than_80_columns(kvplan_cli: Cli, name: str) -> None:
    words = SNAPSHOTS.get(name, name).split()
    assert [line for line in kvplan_cli(*words).out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", ["seed", "sweep", "gpus"])
def test_piped_output_has_no_escape_sequences(kvplan_cli: Cli, name: str) -> None:
    assert "\x1b" not in kvplan_cli(*SNAPSHOTS[name].split()).out


@pytest.mark.parametrize("width", [60, 80, 120, 400])
def test_tables_hold_at_any_width(kvplan_cli: Cli, width: int) -> None:
    ran = kvplan_cli(*SNAPSHOTS["seed"].split(), width=width)
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= min(width, 120)
    assert "1.25 TiB" in ran.out


def test_the_seed_case_says_what_it_must(kvplan_cli: Cli) -> None:
    out = kvplan_cli(*SNAPSHOTS["seed"].split()).out
    assert "1.25 TiB" in out
    assert "128" in out
    assert "32,768" in out  # the integer behind 32k is echoed


def test_explain_prints_formulas_that_multiply_out(kvplan_cli: Cli) -> None:
    out = kvplan_cli(*["size", "--model", "70b", "--gpu", "h100", "--tp", "4", "--ctx", "32k", "--explain"]).out
    # 8 heads / 4 ranks × 16 tokens × 512 B = 16,384 B
    assert "2 heads × 16 tokens × 512 B = 16,384 B a layer" in " ".join(out.split())


def test_version_is_the_packages(kvplan_cli: Cli) -> None:
    import kvplan

    assert kvplan_cli("--version").out == f"kvplan {kvplan.__version__}\n"


def test_a_gpu_may_be_called_with_its_vendor() -> None:
    names = ("NVIDIA H100", "nvidia-b200", "AMD MI300X")
    assert [kvplan.size(model="8b", gpu=name).request.gpu for name in names] == ["h100-sxm", "b200", "mi300x"]


def test_kv_that_is_less_than_the_weights_is_a_share_of_them(kvplan_cli: Cli) -> None:
    """256 MiB of 14.96 GiB."""
    assert "256.0 MiB, 1.7% of the weights (14.96 GiB)" in kvplan_cli("size", "--model", "8b", "--ctx", "2k").out


@pytest.mark.parametrize("command", ["models", "gpus", "dtypes"])
def test_listings_have_a_json_form(kvplan_cli: Cli, command: str) -> None:
    rows = kvplan_cli(command, "--json").json
    assert len(rows) >= 10
    assert all("name" in row for row in rows)


def test_a_sweep_as_json_keeps_refused_combinations_apart(kvplan_cli: Cli) -> None:
    ran = kvplan_cli(*["size", "--model", "70b", "--gpu", "h100", "--tp", "2,3,4", "--ctx", "4k", "--json"])
    assert [plan["request"]["tp_size"] for plan in ran.json["plans"]] == [2, 4]
    assert ran.json["errors"][0]["request"] == {"tp_size": 3}


def test_combinations_that_fail_alike_are_one_line(kvplan_cli: Cli) -> None:
    lists = ["--gpu", "h100,h200", "--kv-cache-dtype", "fp8,nvfp4", "--ctx", "8k,32k"]
    said = " ".join(kvplan_cli("size", "--model", "8b", *lists).out.split())
    assert said.count("NVFP4 KV needs") == 1 and "KV nvfp4 (4 combinations): no: vLLM refuses" in said


def test_loads_of_several_lists_keep_their_clients_on_a_narrow_page(kvplan_cli: Cli) -> None:
    lists = ["--gpu", "h100,h200", "--kv-cache-dtype", "bf16,fp8", "--concurrency", "16,64"]
    rows = kvplan_cli("itl", "--model", "70b", "--tp", "4", "--isl", "8k", "--osl", "1k", *lists).out.splitlines()
    labels = [row[:14].strip() for row in rows if row.startswith(("h100, ", "h200, ")) and "clients" not in row]
    assert labels[:3] == ["h100, bf16, 16", "h100, bf16, 64", "h100, fp8, 16"] and "…" not in "".join(labels)
