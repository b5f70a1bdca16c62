"""The three forms of a report: escaped, self-contained, reproducible, and of a published schema."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import CHAT, ROOT
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import ValidationError

import kvplan
from kvplan import Fleet, Report
from kvplan.document.parts import printable
from kvplan.document.render import ASSETS, code_span, html_prose, markdown_prose, markdown_text
from kvplan.document.schema import SCHEMAS, schema_text

VENDOR = ASSETS / "vendor"


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def tags_of(page: str) -> Tags:
    found = Tags()
    found.feed(page)
    return found


def test_the_same_inputs_and_date_give_the_same_bytes(chat: Report) -> None:
    again = kvplan.report(**CHAT)
    assert again.as_html() == chat.as_html()
    assert again.as_markdown() == chat.as_markdown()
    assert again.as_json() == chat.as_json()


def test_a_page_is_one_file_of_at_most_2_mb_that_asks_for_no_other(chat: Report) -> None:
    page = chat.as_html()
    assert len(page.encode()) <= 2_000_000
    found = tags_of(page)
    assert not [attrs for tag, attrs in found.tags if tag in ("link", "img", "iframe", "object", "embed", "base")]
    assert not [attrs for tag, attrs in found.tags if "src" in attrs or "srcset" in attrs]
    assert all((attrs.get("href") or "#").startswith("#") for tag, attrs in found.tags if tag == "a")


def test_the_content_policy_allows_the_scripts_of_the_page_and_nothing_else(chat: Report) -> None:
    found = tags_of(chat.as_html())
    (policy,) = [a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests


def test_the_chart_library_is_the_published_build_it_says_it_is() -> None:
    """Version, source and licence are noted beside it; the hash is of the file in the package on npm."""
    noted = json.loads((VENDOR / "echarts.json").read_text())
    script = (VENDOR / noted["file"]).read_bytes()
    assert hashlib.sha256(script).hexdigest() == noted["sha256"]
    assert f'.version="{noted["version"]}"'.encode() in script
    assert noted["license"].startswith("Apache-2.0") and (VENDOR / "echarts-LICENSE").is_file()
    assert b"</script" not in script


def test_commands_in_sentences_are_code_in_each_form() -> None:
    """NVFP4 weights on TensorRT-LLM: a note names `kvplan itl`."""
    report = kvplan.report(model="qwen3-235b-a22b", gpu="b200", tp_size=4, engine="trtllm", weight_dtype="nvfp4",
                           context_tokens="32k", batch_size=64)  # fmt: skip
    assert any("`kvplan itl`" in note for note in report.notes)
    page = report.as_html().replace((VENDOR / "echarts.common.min.js").read_text(), "")
    shown = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert "<code>kvplan itl</code>" in shown and "`" not in shown
    assert "; `kvplan itl` takes fp8" in report.as_markdown()


@pytest.mark.parametrize(
    ("text", "html", "markdown"),
    [
        ("see `a <b>` & `c`", "see <code>a &lt;b&gt;</code> &amp; <code>c</code>", "see `a <b>` & `c`"),
        ("one ` alone_", "one ` alone_", r"one \` alone\_"),
        ("`a|b` in a cell", "`a|b` in a cell", r"\`a\|b\` in a cell"),
        ("`` none", "`` none", r"\`\` none"),
    ],
)
def test_code_is_what_stands_between_backticks(text: str, html: str, markdown: str) -> None:
    assert (html_prose(text), markdown_prose(text)) == (html, markdown)


def test_no_line_of_the_page_ends_between_a_number_and_its_unit(chat: Report) -> None:
    page = chat.as_html()
    assert re.search(r"[0-9]\N{NO-BREAK SPACE}GiB", page) and re.search(r"[0-9]\N{NO-BREAK SPACE}ms", page)
    shown = re.sub(r"<(script|style|pre).*?</\1>", "", page, flags=re.S)
    assert not re.search(r"[0-9] (?:ms|GiB|µs)\b", shown)
    assert not any("\N{NO-BREAK SPACE}" in text for text in re.findall(r"<pre.*?</pre>", page, re.S))


def test_missing_memory_is_called_missing() -> None:
    """64 users of 128k on two H100s: 1,276 GiB a GPU are short."""
    short = kvplan.report(model="70b", gpu="h100", tp_size=2, context_tokens="128k", batch_size=64)
    page = short.as_html()
    assert short.answers.kv_headroom_bytes is not None and short.answers.kv_headroom_bytes < 0
    assert "<dt>Missing KV memory per GPU</dt><dd>1,276" in page and "<dd>−" not in page


# ------------------------------------------------------------------------------------------------------------ escaping


def test_a_hostile_name_is_text_in_the_page(chat: Report, hostile: Report) -> None:
    """The page has the same tags under either name: nothing of the name became markup."""
    plain, other = tags_of(chat.as_html()), tags_of(hostile.as_html())
    count = [sum(tag == name for name, _ in plain.tags) for tag in ("script", "img", "h1", "title", "b")]
    assert count == [sum(tag == name for name, _ in other.tags) for tag in ("script", "img", "h1", "title", "b")]
    assert not [attrs for _, attrs in other.tags if any(name.startswith("on") for name in attrs)]
    assert "&lt;/script&gt;&lt;script&gt;document.title" in hostile.as_html()


@pytest.mark.parametrize("form", ["as_html", "as_markdown", "as_json"])
def test_no_control_or_bidi_character_survives(hostile: Report, form: str) -> None:
    text = getattr(hostile, form)()
    body = text.replace((VENDOR / "echarts.common.min.js").read_text(), "")
    assert not [ch for ch in body if not ch.isprintable() and ch not in "\n\N{NO-BREAK SPACE}"]


def test_json_is_ascii_and_holds_the_name_as_data(hostile: Report) -> None:
    text = hostile.as_json()
    assert text.isascii()
    assert json.loads(text)["name"].startswith("</script><script>document.title='owned'</script>")


def test_a_hostile_name_is_one_line_of_text_in_markdown(hostile: Report) -> None:
    lines = hostile.as_markdown().splitlines()
    assert lines[0].startswith("# \\</script\\>\\<script\\>document.title")
    assert "\\`\\|\\*\\_" in lines[0]
    unescaped = re.compile(r"(?<!\\)<(?!/?details>|/?summary>|details>)")
    outside_code = [re.sub(r"(`+) ?.*? ?\1", "", line) for line in lines]
    assert not [line for line in outside_code if unescaped.search(line)]


def test_every_row_of_a_markdown_table_has_the_cells_of_its_heading(hostile: Report) -> None:
    width = None
    for line in hostile.as_markdown().splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        width = width or cells
        assert cells == width, line


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a|b", "a\\|b"), ("a\nb", "a b"), ("<b>", "\\<b\\>"), ("&lt;", "&amp;lt;"), ("[x](y)", "\\[x\\](y)"),
     ("50% off & more", "50% off & more"), ("$x$", "\\$x\\$")],
)  # fmt: skip
def test_markdown_shows_text_as_it_is(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


def test_a_code_span_cannot_be_ended_from_inside() -> None:
    assert code_span("a `b` c") == "`` a `b` c ``"
    assert code_span("a|b") == "`a|b`"


def test_text_is_cleaned_and_cut() -> None:
    assert printable("a\u202eb\x00c\nd") == "a\ufffdb\ufffdc\ufffdd"
    cut = printable("x" * 5000)
    assert isinstance(cut, str) and len(cut) == 2000 and cut.endswith("…")


# -------------------------------------------------------------------------------------------------------------- schema


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_published_schema_is_that_of_the_types(name: str) -> None:
    """Regenerate with: python -m kvplan.document.schema docs/schema"""
    published = (ROOT / "docs" / "schema" / name).read_text(encoding="utf-8")
    assert published == schema_text(SCHEMAS[name])


def test_a_report_as_json_is_a_report_again(chat: Report) -> None:
    assert Report.model_validate_json(chat.as_json(), strict=True) == chat
    data = json.loads(chat.as_json())
    with pytest.raises(ValidationError):
        Report.model_validate({**data, "schema_version": 2})
    with pytest.raises(ValidationError):
        Report.model_validate({**data, "surprise": 1})


def test_every_schema_of_the_documents_is_published() -> None:
    assert set(SCHEMAS.values()) == {Report, Fleet}
    assert {path.name for path in (ROOT / "docs" / "schema").iterdir()} == set(SCHEMAS)


def test_a_report_without_javascript_has_the_figures_in_its_tables(chat: Report) -> None:
    page = re.sub(r"<script.*?</script>", "", chat.as_html(), flags=re.S)
    plan = kvplan.itl(model="70b", gpu="h200", tp_size=4, kv_cache_dtype="fp8", context_tokens="32k", batch_size=64)
    assert f"{plan.itl_s * 1e3:.1f}\N{NO-BREAK SPACE}ms" in page and "does not fit" in page
    most = kvplan.size(model="70b", gpu="h200", tp_size=4, context_tokens=1024).answers.max_batch_at_context
    assert most == 1181 and "1,181" in page  # users of bfloat16 at 1k: 1,183 less what a limit beyond 1,024 takes
    assert page.count("<summary>Figures of the ") == 3


def test_templates_and_scripts_ask_nothing_of_the_network() -> None:
    own = [path for path in Path(ASSETS).iterdir() if path.is_file()]
    assert own
    for path in own:
        text = path.read_text()
        assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|import\(|@import|url\(", text), path.name


class Text(HTMLParser):
    """The text and the tags that a Markdown renderer made."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(markdown: str) -> Text:
    found = Text()
    found.feed(MarkdownIt("commonmark").enable("table").enable("strikethrough").render(markdown))
    return found


TABLE = {"table", "thead", "tbody", "tr", "th", "td"}
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=60) | st.text("<>|`*_[]()!#~$\\&; \nax", max_size=40)


@given(ANY_TEXT)
def test_any_text_in_a_markdown_table_is_shown_as_it_is(text: str) -> None:
    shown = printable(text)
    found = rendered(f"| name |\n|---|\n| x{markdown_text(shown)}x |\n")
    assert found.tags == TABLE
    assert found.text.split() == f"name x{' '.join(str(shown).split())}x".split()


@given(ANY_TEXT)
def test_any_text_in_a_markdown_code_span_is_shown_as_it_is(text: str) -> None:
    shown = " ".join(str(printable(text)).split())
    found = rendered(f"{code_span(shown)}\n")
    assert found.tags <= {"p", "code"}
    assert found.text.split() == (shown or "``").split()
