"""A latency request: what to serve, on what, and either one decode step or a closed loop of clients."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kvplan.errors import InputError, UnknownNameError, shorten
from kvplan.memory.request import FIELDS as SIZE_FIELDS
from kvplan.memory.request import SizeRequest, case_id, make_request, unknown_field
from kvplan.model_config import resolve_model
from kvplan.model_config.types import ModelConfig
from kvplan.units import parse_tokens

MAX_CONTEXT_TOKENS = 2**30
MAX_REQUESTS = 2**24

POINT_FIELDS = ("context_tokens", "batch_size", "input_tokens", "output_tokens", "concurrency", "length_spread", "id")
"""Fields that vary from case to case of one deployment; every other field names the deployment."""

_SHAPE_FIELDS = ("num_layers", "num_kv_heads", "head_dim", "num_parameters", "window_tokens")
_OWN_COUNTS = ("attention_dp_size", "moe_tp_size", "moe_ep_size")
CALIBRATION = "calibration"
_STORED_AS = {
    "nvfp4": "nvfp4",
    "fp4": "nvfp4",
    "mxfp4": "mxfp4",
    "fp8": "fp8",
    "awq": "int4",
    "gptq": "int4",
    "int4": "int4",
    "bf16": "bf16",
}


@dataclass(frozen=True, slots=True)
class ItlRequest:
    """One deployment: the sizing request without its point, and how attention and experts are split.

    Attributes:
        size: model, GPU, engine, ranks, KV format; ``kv_cache_dtype`` as resolved.
        kv_dtype_given: whether the KV format was stated; else it is assumed from engine and weights.
        attention_dp_size, moe_tp_size, moe_ep_size: as engines and benchmark tables state them; None is not stated.
        calibration: an attention calibration file to use instead of the one this GPU and engine have.

    """

    size: SizeRequest
    kv_dtype_given: bool
    attention_dp_size: int | None = None
    moe_tp_size: int | None = None
    moe_ep_size: int | None = None
    calibration: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Flat, as it is asked, less the point and the fields of a model from flags."""
        left_out = (*POINT_FIELDS, *_SHAPE_FIELDS)
        found = {key: value for key, value in asdict(self.size).items() if key not in left_out}
        return found | {name: getattr(self, name) for name in (*_OWN_COUNTS, CALIBRATION)}


ALL_FIELDS = tuple(
    dict.fromkeys((*(f for f in SIZE_FIELDS if f not in _SHAPE_FIELDS), *_OWN_COUNTS, CALIBRATION, *POINT_FIELDS))
)


def make_itl_request(options: Mapping[str, Any]) -> ItlRequest:
    """The deployment part of a request from plain values, each checked.

    Raises:
        InputError: an unknown or impossible field, or no model or GPU; the message names it.

    """
    own: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in options.items():
        if name not in ALL_FIELDS:
            raise unknown_field(str(name), ALL_FIELDS)
        if name in _OWN_COUNTS:
            own[name] = _count_or_unstated(name, value)
        elif name == CALIBRATION:
            own[name] = _path(value)
        elif value is not None and name not in POINT_FIELDS:
            rest[name] = value
    size = make_request(rest)
    if size.model is None:
        raise InputError("no model given", hint="--model takes a name (70b), a hub id, a folder or a config.json")
    if size.gpu is None:
        raise InputError("no GPU named, and latency depends on it", hint="add --gpu h200; `kvplan gpus` lists them")
    return ItlRequest(size, "kv_cache_dtype" in rest, **own)


def _count_or_unstated(name: str, value: Any) -> int | None:
    """A count from 1 to 4,096; 0 and None mean that it was not stated, as benchmark tables write it."""
    if value is None or value == 0:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
        raise InputError(f"{name} must be between 1 and 4,096, not {shorten(value, 40)}")
    return value


def _path(value: Any) -> str | None:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise InputError(f"{CALIBRATION} must be the path of a file, not {shorten(repr(value), 40)}")
    return value


class Point(NamedTuple):
    """One decode step (``context_tokens``, ``batch_size``) or one load (the other three); counts over all ranks.

    ``length_spread`` is how far below nominal lengths are drawn (0.2: 0.8–1.0×), 0 exact, None not stated.
    """

    context_tokens: int | None = None
    batch_size: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    concurrency: int | None = None
    length_spread: float | None = None
    id: str | int | None = None

    @property
    def is_load(self) -> bool:
        """Whether a closed loop is asked about rather than one step."""
        return self.input_tokens is not None

    @property
    def longest_tokens(self) -> int:
        """Tokens of a request at its longest."""
        return (self.input_tokens or 0) + (self.output_tokens or 0) or self.context_tokens or 0


POINT_NAMES = Point._fields
_LOAD_FIELDS = frozenset(("input_tokens", "output_tokens", "concurrency", "length_spread"))


