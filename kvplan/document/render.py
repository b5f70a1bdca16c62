"""The document's forms: one self-contained HTML page, Markdown, and the index of a fleet.

Whatever a name holds is data: HTML is escaped by the template engine, Markdown by ``markdown_text``, data for the
page's script is JSON with ``<``, ``>``, ``&`` and ``'`` escaped. The page's content security policy allows nothing but
its own scripts, by their hashes, so no request can leave it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kvplan.document import words
from kvplan.document.map import BreakEvenMap, break_even_map
from kvplan.document.parts import Surface
from kvplan.document.precisions import small_format
from kvplan.document.schema import Fleet, Report
from kvplan.units import format_bytes, format_gib, format_percent, format_ratio, format_tokens

ASSETS = Path(__file__).parent / "assets"
CHARTS = "vendor/echarts.common.min.js"
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~$])")
_ENTITY = re.compile(r"&(?=[#A-Za-z])")
_UNIT = re.compile(r"(?<=[0-9]) (?=(?:[mµ]?s|[KMGT]?i?B)\b)")
_CODE = re.compile(r"`([^`|]+)`")


def markdown_text(value: object) -> str:
    """``value`` as Markdown that shows it as it is: no markup, no table cell border, one line."""
    return _escaped(" ".join(str(value).split()))


def _escaped(text: str) -> str:
    return _ENTITY.sub("&amp;", _MARKDOWN.sub(r"\\\1", text))


def markdown_prose(text: str) -> Markup:
    """A sentence of ours as Markdown: what it has between backticks is code, all else is shown as it is."""
    parts = _CODE.split(" ".join(text.split()))
    return Markup("".join(code_span(part) if at % 2 else _escaped(part) for at, part in enumerate(parts)))


def html_prose(text: str) -> Markup:
    """A sentence of ours as HTML: what it has between backticks is code."""
    parts = _CODE.split(_finalize_html(text))
    return Markup("").join(Markup("<code>{}</code>").format(part) if at % 2 else part for at, part in enumerate(parts))


def code_span(value: object) -> Markup:
    """``value`` as a Markdown code span that no backtick in it can end; not for tables, which ``|`` would cut."""
    text = " ".join(str(value).split())
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return Markup(f"{fence}{pad}{text}{pad}{fence}")


def _finalize_markdown(value: object) -> str:
    return value if isinstance(value, Markup) else markdown_text(value)


def _finalize_html(value: object) -> str:
    """Text of which no line ends between a number and its unit; Markup as it is."""
    return value if isinstance(value, Markup) else _UNIT.sub("\N{NO-BREAK SPACE}", str(value))


FILTERS: dict[str, Any] = {
    "gib": format_gib, "size": format_bytes, "tokens": format_tokens, "ratio": format_ratio, "percent": format_percent,
    "seconds": words.seconds, "interval": words.interval, "users": words.users,
}  # fmt: skip


@lru_cache(maxsize=2)
def _environment(markdown: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=not markdown, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        finalize=_finalize_markdown if markdown else _finalize_html,
    )  # fmt: skip
    environment.filters |= FILTERS | {
        "code": code_span, "raw": Markup, "prose": markdown_prose if markdown else html_prose
    }  # fmt: skip
    return environment


@lru_cache(maxsize=8)
def _asset(name: str) -> Markup:
    """A file of our own to put into the page as it is."""
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


@lru_cache(maxsize=8)
def _script_hash(name: str) -> str:
    """The source expression by which a content security policy allows a script."""
    digest = hashlib.sha256(_asset(name).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def report_html(report: Report) -> str:
    """One self-contained page."""
    small = small_format(report.precisions)
    shown = None if small is None else break_even_map(report.what_if, small.kv_cache_dtype)
    scripts = (CHARTS, "report.js")
    return _environment(False).get_template("report.html.j2").render(
        report=report,
        style=_asset("report.css"),
        charts=_asset(CHARTS),
        script=_asset("report.js"),
        hashes=" ".join(_script_hash(name) for name in scripts),
        data=page_data(report, shown),
        small=small,
        map=shown,
        surface=chosen_surface(report),
    )  # fmt: skip


def page_data(report: Report, shown: BreakEvenMap | None) -> dict[str, Any]:
    """What the page's script draws and answers from."""
    deployment = report.deployment
    return {
        "what_if": report.what_if.model_dump(mode="json"),
        "memory": [segment.model_dump(mode="json") for segment in report.memory],
        "points": [] if report.measured is None else [p.model_dump(mode="json") for p in report.measured.points],
        "chosen": {"kv_cache_dtype": deployment.kv_cache_dtype, "num_users": deployment.num_users or 1,
                   "context_tokens": deployment.context_tokens},
        "map": None if shown is None else {"users": shown.users, "contexts_tokens": shown.contexts_tokens,
                                           "kv_cache_dtype": shown.kv_cache_dtype, "baseline": shown.baseline},
    }  # fmt: skip


def chosen_surface(report: Report) -> Surface | None:
    """The surface of the deployment's own format; None when the engine refuses every one."""
    name = report.deployment.kv_cache_dtype
    return next((surface for surface in report.what_if.surfaces if surface.kv_cache_dtype == name), None)


def report_markdown(report: Report) -> str:
    """The same for a pull request."""
    small = small_format(report.precisions)
    return _environment(True).get_template("report.md.j2").render(
        report=report,
        map=None if small is None else break_even_map(report.what_if, small.kv_cache_dtype),
        surface=chosen_surface(report),
    )  # fmt: skip


def fleet_html(fleet: Fleet) -> str:
    """The index page of a fleet."""
    return _environment(False).get_template("fleet.html.j2").render(fleet=fleet, style=_asset("report.css"))


def fleet_markdown(fleet: Fleet) -> str:
    """The index of a fleet for a pull request."""
    return _environment(True).get_template("fleet.md.j2").render(fleet=fleet)
