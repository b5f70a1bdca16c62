"""Prometheus text of a running vLLM or SGLang to facts; parsed by the Prometheus client library.

Names: vLLM ``v1/metrics/loggers.py`` (``inter_token_latency_seconds``, before 0.11 ``time_per_output_token_seconds``;
``kv_cache_usage_perc``, before 0.10 ``gpu_cache_usage_perc``), SGLang ``metrics_collector.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from kvplan.check.log_lines import SETTINGS, SGLANG
from kvplan.check.server import Fact, ServerReport, settle_sglang
from kvplan.errors import InputError, shorten

ITL = ("inter_token_latency_seconds", "time_per_output_token_seconds")
SETTING_LABELS = {
    "block_size": "observed_block_tokens", "cache_dtype": "kv_cache_dtype", "num_gpu_blocks": "num_blocks",
    "num_gpu_blocks_override": "num_blocks_override", "gpu_memory_utilization": "gpu_memory_utilization",
    "enable_prefix_caching": "enable_prefix_caching", "kv_cache_size_tokens": "capacity_tokens",
    "kv_cache_memory_bytes": "kv_cache_given_bytes", "page_size": "observed_block_tokens", "num_pages": "num_blocks",
}  # fmt: skip
"""Labels of ``cache_config_info`` and the facts they are."""

GAUGES = {
    "max_total_num_tokens": "capacity_tokens", "page_size": "observed_block_tokens", "num_pages": "num_blocks",
    "context_len": "max_model_len_tokens", "num_requests_running": "running_requests",
    "num_running_reqs": "running_requests", "num_requests_waiting": "waiting_requests",
    "num_queue_reqs": "waiting_requests", "kv_cache_usage_perc": "kv_usage", "gpu_cache_usage_perc": "kv_usage",
    "token_usage": "kv_usage",
}  # fmt: skip
_SUMMED = ("running_requests", "waiting_requests")
_SMALLEST = ("num_blocks", "capacity_tokens")
"""Facts that every data-parallel engine has one of; the smallest counts."""

MAX_LINE_CHARS = 2**14
"""Longest line that is parsed: the time the client library takes grows with the square of it."""

_HISTOGRAMS = (*ITL, "request_prompt_tokens", "request_generation_tokens", "prompt_tokens_histogram",
               "generation_tokens_histogram")  # fmt: skip
_COUNTED = frozenset(
    ["generation_tokens_total", "iteration_tokens_total_count"]
    + [f"{name}_{part}" for name in _HISTOGRAMS for part in ("sum", "count")]
)


@dataclass(frozen=True)
class Scrape:
    """One reading of ``/metrics``: gauges and labels as facts, counters and histograms by name."""

    engine: str
    facts: Mapping[str, Fact]
    counters: Mapping[str, float]
    model: str | None


def read_scrape(text: str, source: str) -> Scrape:
    """A scrape of vLLM or SGLang.

    Raises:
        InputError: not Prometheus text, or of another program.

    """
    from prometheus_client.parser import text_string_to_metric_families

    facts: dict[str, Fact] = {}
    counters: dict[str, float] = {}
    engine = model = None
    if any(len(line) > MAX_LINE_CHARS for line in text.split("\n")):
        raise InputError(f"{source}: a line of more than {MAX_LINE_CHARS:,} characters, not metrics")
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                prefix, _, name = sample.name.partition(":")
                if prefix not in ("vllm", "sglang") or not isfinite(sample.value):
                    continue
                engine = prefix
                model = model or sample.labels.get("model_name")
                _sample(name, sample.labels, sample.value, f"{sample.name}", facts, counters)
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(f"{source}: not Prometheus text: {shorten(str(error), 100)}",
                         hint="point --url at the server itself, not at a dashboard") from error  # fmt: skip
    if engine is None:
        raise InputError(f"{source}: no vllm: or sglang: metric in it",
                         hint="SGLang exposes metrics with --enable-metrics; TensorRT-LLM: use --log")  # fmt: skip
    return Scrape(engine, facts, counters, model)


def _sample(name: str, labels: Mapping[str, str], value: float, where: str, facts: dict[str, Fact],
            counters: dict[str, float]) -> None:  # fmt: skip
    if name == "cache_config_info":
        for label, fact in SETTING_LABELS.items():
            found, known = _label(fact, labels.get(label), f"{where} {label}"), facts.get(fact)
            if found is not None and (known is None or fact not in _SMALLEST or found.number < known.number):
                facts[fact] = found
    elif name in GAUGES:
        fact = GAUGES[name]
        known = facts.get(fact)
        if known is not None and fact in _SUMMED:
            value += known.number
        elif known is not None and fact in _SMALLEST:
            value = min(value, known.number)
        facts[fact] = Fact(value if fact == "kv_usage" else int(value), where)
        counters[f"{fact}_engines"] = counters.get(f"{fact}_engines", 0) + 1
    elif name in _COUNTED:
        counters[name] = counters.get(name, 0.0) + value


def _label(name: str, text: str | None, where: str) -> Fact | None:
    if text is None or text in ("None", "null", ""):
        return None
    if name == "kv_cache_dtype":
        return Fact(text.removeprefix("torch."), where)
    if name == "enable_prefix_caching":
        return Fact(text == "True", where)
    try:
        return Fact(float(text) if name == "gpu_memory_utilization" else int(float(text)), where)
    except (ValueError, OverflowError):
        return None


def report_of(source: str, last: Scrape, first: Scrape | None, models: Iterable[Mapping[str, Any]],
              about: Mapping[str, Any]) -> ServerReport:  # fmt: skip
    """Facts of a running server.

    Args:
        source: its URL.
        last: the latest scrape.
        first: an earlier scrape; latency and load are then those of the time between, else since the start.
        models: the entries of ``/v1/models``.
        about: what vLLM says at ``/version``, SGLang at ``/server_info``: its version, SGLang's settings too.

    """
    facts = dict(last.facts)
    settings = {"version": "engine_version", **(SETTINGS[SGLANG] if last.engine == SGLANG else {})}
    for setting, fact in settings.items():
        stated = about.get(setting)
        if isinstance(stated, str | int | float) and stated != "":
            facts[fact] = Fact(stated, f"server info {setting}")
    if last.engine == SGLANG:
        settle_sglang(facts)
    for entry in models:
        name = entry.get("root") or entry.get("id")
        if isinstance(name, str) and "model" not in facts:
            facts["model"] = Fact(name, "/v1/models")
        length = entry.get("max_model_len")
        if isinstance(length, int) and length > 0:
            facts["max_model_len_tokens"] = Fact(length, "/v1/models max_model_len")
    if "model" not in facts and last.model is not None:
        facts["model"] = Fact(last.model, "label model_name")
    _load(facts, last.counters, first.counters if first is not None else {}, first is not None)
    return ServerReport(source, last.engine, facts)


def _load(facts: dict[str, Fact], last: Mapping[str, float], first: Mapping[str, float], between: bool) -> None:
    """Mean latency, batch of one data-parallel engine, prompt and answer from histograms and counters."""
    grown = {name: value - first.get(name, 0.0) for name, value in last.items()}
    when = "between two scrapes" if between else "since the server started"

    def mean(name: str) -> float | None:
        count = grown.get(f"{name}_count", 0.0)
        return grown.get(f"{name}_sum", 0.0) / count if count > 0 else None

    for name in ITL:
        latency = mean(name)
        if latency is not None and latency > 0:
            count = grown[f"{name}_count"]
            facts["itl_s"] = Fact(latency, f"{name} mean of {count:,.0f} tokens {when}")
            break
    for fact, names in (("input_tokens", ("request_prompt_tokens", "prompt_tokens_histogram")),
                        ("output_tokens", ("request_generation_tokens", "generation_tokens_histogram"))):  # fmt: skip
        length = next((value for value in map(mean, names) if value), None)
        if length is not None:
            facts[fact] = Fact(length, f"mean {when}")
    steps, tokens = grown.get("iteration_tokens_total_count", 0.0), grown.get("generation_tokens_total", 0.0)
    if steps > 0 and tokens > 0:
        facts["batch_size"] = Fact(tokens / steps, f"generation_tokens_total / engine steps {when}")
    elif facts.get("running_requests") is not None and facts["running_requests"].number > 0:
        each = facts["running_requests"].number / last["running_requests_engines"]
        facts["batch_size"] = Fact(each, "requests running now, an engine")
