"""Start-up logs to facts: any size in constant memory, several ranks, several starts, damaged lines and all."""

from __future__ import annotations

import gzip
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from kvplan.check.log_lines import (
    ARGUMENT,
    ARGUMENT_LINES,
    LINES,
    NEEDLES,
    NEW_START,
    READY,
    REQUESTS,
    SETTINGS,
    SGLANG,
    TRTLLM,
    VLLM,
)
from kvplan.check.server import Event, Fact, ServerReport, Value, quote, settle_sglang
from kvplan.errors import InputError
from kvplan.units import GIB

OUT_OF_MEMORY = "out of memory"
GZIP = b"\x1f\x8b"
CHUNK_BYTES = 2**21
MAX_LINE_BYTES = 2**17
MAX_OPEN_BYTES = 2**28
MAX_WORDING_CHARS = 2048
"""How far into a line its wording is looked for: patterns with several gaps take the cube of it at worst."""
MAX_EVENTS = 100

_PREFIX = re.compile(r"^(?:.*?\.(?:py|cpp):\d+\] |(?:\[[^\]]*\] ?)+)")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SMALLEST = ("kv_cache_bytes", "kv_cache_in_use_bytes", "conv_state_bytes", "ssm_state_bytes", "full_pool_tokens",
             "key_bytes", "value_bytes", "num_blocks", "capacity_tokens",
             "max_concurrency", "free_bytes", "free_for_kv_bytes", "max_context_tokens")  # fmt: skip
_LARGEST = ("weights_bytes", "weights_and_overhead_bytes", "activation_bytes", "overhead_bytes", "graph_bytes",
            "graph_estimate_bytes", "needed_kv_bytes")  # fmt: skip
_SETTING_RATIOS = ("gpu_memory_utilization", "swa_full_tokens_ratio", "mamba_full_memory_ratio")
_FRACTIONS = (*_SETTING_RATIOS, "max_concurrency", "hybrid_padding_percent")
_SWITCHES = ("enable_prefix_caching", "prefix_caching_off", "attention_dp", "ep")
_TEXTS = ("model", "kv_cache_dtype", "quantization", "dtype", "speculative", "engine_version", "gpu")


