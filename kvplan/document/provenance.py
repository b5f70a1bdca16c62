"""The audit of a report: every number with its source, formula and assumption, and the files it rests on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kvplan import profiles
from kvplan.calibration import store
from kvplan.document.parts import Answers, Figure, Fingerprint, Precision
from kvplan.document.plans import Plans
from kvplan.document.question import Question
from kvplan.document.words import seconds, users
from kvplan.errors import InputError, reason
from kvplan.gpu import GpuSpec
from kvplan.latency.kv import found_calibrations, is_latent
from kvplan.latency.lines import ItlLine, traffic_of
from kvplan.latency.plan import DEFINITIONS
from kvplan.latency.planner import plan_points
from kvplan.latency.request import Point
from kvplan.latency.served import Served
from kvplan.memory.explain import explained
from kvplan.memory.plan import SizePlan
from kvplan.memory.request import Source
from kvplan.units import format_bytes, format_bytes_per_s, format_percent, format_ratio, format_tokens


def audit_of(plans: Plans, answers: Answers, precisions: Sequence[Precision]) -> list[Figure]:
    """Every figure: memory terms, the rules of the cache, precisions, times."""
    plan = explained(plans.size)
    return [
        *_memory(plan),
        *_cache(plan),
        *_precisions(precisions, "exact" if plans.cache.exact else "assumed"),
        *_hardware(plans.gpu),
        *_latency(answers, plans.line),
    ]


def _figure(section: str, name: str, value: str, source: str | None, formula: str, assumption: str = "") -> Figure:
    return Figure(section=section, name=name, value=value, source=source or "unknown", formula=formula,
                  assumption=assumption)  # fmt: skip


def _memory(plan: SizePlan) -> list[Figure]:
    found = []
    for key, term in plan.memory.sources.items():
        value = getattr(plan.memory, key)
        if value is not None:
            name = key.removesuffix("_bytes").replace("_", " ")
            found.append(_figure("memory of one GPU", name, f"{value:,} B ({format_bytes(value)})", term.source,
                                 term.detail, f"override with {term.override}"))  # fmt: skip
    return found


def _cache(plan: SizePlan) -> list[Figure]:
    """The rule set's formulas; memory terms have their own section."""
    source = "exact" if plan.kv_cache.rules == "exact" else "assumed"
    terms = set(plan.memory.sources)
    note = "" if source == "exact" else "an approximation of this engine's rules"
    return [
        _figure("KV cache", rule.name, "", source, rule.formula, f"{rule.source}{'; ' if note else ''}{note}")
        for rule in plan.rules if rule.name not in terms
    ]  # fmt: skip


def _precisions(precisions: Sequence[Precision], source: Source) -> list[Figure]:
    found = []
    for p in precisions:
        if p.forbidden is not None:
            found.append(_figure("precisions", p.kv_cache_dtype, "not possible", source, p.forbidden))
            continue
        how = "bytes of a 16-bit request / bytes of one in this format, blocks, scales and padding included"
        size = f"{p.bytes_per_token:,} B a token, {p.scale_bytes_per_token:,} B of them scales"
        name = f"{p.kv_cache_dtype}: capacity gain"
        found.append(_figure("precisions", name, format_ratio(p.capacity_gain), source, f"{how}; {size}"))
        if p.slope_ratio is not None and p.slope_ratio_detail:
            found.append(_figure("precisions", f"{p.kv_cache_dtype}: slope ratio", format_ratio(p.slope_ratio),
                                 p.slope_ratio_source, p.slope_ratio_detail,
                                 f"bytes alone would make it {format_ratio(p.bytes_ratio)}"))  # fmt: skip
        if p.latency_problem is not None:
            found.append(_figure("precisions", f"{p.kv_cache_dtype}: time", "unknown", None, p.latency_problem))
    return found


def _hardware(gpu: GpuSpec) -> list[Figure]:
    if gpu.memory_bandwidth_bytes_per_s is None:
        return []
    fact = gpu.facts.get("memory_bandwidth_bytes_per_s", {})
    source = f"{fact.get('source', 'GPU profile')} {fact.get('date', fact.get('retrieved', ''))}".strip()
    return [_figure("hardware", "memory bandwidth", format_bytes_per_s(gpu.memory_bandwidth_bytes_per_s), "exact",
                    source, "peak of the datasheet")]  # fmt: skip


