"""kvplan: plan KV-cache memory and decode latency of LLM servers, with a source for every number.

>>> import kvplan
>>> plan = kvplan.size(model="llama-3.1-70b", gpu="h100", tp_size=8, kv_cache_memory_bytes="50GiB")
>>> plan.kv_cache.num_blocks
81920

The command line is a thin layer over the same functions: ``kvplan size --json`` prints ``plan`` as JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvplan.api import check_log as check_log
    from kvplan.api import check_url as check_url
    from kvplan.api import fleet as fleet
    from kvplan.api import itl as itl
    from kvplan.api import itl_cases as itl_cases
    from kvplan.api import report as report
    from kvplan.api import size as size
    from kvplan.api import size_from_log as size_from_log
    from kvplan.check.result import CheckResult as CheckResult
    from kvplan.document.schema import Fleet as Fleet
    from kvplan.document.schema import Report as Report
    from kvplan.errors import KvplanError as KvplanError
    from kvplan.latency.plan import ItlPlan as ItlPlan
    from kvplan.memory.plan import SizePlan as SizePlan
    from kvplan.memory.request import SizeRequest as SizeRequest

__all__ = [
    "CheckResult",
    "Fleet",
    "ItlPlan",
    "KvplanError",
    "Report",
    "SizePlan",
    "SizeRequest",
    "__version__",
    "check_log",
    "check_url",
    "fleet",
    "itl",
    "itl_cases",
    "report",
    "size",
    "size_from_log",
]

_HOMES = {
    "check_log": "kvplan.api",
    "check_url": "kvplan.api",
    "fleet": "kvplan.api",
    "itl": "kvplan.api",
    "itl_cases": "kvplan.api",
    "report": "kvplan.api",
    "size": "kvplan.api",
    "size_from_log": "kvplan.api",
    "CheckResult": "kvplan.check.result",
    "Fleet": "kvplan.document.schema",
    "Report": "kvplan.document.schema",
    "KvplanError": "kvplan.errors",
    "ItlPlan": "kvplan.latency.plan",
    "SizePlan": "kvplan.memory.plan",
    "SizeRequest": "kvplan.memory.request",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kvplan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