class Readable(Protocol):
    """What a log is read from."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102


def read_log(path: Path) -> ServerReport:
    """What the server whose log ``path`` is (``-`` is stdin, gzip is unpacked) reported when it last started.

    Raises:
        InputError: the file cannot be read, or holds no line that is understood; the message says what was looked for.

    """
    if str(path) == "-":
        return read_stream(sys.stdin.buffer, "stdin")
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
            file.seek(0)
            return read_stream(gzip.open(file) if packed else file, str(path))
    except (OSError, EOFError, zlib.error) as error:
        what = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{path}: cannot be read ({what})") from error


def read_stream(stream: Readable, source: str) -> ServerReport:
    """``read_log`` of an open file.

    Raises:
        InputError: no line in it is understood, or none ends in 256 MiB.

    """
    reader = _Reader()
    number, rest, open_bytes = 1, b"", 0
    while chunk := stream.read(CHUNK_BYTES):
        open_bytes += len(chunk)
        chunk = rest + chunk
        end = chunk.rfind(b"\n") + 1
        open_bytes = 0 if end else open_bytes
        if open_bytes > MAX_OPEN_BYTES:
            raise InputError(f"{source}: no line ends in {MAX_OPEN_BYTES >> 20} MiB, so it is no log")
        if not end and len(chunk) < MAX_LINE_BYTES:
            rest = chunk
            continue
        end = end or len(chunk)
        reader.lines(chunk[:end], number)
        number += chunk.count(b"\n", 0, end)
        rest = chunk[end:][-MAX_LINE_BYTES:]
    reader.lines(rest, number)
    return reader.report(source)


def _candidates(chunk: bytes, number: int, needles: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """(line number, text) of the lines that hold a needle; all others are never decoded."""
    starts: set[int] = set()
    for needle in needles:
        at = chunk.find(needle)
        while at >= 0:
            starts.add(chunk.rfind(b"\n", 0, at) + 1)
            after = chunk.find(b"\n", at)
            at = chunk.find(needle, after) if after >= 0 else -1
    counted = 0
    for start in sorted(starts):
        number += chunk.count(b"\n", counted, start)
        counted = start
        end = chunk.find(b"\n", start)
        raw = chunk[start : end if end >= 0 else len(chunk)][:MAX_LINE_BYTES]
        yield number, _ANSI.sub("", raw.decode("utf-8", errors="replace")).rstrip()


class _Reader:
    """Facts as lines bring them; over ranks the engine uses the smallest budget and needs the largest term."""

    def __init__(self) -> None:
        self.facts: dict[str, Fact] = {}
        self.events: list[Event] = []
        self.engines: Counter[str] = Counter()
        self.serving = False
        self.largest_kv: float = 0.0
        self.starts = 1

    def lines(self, chunk: bytes, number: int) -> None:
        """Whole lines, the first of which has this number; while a server serves, only few are looked for."""
        quiet = self.serving and not any(words.encode() in chunk for words in NEW_START)
        for at, text in _candidates(chunk, number, (OUT_OF_MEMORY.encode(),) if quiet else NEEDLES):
            for part in text.split("\r"):  # what a progress bar wrote over
                self.line(at, part)

    def line(self, number: int, text: str) -> None:
        if any(words in text for words in REQUESTS):
            return
        if any(words in text for words in NEW_START):
            self._start()
        self.serving = self.serving or any(words in text for words in READY)
        if self.serving and OUT_OF_MEMORY not in text:
            return  # lines without a prefix may be of requests too
        for words, engine in ARGUMENT_LINES.items():
            if words in text:
                self.engines[engine] += 1
                self._settings(text, engine, f"line {number:,}")
        for line in LINES:
            match = line.pattern.search(text, 0, MAX_WORDING_CHARS)
            if match is None or (self.serving and line.event != "out_of_memory"):
                continue
            if line.engine is not None:
                self.engines[line.engine] += 1
            where = f"line {number:,}: {quote(match[0])}"
            for name, printed in match.groupdict().items():
                if printed is not None:
                    self._add(name, printed, where, line.engine)
            if line.event is not None and len(self.events) < MAX_EVENTS:
                self._event(Event(line.event, quote(_message(text)), f"line {number:,}", line.is_failure))

    def _start(self) -> None:
        """The server starts: what it reported of an earlier start no longer holds."""
        if "capacity_tokens" in self.facts or "kv_cache_bytes" in self.facts or self.events:
            self.starts += 1
            self.facts, self.events, self.largest_kv = {}, [], 0.0
        self.serving = False

    def _event(self, event: Event) -> None:
        """Ranks and tracebacks repeat a line; it is kept once."""
        if all(known.code != event.code for known in self.events):
            self.events.append(event)

    def _settings(self, text: str, engine: str, line: str) -> None:
        names = SETTINGS[engine]
        for match in ARGUMENT.finditer(text):
            setting, printed = match["bare"] or match["quoted"], match["value"].strip("'\"")
            name, where = names.get(setting), f"{line}: {setting}={quote(printed)}"
            if name is None or printed in ("None", "null", "") or printed.endswith("("):
                continue
            if name in _SWITCHES:
                if printed in ("True", "False"):
                    self.facts[name] = Fact(printed == "True", where)
            elif name == "kv_cache_memory_bytes":
                self._add("kv_cache_given_bytes", printed, where)
            elif not (name == "model" and name in self.facts and "/" in str(self.facts[name].value)):
                self._add(name, printed, where)

    def _add(self, name: str, printed: str, where: str, engine: str | None = None) -> None:
        fact, known = _fact(name, printed, where), self.facts.get(name)
        if fact is None:
            return
        if name == "kv_cache_bytes" and engine == VLLM:
            self.largest_kv = max(self.largest_kv, fact.number)
        if known is not None and name in _SMALLEST and not self._decides(fact, known, engine):
            return
        if known is not None and name == "kv_cache_dtype" and engine == SGLANG and known.value != "auto":
            return  # a draft model's
        if known is not None and name in _LARGEST and known.number >= fact.number:
            return
        self.facts[name] = fact

    def _decides(self, fact: Fact, known: Fact, engine: str | None) -> bool:
        """Whether a later figure of the cache replaces an earlier one.

        vLLM prints one a rank, and the smallest decides; SGLang prints a draft model's cache after the model's own;
        TensorRT-LLM allocates a small one to measure with first.
        """
        return engine == TRTLLM or (engine != SGLANG and fact.number < known.number)

    def report(self, source: str) -> ServerReport:
        facts = self.facts
        if not self.engines or not (facts or self.events):
            raise InputError(
                f"{source}: no start-up line of vLLM, SGLang or TensorRT-LLM in it",
                hint='looked for "Available KV cache memory", "GPU KV cache size", "KV Cache is allocated", '
                '"max tokens in paged KV cache" and the like; give the log from the start of the server',
            )
        engine = self.engines.most_common(1)[0][0]
        _combine(facts)
        if engine == SGLANG:
            settle_sglang(facts)
        notes = []
        if self.starts > 1:
            notes.append(f"the log holds {self.starts} starts; the last one is read")
        kv = facts.get("kv_cache_bytes")
        if kv is not None and self.largest_kv - kv.number > 0.01 * abs(kv.number):
            spread = (self.largest_kv - kv.number) / GIB
            notes.append(f"ranks differ by {spread:.2f} GiB of KV; the smallest decides")
            facts["rank_spread_bytes"] = Fact(int(self.largest_kv - kv.number), kv.where)
        return ServerReport(source, engine, facts, tuple(self.events), tuple(notes))


def _message(text: str) -> str:
    """The line without prefixes of processes, times, levels and files."""
    return _PREFIX.sub("", text, count=1)


def _fact(name: str, printed: str, where: str) -> Fact | None:
    """A printed value in base units; None when it is no number where one is meant."""
    if name == "ep":
        return Fact(True, where)
    if name in _TEXTS:
        return Fact(printed.removeprefix("torch.").removeprefix("v") if name != "model" else printed, where)
    digits = printed.replace(",", "")
    try:
        value = float(digits)
    except ValueError:
        return None
    decimals = len(digits.partition(".")[2])
    last = 0.5 * 10.0**-decimals
    if name in _FRACTIONS:
        return Fact(value, where, 0.0 if name in _SETTING_RATIOS else last)
    whole = "." not in digits and abs(value) > 10**6
    if name.endswith("_bytes") and not whole:
        return Fact(round(value * GIB), where, last * GIB)
    exact: Value = int(value)
    return Fact(exact, where)


def _combine(facts: dict[str, Fact]) -> None:
    """Facts that follow from others: K, V and states, exact bytes where a later line has them, total less rest."""
    keys, values = facts.pop("key_bytes", None), facts.pop("value_bytes", None)
    if keys is not None and values is not None and "kv_cache_bytes" not in facts:
        facts["kv_cache_bytes"] = Fact(int(keys.number + values.number), keys.where, keys.error + values.error)
    tokens = facts.pop("full_pool_tokens", None)
    if tokens is not None:  # the pool of windows is printed before, and has fewer
        facts["capacity_tokens"] = tokens
    states = [fact for name in ("conv_state_bytes", "ssm_state_bytes") if (fact := facts.pop(name, None)) is not None]
    if states and (kv := facts.get("kv_cache_bytes")) is not None:
        whole = int(kv.number + sum(fact.number for fact in states))
        facts["kv_cache_bytes"] = Fact(whole, f"{kv.where}, and states", kv.error + sum(fact.error for fact in states))
    exact, rounded = facts.pop("kv_cache_in_use_bytes", None), facts.get("kv_cache_bytes")
    if exact is not None and (
        rounded is None or (exact.error < rounded.error and abs(exact.number - rounded.number) <= rounded.error + 1)
    ):
        facts["kv_cache_bytes"] = exact
    both, weights = facts.pop("weights_and_overhead_bytes", None), facts.get("weights_bytes")
    if both is not None and weights is not None and "overhead_bytes" not in facts:
        rest = both.number - weights.number
        facts["overhead_bytes"] = Fact(int(rest), both.where, both.error + weights.error)
