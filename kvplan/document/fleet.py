"""Many deployments from one scenario file: a page each, an index, and nothing lost to one that cannot be planned."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import kvplan
from kvplan.document.build import build
from kvplan.document.parts import Fingerprint
from kvplan.document.question import iso_date
from kvplan.document.schema import Fleet, FleetEntry, GpuTotal, Report
from kvplan.errors import InputError, KvplanError, shorten
from kvplan.files import write_text
from kvplan.scenario import read_scenario

FORMATS: dict[str, Callable[[Report | Fleet], str]] = {
    "html": lambda document: document.as_html(),
    "md": lambda document: document.as_markdown(),
    "json": lambda document: document.as_json(),
}
"""Forms of a document, by the suffix of their files."""

SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".markdown": "md", ".json": "json"}
INDEX = "index"
MAX_SLUG_CHARS = 60
Progress = Callable[[int, int, FleetEntry], None]


def write_fleet(scenario: Path, folder: Path | None, *, formats: Sequence[str] = ("html",), date: str | None = None,
                force: bool = False, progress: Progress | None = None) -> Fleet:  # fmt: skip
    """Plan every deployment of ``scenario`` and write a page each and an index into ``folder``.

    Args:
        scenario: YAML or TOML, see ``kvplan.scenario``; fields are those of a report.
        folder: where pages go; made when absent. None writes nothing.
        formats: of ``html``, ``md`` and ``json``.
        date: of the reports; without one, theirs in the scenario, else today.
        force: replace files that are there.
        progress: called after each deployment with its number, how many there are, and its entry.

    Raises:
        InputError: the scenario cannot be read, or a file is there already or cannot be written.
        KeyboardInterrupt: after the index of what was done was written.

    """
    deployments = read_scenario(scenario)
    slugs = slugs_of([deployment.name for deployment in deployments])
    if folder is not None and not force:
        _refuse_existing(folder, slugs, formats)
    dates = {deployment.options.get("date") for deployment in deployments}
    day = iso_date(date if date is not None or len(dates) > 1 else dates.pop())
    entries: list[FleetEntry] = []
    try:
        for number, (deployment, slug) in enumerate(zip(deployments, slugs, strict=True), 1):
            options = {"date": day, **deployment.options, "name": deployment.name}
            if date is not None:
                options["date"] = day
            entry = _entry(deployment.name, options, slug, folder, formats)
            entries.append(entry)
            if progress is not None:
                progress(number, len(deployments), entry)
    except KeyboardInterrupt:
        _write(_fleet(scenario, day, entries, complete=False), folder, INDEX, formats, force=True)
        raise
    fleet = _fleet(scenario, day, entries, complete=True)
    _write(fleet, folder, INDEX, formats, force=True)
    return fleet


def _entry(name: str, options: Mapping[str, Any], slug: str, folder: Path | None, formats: Sequence[str]) -> FleetEntry:
    try:
        report = build(options)
    except KvplanError as error:
        return FleetEntry(name=name, page=None, problem=error.message, hint=error.hint)
    _write(report, folder, slug, formats, force=True)
    d, a = report.deployment, report.answers
    return FleetEntry(
        name=name, page=None if folder is None else f"{slug}.{formats[0]}", model=d.model, gpu=d.gpu,
        gpu_name=d.gpu_name, num_gpus=d.num_gpus, engine=d.engine, kv_cache_dtype=d.kv_cache_dtype,
        context_tokens=d.context_tokens, num_users=d.num_users, max_users=a.max_users, fits=a.fits, headline=a.headline,
        itl_s=None if a.now is None else a.now.itl.value_s, tpot_s=None if a.now is None else a.now.tpot.value_s,
        ttft_s=None if a.now is None else a.now.ttft.value_s,
    )  # fmt: skip


def _fleet(scenario: Path, date: str, entries: list[FleetEntry], complete: bool) -> Fleet:
    planned = [entry for entry in entries if entry.problem is None]
    totals: dict[str, GpuTotal] = {}
    for entry in planned:
        gpu = entry.gpu or ""
        before = totals.get(gpu)
        totals[gpu] = GpuTotal(
            gpu=gpu, gpu_name=entry.gpu_name or gpu,
            num_gpus=(entry.num_gpus or 0) + (before.num_gpus if before else 0),
            num_deployments=1 + (before.num_deployments if before else 0),
        )  # fmt: skip
    return Fleet(
        kvplan_version=kvplan.__version__,
        date=date,
        name=scenario.stem,
        is_complete=complete,
        entries=entries,
        totals=sorted(totals.values(), key=lambda total: (-total.num_gpus, total.gpu)),
        num_gpus=sum(entry.num_gpus or 0 for entry in planned),
        num_users=sum(entry.num_users or 0 for entry in planned),
        num_fitting=sum(entry.fits is True for entry in planned),
        num_not_fitting=sum(entry.fits is False for entry in planned),
        num_failed=len(entries) - len(planned),
        fingerprints=[Fingerprint(kind="scenario", name=scenario.name,
                                  sha256=hashlib.sha256(scenario.read_bytes()).hexdigest())],
    )  # fmt: skip


def slugs_of(names: Sequence[str]) -> list[str]:
    """A file name for each deployment: lower-case letters, digits, dots and dashes; each once, none the index."""
    found: list[str] = []
    taken = {INDEX}
    for number, name in enumerate(names, 1):
        plain = re.sub(r"[^a-z0-9.]+", "-", name.lower())[:MAX_SLUG_CHARS].strip("-.") or f"deployment-{number}"
        slug, again = plain, 2
        while slug in taken:
            slug, again = f"{plain}-{again}", again + 1
        taken.add(slug)
        found.append(slug)
    return found


def _refuse_existing(folder: Path, slugs: Sequence[str], formats: Sequence[str]) -> None:
    for slug in (*slugs, INDEX):
        for form in formats:
            if (folder / f"{slug}.{form}").exists():
                raise InputError(f"{folder / slug}.{form} exists", hint="choose another folder or add --force")


def _write(document: Report | Fleet, folder: Path | None, stem: str, formats: Sequence[str], force: bool) -> None:
    if folder is not None:
        write_documents(document, [folder / f"{stem}.{form}" for form in formats], force=force)


def write_documents(document: Report | Fleet, paths: Sequence[Path], *, force: bool) -> None:
    """Write a document in the form each path's suffix names; all paths are checked before any is written.

    Raises:
        InputError: a suffix names no form, a file is there and ``force`` is not given, or it cannot be written.

    """
    forms = [form_of(path) for path in paths]
    existing = next((path for path in paths if path.exists() and not force), None)
    if existing is not None:
        raise InputError(f"{existing} exists", hint="choose another name or add --force")
    for path, form in zip(paths, forms, strict=True):
        write_text(path, FORMATS[form](document), force)


def form_of(path: Path) -> str:
    """``html``, ``md`` or ``json``, by the suffix.

    Raises:
        InputError: another suffix.

    """
    form = SUFFIXES.get(path.suffix.lower())
    if form is None:
        raise InputError(f"-o {shorten(str(path), 60)}: a report is .html, .md or .json", hint="-o report.html")
    return form
