"""Scenario files: deployments in YAML or TOML, so that a plan can be kept beside the server it describes.

::

    gpu: h200                # fields beside `deployments` apply to each of them
    context_tokens: 32k
    deployments:
      - {name: chat, model: 70b, tp_size: 4, kv_cache_dtype: fp8}
      - {name: code, model: qwen3-32b, tp_size: 2}

One deployment needs no list: its fields stand alone. Field names are those of a sizing request; what a field may hold
is for whoever plans it.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplan.errors import InputError, reason, shorten

MAX_FILE_BYTES = 2**20
MAX_DEPLOYMENTS = 1000
SUFFIXES = (".yaml", ".yml", ".toml", ".json")
TEXTS = ("name", "model", "engine_version")
"""Fields that are text however their value looks: YAML 1.1 reads ``name: no`` as false and ``engine_version: 0.30`` as
0.3."""
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Deployment:
    """One deployment of a scenario: its name (the model's, when it has none) and its fields."""

    name: str
    options: Mapping[str, Scalar]


def read_scenario(path: Path) -> tuple[Deployment, ...]:
    """The deployments of a scenario file, in order; at least one.

    Raises:
        InputError: the file cannot be read, is not YAML or TOML, or does not hold deployments.

    """
    data = _parsed(path)
    shared = {key: value for key, value in data.items() if key != "deployments"}
    listed = data.get("deployments", [{}])
    if not isinstance(listed, list) or not listed or len(listed) > MAX_DEPLOYMENTS:
        raise InputError(
            f"{path}: deployments must be a list of 1 to {MAX_DEPLOYMENTS:,} entries",
            hint="or leave `deployments` out and write the fields of one",
        )
    found = tuple(_deployment(path, number, shared, entry) for number, entry in enumerate(listed, 1))
    names = [deployment.name for deployment in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: two deployments are called {shorten(twice, 40)!r}", hint="give each its own `name`")
    return found


def one_deployment(path: Path) -> Deployment:
    """The only deployment of a scenario file.

    Raises:
        InputError: the file cannot be read, or holds several.

    """
    found = read_scenario(path)
    if len(found) > 1:
        raise InputError(f"{path}: {len(found)} deployments where one is meant", hint="write a file with that one")
    return found[0]


def _deployment(path: Path, number: int, shared: Mapping[str, Any], entry: Any) -> Deployment:
    if not isinstance(entry, dict):
        raise InputError(f"{path}: deployment {number} is not a set of fields", hint="write - {model: 70b, gpu: h200}")
    options = {key: _plain(value) for key, value in {**shared, **entry}.items()}
    for key, value in options.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float | bool | None):
            raise InputError(f"{path}: {shorten(key, 40)} of deployment {number} must be text, a number, true or false")
    name = options.pop("name", None)
    if isinstance(name, bool):
        raise InputError(f"{path}: name of deployment {number} must be text, not {str(name).lower()}")
    fallback = options.get("model") or f"deployment {number}"
    return Deployment(str(fallback if name is None else name), options)


def _plain(value: Any) -> Any:
    """A list of words and a bare date as the command line writes them, ``bf16,fp8``; anything else as it is."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    words = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return ",".join(value) if words else value


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, not a scenario")
        text = raw.decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text", hint="a scenario is a YAML or TOML file") from error
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: a scenario is a .yaml or .toml file", hint="its suffix says how to read it")
    data = _toml(path, text) if suffix == ".toml" else _yaml(path, text)
    if not isinstance(data, dict) or not data:
        raise InputError(f"{path}: no fields in it", hint="write model: 70b and gpu: h200, or a list of deployments")
    return data


def _toml(path: Path, text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {shorten(str(error), 120)}") from error


def _yaml(path: Path, text: str) -> Any:
    """YAML, and JSON as a part of it; plain values only, nothing is executed."""
    import yaml

    nothing, as_written = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "str"))

    class Loader(yaml.SafeLoader):
        """Refuses a key given twice, and leaves ``TEXTS`` and numbers to the base of 60 (``8:30``) as written.

        What merges (``<<``) nest never holds a key more than once either.
        """

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            counts = Counter(str(key.value) for key, _ in node.value)
            twice = next((key for key, count in counts.items() if count > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
            super().flatten_mapping(node)
            node.value = list({str(key.value): (key, value) for key, value in node.value}.values())
            for key, value in node.value:
                if (
                    isinstance(value, yaml.ScalarNode)
                    and value.tag != nothing
                    and (key.value in TEXTS or ":" in value.value)
                ):
                    value.tag = as_written

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        deep = "nested too deeply" if isinstance(error, RecursionError) else "a value that cannot be read"
        problem = getattr(error, "problem", None) or deep
        raise InputError(f"{path}: not YAML{where}: {shorten(str(problem), 120)}") from error
