"""Docs that cannot lie: the command-line reference is generated, and README's commands run."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvplan

ROOT = Path(__file__).parent.parent
KVPLAN = Path(sys.executable).parent / "kvplan"


def test_cli_reference_is_what_the_cli_says(tmp_path: Path) -> None:
    """Regenerate with: python -m typer kvplan.cli.app utils docs --name kvplan --output docs/cli.md --title ..."""
    out = tmp_path / "cli.md"
    subprocess.run(
        [sys.executable, "-m", "typer", "kvplan.cli.app", "utils", "docs", "--name", "kvplan", "--output", str(out),
         "--title", "Command-line reference"],
        check=True, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert out.read_text() == (ROOT / "docs" / "cli.md").read_text()


def _readme_commands() -> list[str]:
    blocks = re.findall(r"^## Ask\n\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S | re.M)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    return [part.strip() for line in lines for part in line.split(";")]


def _readme_case() -> str:
    quoted = re.search(r"^A line of `requests.jsonl` is `(\{.*\})`", (ROOT / "README.md").read_text(), re.M)
    assert quoted is not None
    return quoted[1]


def test_the_case_that_readme_shows_is_planned(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text(_readme_case())
    for command in ("size", "itl"):
        done = subprocess.run([KVPLAN, command, "--cases", tmp_path / "requests.jsonl"], capture_output=True, text=True)
        assert '"tp_size": 4' in done.stdout and done.stderr == ""


@pytest.mark.parametrize("command", _readme_commands())
def test_every_readme_command_runs(command: str, tmp_path: Path) -> None:
    """--check may answer no (exit 1); nothing else but 0 is fine."""
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,'
        ' "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,'
        ' "max_position_embeddings": 131072}'
    )
    (tmp_path / "requests.jsonl").write_text(_readme_case() + "\n")
    arguments = shlex.split(command.split(">")[0])
    assert arguments[0] == "kvplan"
    done = subprocess.run([KVPLAN, *arguments[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or (done.returncode == 1 and "--check" in arguments), done.stderr
    assert done.stdout


def test_readme_quotes_what_the_seed_case_prints() -> None:
    done = subprocess.run([KVPLAN, "size", "--model", "70b", "--ctx", "32k", "--batch", "128"],
                          capture_output=True, text=True, check=True, env={"COLUMNS": "80", "PATH": ""})  # fmt: skip
    quoted = re.search(
        r"```\n\$ kvplan size --model 70b --ctx 32k --batch 128\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert quoted is not None
    printed = {line.rstrip() for line in done.stdout.splitlines()}
    for line in quoted[1].splitlines():
        assert line == "…" or line.rstrip() in printed, line


def test_the_purchase_that_the_example_prints_is_what_size_says() -> None:
    """64 users of 10 GiB beside 131 GiB of weights: no 8 GPUs of 40 GiB hold that."""
    done = subprocess.run([sys.executable, ROOT / "examples" / "size_a_purchase.py"], capture_output=True, text=True)
    bf16 = done.stdout.split("fp8 KV")[0]
    for row in kvplan.size(model="70b", context_tokens="32k", batch_size=64).gpus:
        if row.num_gpus is not None:
            assert re.search(rf"^ +{row.num_gpus} × {re.escape(row.display_name)} ", bf16, re.M)
            assert row.num_gpus * row.memory_bytes > 770 * 2**30


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_runs(example: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr


def test_an_example_whose_reader_goes_away_says_nothing() -> None:
    """As under ``| head``; every line is written as it comes."""
    command = [sys.executable, "-u", ROOT / "examples" / "size_a_purchase.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as example:
        assert example.stdout is not None and example.stderr is not None
        assert example.stdout.readline()
        example.stdout.close()
        assert example.stderr.read() == b""
    assert example.returncode == -signal.SIGPIPE