def make_point(options: Mapping[str, Any]) -> Point:
    """The point of a request.

    Raises:
        InputError: a field is impossible, neither or both of a step and a load are described, or requests are longer
            than the server takes.

    """
    point = _point(options)
    check_length(options, point.longest_tokens)
    return point


def check_length(options: Mapping[str, Any], tokens: int) -> None:
    """Refuse requests of so many ``tokens`` where ``options`` say that the server takes none as long.

    Raises:
        InputError: they are longer than ``max_model_len_tokens``.

    """
    limit = options.get("max_model_len_tokens")
    if limit is not None and tokens > (most := parse_tokens(limit, "max_model_len_tokens")):
        raise InputError(f"requests of {tokens:,} tokens are longer than --max-model-len {most:,}",
                         hint="raise --max-model-len, or leave it out")  # fmt: skip


def _point(options: Mapping[str, Any]) -> Point:
    get = options.get
    context, batch = get("context_tokens"), get("batch_size")
    if type(context) is int and type(batch) is int and not _LOAD_FIELDS & options.keys():
        return Point(_context("context_tokens", context), _requests("batch_size", batch), id=case_id(get("id")))
    load = {name: get(name) for name in ("input_tokens", "output_tokens", "concurrency")}
    given = [name for name, value in load.items() if value is not None]
    spread = _spread(get("length_spread"))
    if given:
        if get("context_tokens") is not None:
            raise InputError(
                "context_tokens and a load are both given",
                hint="give context_tokens and batch_size, or input_tokens, output_tokens, concurrency",
            )
        if load["concurrency"] is None:
            load["concurrency"] = get("batch_size")
        elif get("batch_size") is not None and get("batch_size") != load["concurrency"]:
            raise InputError("batch_size and concurrency are both given, and differ", hint="leave out batch_size")
        missing = [name for name, value in load.items() if value is None]
        if missing:
            raise InputError(
                f"a load needs {', '.join(missing)} too", hint="give input_tokens, output_tokens, concurrency"
            )
        outputs = _context("output_tokens", load["output_tokens"])
        if outputs == 1:
            raise InputError(
                "output_tokens 1 has no TPOT: it is the mean time of the tokens after the first",
                hint="give 2 or more output tokens",
            )
        return Point(
            input_tokens=_context("input_tokens", load["input_tokens"]),
            output_tokens=outputs,
            concurrency=_requests("concurrency", load["concurrency"]),
            length_spread=spread,
            id=case_id(get("id")),
        )
    if get("context_tokens") is None:
        raise InputError(
            "no context given",
            hint="give context_tokens and batch_size (--ctx 32k --batch 16), or a load "
            "(--isl 8k --osl 1k --concurrency 64)",
        )
    batch = get("batch_size")
    return Point(
        context_tokens=_context("context_tokens", get("context_tokens")),
        batch_size=1 if batch is None else _requests("batch_size", batch),
        length_spread=spread,
        id=case_id(get("id")),
    )


def _context(name: str, value: Any) -> int:
    if type(value) is int and 1 <= value <= MAX_CONTEXT_TOKENS:
        return value
    tokens = parse_tokens(value, name)
    if tokens > MAX_CONTEXT_TOKENS:
        raise InputError(f"{name} {tokens:,} is beyond any server", hint=f"at most {MAX_CONTEXT_TOKENS:,} tokens")
    return tokens


def _requests(name: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_REQUESTS:
        raise InputError(f"{name} must be a whole number between 1 and {MAX_REQUESTS:,}, not {shorten(value, 40)}")
    return value


def _spread(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(
            f"length_spread must be from 0 up to 1, not {shorten(value, 40)}",
            hint="0 is exact lengths, 0.2 draws them from 0.8 to 1.0 of nominal",
        )
    return float(value)


def resolve_model_or_sibling(reference: str) -> tuple[ModelConfig, str | None, str | None]:
    """(model, weight dtype its name tells, note).

    A hub id whose config is nowhere to be found is taken as the bundled model of the same name with the precision that
    the name ends in: ``nvidia/Qwen3-32B-NVFP4`` is Qwen3-32B stored as nvfp4, and the note says so.

    Raises:
        KvplanError: nothing of that name, and no such sibling.

    """
    try:
        return resolve_model(reference), None, None
    except InputError as error:
        if "/" not in reference:
            raise
        words = reference.split("/")[-1].lower().split("-")
        stored = _STORED_AS.get(words[-1])
        base = words[:-1] if stored is not None else words
        for name in ("-".join(base), "-".join(word for word in base if word not in ("instruct", "chat", "it"))):
            try:
                model = resolve_model(name)
            except UnknownNameError:
                continue
            what = f"{model.name}, weights {stored}" if stored else model.name
            return model, stored, f"no config for {reference}: taken as {what}, by its name"
        raise error
