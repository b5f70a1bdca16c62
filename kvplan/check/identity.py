"""Whether the model and the GPU that a user names are those of the server, and what of its report holds if not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvplan.check.basis import SHAPE, basis_of, gpu_of, model_of, same_model
from kvplan.check.server import ServerReport
from kvplan.gpu import resolve_gpu
from kvplan.memory.plan import SizePlan
from kvplan.memory.request import make_request
from kvplan.model_config import resolve_model
from kvplan.search import size
from kvplan.units import format_gib

MODEL = ("model", *SHAPE)
GPU = ("gpu", "gpu_memory_bytes")
IDENTITY = (*MODEL, *GPU, "num_parameters", "window_tokens")
"""Fields that say what the server is, or what would be in its place."""

OF_MODEL = ("weights_bytes", "activation_bytes", "graph_bytes", "kv_cache_bytes")
OF_GPU = ("graph_bytes", "overhead_bytes", "kv_cache_bytes")
GONE_WITH_BOTH = ("graph_estimate_bytes", "kv_cache_given_bytes")
GONE_WITH_MODEL = (*OF_MODEL, *GONE_WITH_BOTH, "model", "quantization", "observed_block_tokens")
GONE_WITH_GPU = (*OF_GPU, *GONE_WITH_BOTH, "gpu", "total_bytes", "usable_bytes", "free_bytes")

SAME_CARD = 0.06
"""How far the memory a driver reports may be from that of the GPU's profile."""

ANY_LENGTH = 1024
ALIKE = 0.25
"""How far a reported term may be from the planned one of the model or GPU that is said to be the server's, where the
server does not name its own."""


@dataclass(frozen=True)
class Identity:
    """A server beside what would be in its place.

    Attributes:
        server: what the user says of the server itself: fields of a sizing request.
        planned: the same of what is planned.
        kept: the report without what holds no longer.
        planned_anew: memory terms that the server reported and that hold no longer.
        others: the sentence that says why; empty when everything is the server's.

    """

    server: Mapping[str, Any]
    planned: Mapping[str, Any]
    kept: ServerReport
    planned_anew: tuple[str, ...]
    others: str


def identify(report: ServerReport, stated: Mapping[str, Any]) -> Identity:
    """Tell the server's own model and GPU from others.

    Args:
        report: what the server said.
        stated: fields of ``IDENTITY``.

    Raises:
        KvplanError: a model or GPU is unknown.

    """
    checked = make_request(stated)  # refuses what is impossible, before it is compared
    stated = {name: getattr(checked, name) for name in stated}
    theirs = model_of(report)
    own_model = _is_servers_model(report, stated, theirs)
    # a model that is not known here has the stated one in its place: what is kept of the report is of neither
    server = {name: value for name, value in stated.items() if own_model or theirs is None or name in GPU}
    own_gpu = _is_servers_gpu(report, server, own_model or theirs is not None)
    server = {name: value for name, value in server.items() if own_gpu or name not in GPU}
    planned = dict(stated)
    total = report.value("total_bytes")
    if own_gpu and "gpu" in stated and total is not None:
        server["gpu_memory_bytes"] = planned["gpu_memory_bytes"] = total
    gone = {*(() if own_model else GONE_WITH_MODEL), *(() if own_gpu else GONE_WITH_GPU)}
    kept = replace(report, facts={name: fact for name, fact in report.facts.items() if name not in gone})
    anew = dict.fromkeys((*OF_MODEL, *OF_GPU))
    return Identity(
        server=server,
        planned=planned,
        kept=kept,
        planned_anew=tuple(name for name in anew if name in gone and name in report.facts),
        others=_others(report, stated, own_model, own_gpu),
    )


def _is_servers_model(report: ServerReport, stated: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> bool:
    """Whether the model named is the server's: by its name, or where that is not known here, by its weights."""
    if not stated.keys() & set(MODEL):
        return True
    if theirs is not None:
        return "model" in stated and same_model(resolve_model(stated["model"]), resolve_model(theirs["model"]))
    planned = sized(basis_of(report, stated).options).memory.weights_bytes
    return _alike(planned, report.number("weights_bytes"))


def _is_servers_gpu(report: ServerReport, server: Mapping[str, Any], known: bool) -> bool:
    """Whether the GPU named is the server's: by its name and memory, or where it reports neither, by what it holds of a
    model that is ``known``.
    """
    if not server.keys() & set(GPU):
        return True
    total, given = report.facts.get("total_bytes"), make_request(server).gpu_memory_bytes
    if total is not None and given is not None:
        return abs(given - total.number) <= total.error + 1
    if total is not None:
        gpu, named = resolve_gpu(server["gpu"]), gpu_of(report).get("gpu")
        return gpu.name == (named or gpu.name) and abs(gpu.memory_bytes - total.number) <= SAME_CARD * total.number
    if not known:
        return True
    memory = sized(basis_of(report, server).options).memory
    weights = report.number("weights_bytes")
    if memory.kv_cache_bytes is None or weights is None:
        return True
    planned = (memory.weights_bytes or 0) + max(memory.kv_cache_bytes, 0)
    return _alike(planned, weights + (report.number("kv_cache_bytes") or 0.0))


def sized(options: Mapping[str, Any]) -> SizePlan:
    """A plan of a server; of any length where the model is a bare shape and the server does not say how long."""
    bare = not options.keys() & {"model", "context_tokens", "max_model_len_tokens"}
    return size(make_request({"context_tokens": ANY_LENGTH, **options} if bare else options), compare=False)


def _alike(planned: float | None, reported: float | None) -> bool:
    return planned is None or reported is None or abs(planned - reported) <= ALIKE * reported


def _others(report: ServerReport, stated: Mapping[str, Any], own_model: bool, own_gpu: bool) -> str:
    """``the log is of llama-3.1-8b, not of 70b``; empty when model and GPU are the server's."""
    parts = []
    if not own_model:
        theirs = report.value("model") or "a model with other weights"
        parts.append(f"of {theirs}, not of {stated.get('model', 'a model of the shape given')}")
    if not own_gpu:
        total, asked = report.number("total_bytes"), make_request(stated).gpu_memory_bytes
        theirs = f"{report.value('gpu') or 'a GPU'} of {'another size' if total is None else format_gib(int(total))}"
        parts.append(f"of {theirs}, not of {format_gib(asked) if asked is not None else stated['gpu']}")
    return f"the log is {', and '.join(parts)}" if parts else ""
