"""What a server said of itself, each value with where it said so and how far its printing rounded it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvplan.errors import shorten

Value = int | float | str | bool
MAX_WHERE_CHARS = 160


@dataclass(frozen=True, slots=True)
class Fact:
    """One reported value, in SI base units.

    Attributes:
        value: bytes and tokens as int, seconds and shares as float, names as text, of which only what is printable.
        where: the line or metric it was read from.
        error: half a unit of the last printed digit, in the value's unit; 0 for exact values.

    """

    value: Value
    where: str
    error: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.value, str) and not self.value.isprintable():  # it goes to terminals
            object.__setattr__(self, "value", shorten(self.value, len(self.value)))

    @property
    def number(self) -> float:
        """The value as a number; NaN for text."""
        return float("nan") if isinstance(self.value, str) else float(self.value)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"value": self.value, "error": self.error, "where": self.where}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened while the server started: ``code`` for programs, ``message`` in its own words."""

    code: str
    message: str
    where: str
    is_failure: bool = False


@dataclass(frozen=True)
class ServerReport:
    """Everything read from one log or one server.

    Attributes:
        source: the file or URL.
        engine: ``vllm``, ``sglang`` or ``tensorrt-llm``.
        facts: name → fact. Names of settings are those of a sizing request; measured terms are ``weights_bytes``,
            ``kv_cache_bytes``, ``activation_bytes``, ``graph_bytes``, ``overhead_bytes``, ``total_bytes``,
            ``usable_bytes``, ``free_bytes``, ``num_blocks``, ``capacity_tokens``, ``max_concurrency`` …
        events: failures and remarks, in order.

    """

    source: str
    engine: str
    facts: Mapping[str, Fact]
    events: tuple[Event, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    def value(self, name: str) -> Value | None:
        """The value of a fact, or None when it was not reported."""
        fact = self.facts.get(name)
        return None if fact is None else fact.value

    def number(self, name: str) -> float | None:
        """A numeric fact, or None."""
        fact = self.facts.get(name)
        return None if fact is None or isinstance(fact.value, str) else fact.number

    @property
    def failures(self) -> tuple[Event, ...]:
        """What kept the server from starting, in order."""
        return tuple(event for event in self.events if event.is_failure)


def quote(text: str) -> str:
    """A line from outside, as it may be shown: printable, and not too long."""
    return shorten(" ".join(text.split()), MAX_WHERE_CHARS)


def settle_sglang(facts: dict[str, Fact]) -> None:
    """Settings of SGLang in the terms of a sizing request, in place.

    Its ``tp_size`` counts every rank, and with data-parallel attention so does ``max_running_requests``
    (``layers/dp_attention.py`` ``compute_dp_attention_world_info``); a request counts those of one replica. The ranks
    of that attention are ``attn_dp_size``, before 0.5.22 ``dp_size`` with ``enable_dp_attention``. With contexts split
    among ranks, a pool prints the tokens of one rank.
    """
    names = ("prefix_caching_off", "attention_dp", "attention_dp_size", "ep_size")
    off, attention_dp, width, ep_size = (facts.pop(name, None) for name in names)
    if off is not None:
        facts["enable_prefix_caching"] = Fact(not off.value, off.where)
    replicas = facts.get("dp_size")
    if attention_dp is not None and attention_dp.value and (width is None or width.number <= 1):
        width = replicas
    if width is not None and width.number > 1:
        for name in ("tp_size", "max_num_seqs"):
            if (whole := facts.get(name)) is not None:
                each = max(int(whole.number / width.number), 1)
                facts[name] = Fact(each, f"{whole.where}, over {width.value} ranks of attention")
        facts["dp_size"], facts["ep"] = width, Fact(True, width.where)
    elif ep_size is not None and ep_size.number > 1 and (replicas is None or replicas.number <= 1):
        facts["ep"] = Fact(True, ep_size.where)
    split, capacity = facts.get("dcp_size"), facts.get("capacity_tokens")
    if split is not None and split.number > 1 and capacity is not None and "#tokens" in capacity.where:
        each = int(capacity.number * split.number)
        facts["capacity_tokens"] = Fact(each, f"{capacity.where}, on each of {split.value} ranks")
