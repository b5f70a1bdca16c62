"""The public functions: typed, and what the command line itself calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvplan.errors import KvplanError
from kvplan.memory.plan import SizePlan
from kvplan.memory.request import make_request
from kvplan.search import size as _size

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Unpack

    from kvplan.check.result import CheckResult
    from kvplan.check.server import ServerReport
    from kvplan.document.fleet import Progress
    from kvplan.document.schema import Fleet, Report
    from kvplan.keywords import ItlKeywords, ReportKeywords, SizeKeywords
    from kvplan.latency.plan import ItlPlan


def size(*, compare: bool = True, **options: Unpack[SizeKeywords]) -> SizePlan:
    """Size the KV cache of a model on given GPUs.

    Args:
        compare: also compare precisions, account for waste, search GPUs and give advice. False is several times faster.
        **options: fields of ``SizeRequest``: ``model``, ``gpu``, ``tp_size``, ``context_tokens`` (an int, or text such
            as ``"32k"``), ``batch_size``, ``kv_cache_dtype``, ``kv_cache_memory_bytes`` …

    Returns:
        The plan; bytes are per GPU unless a name says otherwise.

    Raises:
        KvplanError: with ``code``, ``message``, ``hint`` and ``exit_code``.

    >>> import kvplan
    >>> plan = kvplan.size(model="llama-3.1-8b", gpu="h100", context_tokens="32k", kv_cache_dtype="fp8_per_token_head")
    >>> plan.kv_cache.bytes_per_token, plan.kv_cache.scale_bytes_per_token
    (67584, 2048)

    """
    return _size(make_request(options), compare=compare)


def size_from_log(log: str | Path | ServerReport, *, compare: bool = True, **changes: Unpack[SizeKeywords]) -> SizePlan:
    """Size a server anew, from what it reported in its start-up log and what would be different.

    Args:
        log: the log (``-`` is stdin), or what ``kvplan.check.log.read_log`` made of it.
        compare: as for ``size``.
        **changes: fields of ``SizeRequest`` that differ from the server's (``kv_cache_dtype="fp8"``, ``tp_size=2``,
            ``context_tokens``, another ``model`` or ``gpu`` …), or that it does not report (``gpu``, ``model``).

    Returns:
        The plan; memory terms whose ``source`` is ``reported`` are the server's own, those that a change moves or that
        hold for another model or GPU only are ``planned``.

    Raises:
        KvplanError: nothing is understood, no KV memory is reported, or a change is impossible.

    """
    from pathlib import Path

    from kvplan.check.identity import IDENTITY
    from kvplan.check.log import read_log
    from kvplan.check.what_if import WhatIf

    report = read_log(Path(log)) if isinstance(log, str | Path) else log
    given = {name: value for name, value in changes.items() if value is not None}
    identity = {name: value for name, value in given.items() if name in IDENTITY}
    return WhatIf(report, identity).plan(given, compare=compare)


def itl(**options: Unpack[ItlKeywords]) -> ItlPlan:
    """Predict the latency of one decode step, or of requests under load.

    Args:
        **options: ``model``, ``gpu``, ``tp_size``, ``engine``, ``kv_cache_dtype``, ``weight_dtype`` …, and either
            ``context_tokens`` and ``batch_size``, or ``input_tokens``, ``output_tokens`` and ``concurrency``.

    Returns:
        The plan: ``itl_s = intercept_s + slope_s_per_token × context``, its breakdown, interval and source, and under
        load ``load.tpot_s`` and ``load.ttft_s``. Seconds.

    Raises:
        KvplanError: with ``code``, ``message``, ``hint`` and ``exit_code``.

    >>> import kvplan
    >>> plan = kvplan.itl(model="70b", gpu="h200", tp_size=4, context_tokens="32k", batch_size=32)
    >>> plan.source, abs(plan.itl_s - plan.intercept_s - plan.slope_s_per_token * 32768) < 1e-12
    ('calibrated', True)

    """
    from kvplan.latency.planner import plan_one

    return plan_one(options)


def itl_cases(cases: Iterable[Mapping[str, Any]]) -> list[ItlPlan | KvplanError]:
    """Plan many latency requests in one go, in order: cases of one deployment are worked out together.

    Args:
        cases: mappings with the options of ``itl``.

    Returns:
        For each case its plan, or the error that keeps it from being planned.

    """
    from kvplan.latency.planner import plan_cases

    return plan_cases(cases)


def check_log(path: str | Path, *, tolerance: float = 0.05, **options: Unpack[SizeKeywords]) -> CheckResult:
    """Hold a plan against a server's start-up log.

    Args:
        path: log of vLLM, SGLang or TensorRT-LLM; ``-`` is stdin.
        tolerance: relative difference that memory may have.
        **options: fields of ``SizeRequest`` that were planned; the server's own settings fill in the rest.

    Returns:
        The terms, planned beside observed, and likely causes of drift.

    Raises:
        KvplanError: nothing is understood, or the model is unknown.

    """
    from pathlib import Path

    from kvplan.check.log import read_log
    from kvplan.check.reconcile import reconcile

    return reconcile(read_log(Path(path)), options, tolerance)


def check_url(url: str, *, tolerance: float = 0.05, seconds: float = 0.0, timeout_s: float = 20.0,
              ca_file: str | None = None, token: str | None = None,
              **options: Unpack[SizeKeywords]) -> CheckResult:  # fmt: skip
    """Hold a plan against a running vLLM or SGLang.

    Args:
        url: its address, e.g. ``http://host:8000``.
        tolerance: relative difference that memory and latency may have.
        seconds: time between two readings that latency is then of; 0 reads once, and latency is since the start.
        timeout_s: longest time one HTTP request may take, from start to end.
        ca_file: certificates to trust for https.
        token: sent as a bearer token.
        **options: fields of ``SizeRequest`` that were planned; the server's own settings fill in the rest.

    Raises:
        KvplanError: not reachable (exit 4), or not understood (exit 2).

    """
    from kvplan.check.fetch import Access
    from kvplan.check.live import read_server
    from kvplan.check.reconcile import reconcile

    report = read_server(url, Access(token, ca_file, timeout_s), seconds)
    return reconcile(report, options, tolerance)


def report(**options: Unpack[ReportKeywords]) -> Report:
    """Everything about one deployment: the answer, what FP8 buys, launch commands, waste, what-ifs, sources.

    Args:
        **options: fields of ``SizeRequest`` (``model`` and ``gpu`` at least), ``input_tokens`` and ``output_tokens`` of
            a request under load, ``concurrency`` (users at once), ``compare`` (KV formats), ``calibration`` (a file),
            ``measured`` (a run folder of ``kvplan measure``), ``name`` and ``date`` (``2026-11-24``).

    Returns:
        The document; ``as_html()``, ``as_markdown()`` and ``as_json()`` are its forms.

    Raises:
        KvplanError: with ``code``, ``message``, ``hint`` and ``exit_code``.

    >>> import kvplan
    >>> document = kvplan.report(model="70b", gpu="h200", tp_size=4, context_tokens="32k", concurrency=64,
    ...                          kv_cache_dtype="fp8", date="2026-11-24")
    >>> document.answers.fits, document.answers.max_users
    (True, 73)

    """
    from kvplan.document.build import build

    return build(options)


def fleet(scenario: str | Path, folder: str | Path | None = None, *, formats: Sequence[str] = ("html",),
          date: str | None = None, force: bool = False, progress: Progress | None = None) -> Fleet:  # fmt: skip
    """Report on every deployment of a scenario file: a page each and an index.

    Args:
        scenario: YAML or TOML with a list of ``deployments``, whose fields are those of ``report``.
        folder: where the pages go; None writes nothing.
        formats: of ``html``, ``md`` and ``json``; the index links to pages of the first.
        date: on the reports (``2026-11-24``); today without one.
        force: replace files that exist.
        progress: called after each deployment with its number, how many there are, and its entry of the index.

    Returns:
        The index; an entry that could not be planned says why and stops none of the others.

    Raises:
        KvplanError: the scenario cannot be read, or a file exists and ``force`` is not given.

    """
    from pathlib import Path

    from kvplan.document.fleet import write_fleet

    return write_fleet(Path(scenario), None if folder is None else Path(folder), formats=formats, date=date,
                       force=force, progress=progress)  # fmt: skip
