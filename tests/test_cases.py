"""``--cases``: an error stands in the place of a case that fails, names the field that was meant, and is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from support import Ran

GOOD = {"model": "8b", "gpu": "h100", "context_tokens": 8192, "batch_size": 4}
MEANT = {"ctx": "context_tokens", "tp": "tp_size", "batch": "batch_size", "dp": "dp_size",
         "max-model-len": "max_model_len_tokens"}  # fmt: skip


@pytest.fixture(params=["size", "itl"])
def answers(request: pytest.FixtureRequest, kvplan_cli: Callable[..., Ran]) -> Callable[..., tuple[list[Any], Ran]]:
    """What ``kvplan size`` or ``itl`` makes of cases on stdin."""

    def run(*cases: Any) -> tuple[list[Any], Ran]:
        ran = kvplan_cli(request.param, "--cases", "-", stdin="\n".join(json.dumps(case) for case in cases))
        return [json.loads(line) for line in ran.out.splitlines()], ran

    return run


@pytest.mark.parametrize(("name", "meant"), MEANT.items())
def test_an_option_in_the_place_of_a_field_is_told_the_field(answers: Callable[..., Any], name: str, meant: str):
    """``ctx`` without ``context_tokens`` too: what was written comes before what is missing."""
    case = {key: value for key, value in GOOD.items() if key != meant} | {name: 4}
    ((found,), _) = answers(case)
    assert found["error"]["message"] == f"unknown request field '{name}'"
    assert found["error"]["hint"] == f"write {meant}"


def test_failed_cases_are_counted_on_stderr(answers: Callable[..., Any]):
    found, ran = answers(GOOD, "text", GOOD, GOOD | {"gpu": "h101"})
    assert ["error" in row for row in found] == [False, True, False, True]
    assert (ran.code, ran.err) == (0, "2 of 4 cases failed\n")


def test_an_error_carries_the_id_of_its_case_and_a_field_given_twice_is_one(kvplan_cli: Callable[..., Ran]):
    cases = '{"id": 7, "model": "nosuch", "gpu": "h100", "context_tokens": 1}\n{"model": "70b", "model": "8b"}\n'
    for command in ("size", "itl"):
        unknown, twice = (
            json.loads(line) for line in kvplan_cli(command, "--cases", "-", stdin=cases).out.splitlines()
        )
        assert unknown["id"] == 7 and unknown["error"]["code"] == "unknown_name"
        assert twice == {"error": {"code": "bad_input", "message": "model is given twice", "hint": "each field once"}}


def test_nothing_is_said_where_no_case_fails(answers: Callable[..., Any]):
    assert answers(GOOD)[1].err == ""
