"""What a report is asked: the deployment, its load, what to compare, and what is known from measurements."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvplan.dtypes import canonical_kv_dtype
from kvplan.errors import InputError, closest, shorten
from kvplan.memory.request import FIELDS, OPTION_NAMES, SizeRequest, make_request
from kvplan.units import parse_tokens

SHAPE_FIELDS = ("num_layers", "num_kv_heads", "head_dim", "num_parameters", "window_tokens")
LENGTHS = ("input_tokens", "output_tokens")
OWN_FIELDS = ("name", *LENGTHS, "compare", "measured", "calibration", "date")
MAX_COMPARED = 8
DEFAULT_OUTPUT_SHARE = 8
DEFAULT_OUTPUT_TOKENS = 1024
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True)
class Question:
    """One report to make.

    Attributes:
        size: the sizing request; ``batch_size`` is the number of users, None when none was stated.
        input_tokens, output_tokens: prompt and answer of a request under load.
        lengths_given: whether they were stated, or follow from the context.
        compare: KV formats to set beside each other, as asked; empty picks the usual ones.
        measured: folder of a ``kvplan measure`` run.
        calibration: an attention calibration file.
        name: what the deployment is called; None is the model's name.
        inputs: what was asked, as asked.
        refused: a KV format that was asked for and that the engine refuses; ``size`` then has the model's default.
        refusal: the engine's reason.

    """

    size: SizeRequest
    name: str | None
    input_tokens: int
    output_tokens: int
    lengths_given: bool
    compare: tuple[str, ...]
    measured: Path | None
    calibration: str | None
    date: str
    inputs: Mapping[str, Any]
    refused: str | None = None
    refusal: str | None = None


def make_question(options: Mapping[str, Any]) -> Question:
    """A question from plain values, each checked; None leaves the default.

    Raises:
        InputError: an unknown or impossible field; the message names it.

    """
    given, own = fields_of(options)
    shape = next((name for name in SHAPE_FIELDS if name in given), None)
    if shape is not None:
        raise InputError(f"a report needs a model, not {shape}", hint="`kvplan size` plans a model from flags")
    size = make_request(given)
    if size.model is None:
        raise InputError("no model given", hint="--model takes a name (70b), a hub id, a folder or a config.json")
    if size.gpu is None and size.gpu_memory_bytes is None:
        raise InputError("no GPU named, and a report is about one deployment",
                         hint="add --gpu h200; `kvplan size` without it finds the fewest of each GPU")  # fmt: skip
    return Question(
        size=size,
        name=_name(own.get("name")),
        input_tokens=own.get("input_tokens", 0),
        output_tokens=own.get("output_tokens", 0),
        lengths_given=any(own.get(name) for name in LENGTHS),
        compare=_compared(own.get("compare")),
        measured=None if own.get("measured") is None else Path(_text("measured", own["measured"])),
        calibration=None if own.get("calibration") is None else _text("calibration", own["calibration"]),
        date=iso_date(own.get("date")),
        inputs={
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in options.items()
            if value is not None and key != "date"
        },
    )


def with_lengths(question: Question, context_tokens: int) -> Question:
    """The question with prompt and answer lengths: as stated, else the context with an answer of an eighth of it.

    Raises:
        InputError: prompt and answer are longer than the context.

    """
    prompt, answer = question.input_tokens, question.output_tokens
    if not answer:
        room = context_tokens - prompt
        answer = max(1, min(DEFAULT_OUTPUT_TOKENS, context_tokens // DEFAULT_OUTPUT_SHARE, room))
    if not prompt:
        prompt = max(1, context_tokens - answer)
    if prompt + answer > max(context_tokens, 2):
        raise InputError(
            f"a prompt of {prompt:,} and an answer of {answer:,} tokens are longer than the context of "
            f"{context_tokens:,}",
            hint="raise --ctx, or leave it out: it follows from --isl and --osl",
        )
    return replace(question, input_tokens=prompt, output_tokens=answer)


def fields_of(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of the sizing request, ``OWN_FIELDS``) by their long names, without those that are None.

    Without a context, prompt and answer are it.

    Raises:
        InputError: a field is unknown, given twice, or no number of tokens; a prompt or an answer stands alone.

    """
    given = _given(options)
    own = {name: given.pop(name) for name in OWN_FIELDS if name in given}
    own |= {name: parse_tokens(own[name], name) for name in LENGTHS if name in own}
    if "context_tokens" not in given and own.keys() & set(LENGTHS):
        missing = [name for name in LENGTHS if name not in own]
        if missing:
            raise InputError(f"a load needs {missing[0]} too", hint="--isl 8k --osl 1k, or add the context: --ctx 9k")
        given["context_tokens"] = sum(own[name] for name in LENGTHS)
    return given, own


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    known = (*(name for name in FIELDS if name != "id"), *OWN_FIELDS)
    given: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, value in options.items():
        plain = str(key).replace("-", "_")
        name = plain if plain in known else OPTION_NAMES.get(plain, plain)
        if name not in known:
            close = closest(plain, (*known, *OPTION_NAMES))
            raise InputError(f"unknown report field {shorten(str(key), 60)!r}",
                             hint=f"closest: {', '.join(close)}" if close else None)  # fmt: skip
        if value is None:
            continue
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if name in given:
            raise InputError(f"{written[name]} and {plain} mean the same, and both are given", hint="leave out one")
        given[name], written[name] = value, plain
    return given


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} must be text, not {shorten(repr(value), 40)}")
    return value


def _name(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"name must be text, not {shorten(repr(value), 40)}")
    return str(value)


def _compared(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise InputError("compare must be a list of KV formats", hint="bf16,fp8,fp8_per_token_head")
    names = tuple(dict.fromkeys(canonical_kv_dtype(word) for word in words if word.strip()))
    if not names or len(names) > MAX_COMPARED:
        raise InputError(f"compare names {len(names)} KV formats", hint=f"name 1 to {MAX_COMPARED}: bf16,fp8")
    if "auto" in names:
        raise InputError("compare takes KV formats, and auto is none", hint="bf16,fp8,fp8_per_token_head")
    return names


def iso_date(value: Any) -> str:
    """An ISO date; today (UTC) without one.

    Raises:
        InputError: not a date.

    """
    if value is None:
        return datetime.datetime.now(datetime.UTC).date().isoformat()
    if isinstance(value, datetime.date):  # what YAML and TOML make of a bare date
        return value.isoformat()[:10]
    try:
        if not isinstance(value, str) or not _DATE.fullmatch(value):
            raise ValueError
        return datetime.date.fromisoformat(value).isoformat()
    except ValueError:
        raise InputError(f"date {shorten(value, 40)!r} is not a date", hint="write 2026-11-24") from None
