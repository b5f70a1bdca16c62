"""Scenario files: one deployment or a list, YAML or TOML, and one clear line for what is not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvplan.errors import InputError
from kvplan.scenario import one_deployment, read_scenario


def written(folder: Path, text: str, name: str = "fleet.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_fields_beside_the_list_apply_to_every_deployment(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "gpu: h200\ncontext_tokens: 32k\ndeployments:\n"
        "  - {name: chat, model: 70b, tp_size: 4}\n  - {model: 8b, gpu: l4}\n",
    )
    chat, other = read_scenario(path)
    assert chat.name == "chat"
    assert chat.options == {"gpu": "h200", "context_tokens": "32k", "model": "70b", "tp_size": 4}
    assert (other.name, other.options["gpu"]) == ("8b", "l4")


def test_one_deployment_needs_no_list_and_toml_reads_the_same(tmp_path: Path) -> None:
    yaml = one_deployment(written(tmp_path, "model: 70b\ntp_size: 4\nep: true\n"))
    toml = one_deployment(written(tmp_path, 'model = "70b"\ntp_size = 4\nep = true\n', "one.toml"))
    assert yaml == toml
    assert yaml.options == {"model": "70b", "tp_size": 4, "ep": True}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "model: [70b", "not YAML at line 1"),
        ("a.toml", "model = ", "not TOML"),
        ("a.yaml", "", "no fields"),
        ("a.yaml", "- 70b\n", "no fields"),
        ("a.yaml", "deployments: []\n", "1 to 1,000"),
        ("a.yaml", "deployments: [70b]\n", "deployment 1 is not a set of fields"),
        ("a.yaml", "model: {a: 1}\n", "model of deployment 1 must be text"),
        ("a.yaml", "deployments: [{model: 8b}, {model: 8b}]\n", "two deployments are called '8b'"),
        ("a.yaml", "tp_size: 2\nmodel: 8b\ntp_size: 4\n", "not YAML at line 1: tp_size is given twice"),
        ("a.yaml", "model: !!python/object/apply:os.system [ls]\n", "not YAML"),
        ("a.toml", "name = false\n", "name of deployment 1 must be text, not false"),
        ("a.txt", "model: 8b\n", ".yaml or .toml"),
    ],
)
def test_what_is_no_scenario_is_one_clear_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        read_scenario(written(tmp_path, text, name))
    assert "\n" not in error.value.message


def test_merged_fields_are_read_and_nested_merges_grow_no_further_than_their_keys(tmp_path: Path) -> None:
    shared = "deployments:\n- &base {model: 8b, tp_size: 2}\n- {<<: *base, name: big, tp_size: 4}\n"
    assert read_scenario(written(tmp_path, shared))[1].options == {"model": "8b", "tp_size": 4}
    levels = "".join(f"- &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    began = time.monotonic()
    with pytest.raises(InputError, match="two deployments are called '8b'"):
        read_scenario(written(tmp_path, f"deployments:\n- &a0 {{model: 8b}}\n{levels}"))
    assert time.monotonic() - began < 1


def test_a_list_of_words_is_what_the_command_line_writes(tmp_path: Path) -> None:
    assert one_deployment(written(tmp_path, "model: 8b\ncompare: [bf16, fp8]\n")).options["compare"] == "bf16,fp8"
    with pytest.raises(InputError, match="tp of deployment 1 must be text"):
        read_scenario(written(tmp_path, "model: 8b\ntp: [1, 2]\n"))


def test_dates_are_dates_and_no_number_is_to_the_base_of_60(tmp_path: Path) -> None:
    found = one_deployment(written(tmp_path, "model: 8b\ndate: 2026-11-24\nctx: 8:30\n")).options
    assert found["date"] == "2026-11-24" and found["ctx"] == "8:30"
    assert one_deployment(written(tmp_path, "date = 2026-11-24\n", "a.toml")).options["date"] == "2026-11-24"


def test_names_and_versions_are_text_as_written(tmp_path: Path) -> None:
    """YAML 1.1 would make false, 8, 750, a date and 0.3 of them."""
    names = ["no", "010", "12:30", "2026-11-24", "1e3", "null"]
    listed = "".join(f"- {{name: {name}, model: 8b, ep: no}}\n" for name in names)
    found = read_scenario(written(tmp_path, f"engine_version: 0.30\ndeployments:\n{listed}"))
    assert [deployment.name for deployment in found] == [*names[:-1], "8b"]
    assert found[0].options == {"engine_version": "0.30", "model": "8b", "ep": False}


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_scenario(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="2 deployments where one is meant"):
        one_deployment(written(tmp_path, "deployments: [{model: 8b}, {model: 70b}]\n"))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"model: caf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_scenario(latin)
