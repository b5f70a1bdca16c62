"""``--cases``: a JSONL of requests in, a JSONL of results out, one line each and in order."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvplan.errors import InputError, KvplanError, reason, shorten

MAX_LINE_CHARS = 1_000_000


def run_size_cases(path: Path) -> None:
    """Size every request of ``path`` (``-`` is stdin); a case that fails yields an ``error`` object in its place."""
    from kvplan.memory.request import make_request
    from kvplan.search import size

    def answer(options: dict[str, Any]) -> str:
        return size(make_request(options), compare=False).to_json()

    run_cases(path, answer)


def run_cases(path: Path, answer: Callable[[dict[str, Any]], str]) -> None:
    """Write ``answer(request)`` for each line of ``path``.

    Raises:
        InputError: the file cannot be read.

    """
    total = failed = 0
    for case in read_cases(path):
        total += 1
        try:
            if isinstance(case, KvplanError):
                raise case
            sys.stdout.write(answer(case) + "\n")
        except KvplanError as error:
            failed += 1
            sys.stdout.write(json.dumps(failure(case, error)) + "\n")
    report_failed(failed, total)


def failure(case: object, error: KvplanError) -> dict[str, Any]:
    """What stands in the place of a case that fails: its error, under the case's own ``id``."""
    from kvplan.memory.request import case_id

    named = None
    if isinstance(case, dict):
        with contextlib.suppress(InputError):
            named = case_id(case.get("id"))
    return {"error": error.as_dict()} if named is None else {"id": named, "error": error.as_dict()}


def report_failed(failed: int, total: int) -> None:
    """One line on stderr when cases failed; each has its error in its place, so the exit code stays 0."""
    if failed:
        print(f"{failed:,} of {total:,} {'case' if total == 1 else 'cases'} failed", file=sys.stderr)


def read_cases(path: Path) -> Iterator[dict[str, Any] | KvplanError]:
    """The request on each line of ``path``, or what is wrong with the line; empty lines are skipped.

    Raises:
        InputError: the file cannot be read.

    """
    for line in _lines(path):
        if not line.strip():
            continue
        try:
            yield _request(line)
        except KvplanError as error:
            yield error


def _lines(path: Path) -> Iterator[str]:
    if str(path) == "-":
        yield from sys.stdin
        return
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of ``pairs``, of which no key may be given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{shorten(twice, 60)} is given twice", hint="each field once")
    return found


def _request(line: str) -> dict[str, Any]:
    if len(line) > MAX_LINE_CHARS:
        raise InputError("a case longer than a million characters")
    try:
        data = json.loads(line, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise InputError("not JSON", hint="one JSON object a line") from error
    if not isinstance(data, dict):
        raise InputError("not a JSON object", hint="one JSON object a line")
    return data