def _latency(answers: Answers, line: ItlLine | None) -> list[Figure]:
    basis, at = answers.basis, answers.now or answers.limit
    if line is None or at is None:
        return []
    plan = plan_points(line.served, [Point(context_tokens=at.context_tokens, batch_size=at.num_users)])[0]
    traffic = traffic_of(line.served, plan)
    slope = f"{seconds(plan.slope_s_per_token * 1024)} per 1,024 tokens"
    law = f"intercept {seconds(plan.intercept_s)} + {slope} × {format_tokens(at.context_tokens)} tokens"
    name = f"ITL of {users(at.num_users)}"
    found = [_figure("time of a token", name, seconds(plan.itl_s), basis.source, law, basis.detail)]
    hows = {
        "weights": f"{format_bytes(sum(traffic['weights_read_bytes'].values()))} read a step and GPU",
        "kv": f"{format_bytes(traffic['kv_read_bytes'])} read, {format_bytes(traffic['kv_stored_bytes'])} stored, "
        f"a step and GPU; {line.served.kv_speed.detail}",
        "compute": f"{traffic['matrix_flops'] / 1e9:,.1f} GFLOP of matrix products, where weights do not hide them",
        "collectives": f"{sum(v for k, v in traffic['collectives'].items() if k.endswith('count'))} collective "
        "operations a step",
        "overhead": f"{line.served.traffic.num_kernels:,} kernels, the step, and its sequences",
    }
    for name, value in plan.breakdown.as_dict().items():
        share = format_percent(value / plan.itl_s, 0)
        found.append(
            _figure("time of a token", f"of which {name}", f"{seconds(value)} ({share})", basis.source, hows[name])
        )
    found.append(_figure("time of a token", "roofline", seconds(plan.roofline_s), "roofline",
                         "weights and KV at the peak bandwidth of the datasheet, nothing else"))  # fmt: skip
    found.append(_figure("time of a token", "80% intervals", "", basis.source, basis.interval_note))
    for name, text in DEFINITIONS.items():
        found.append(_figure("definitions", _shown(name), "", "exact", text))
    return found


def _shown(name: str) -> str:
    return {"itl_s": "ITL", "tpot_s": "TPOT", "ttft_s": "TTFT"}.get(name, name.removesuffix("_s").replace("_", " "))


def fingerprints_of(plans: Plans) -> list[Fingerprint]:
    """SHA-256 of every file that the numbers rest on: profiles, config, calibrations, samples."""
    question, gpu = plans.question, plans.gpu
    files: list[tuple[str, str, Path]] = []
    name = profiles.find("models", question.size.model or "")
    path = Path(question.size.model or "").expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        files.append(("model config", str(question.size.model), path))
    elif name is not None:
        files.append(("model profile", name, profiles.ROOT / "models" / f"{name}.json"))
    if gpu.name in profiles.names("gpus"):
        files.append(("GPU profile", gpu.name, profiles.ROOT / "gpus" / f"{gpu.name}.json"))
    if plans.line is not None:
        files += _calibrations(question, plans.line.served)
    if question.measured is not None:
        files += [("measurement", f"{question.measured.name}/{file}", question.measured / file)
                  for file in ("samples.jsonl", "steps.jsonl") if (question.measured / file).is_file()]  # fmt: skip
    return [Fingerprint(kind=kind, name=shown, sha256=_sha256(file)) for kind, shown, file in files]


def _calibrations(question: Question, served: Served) -> list[tuple[str, str, Path]]:
    found = [("calibration", "serving", profiles.ROOT / "calibrations" / "serving.json")]
    if question.calibration is not None:
        return [*found, ("calibration", question.calibration, Path(question.calibration))]
    engine, latent = served.setup.engine.name, is_latent(served.model)
    for kernel in found_calibrations(served.gpu.name, engine, latent, served.latent_heads)[:1]:
        shipped = profiles.ROOT / "calibrations" / f"{kernel.name}.json"
        found.append(("calibration", kernel.name, shipped if kernel.origin == store.SHIPPED else Path(kernel.where)))
    return found


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
