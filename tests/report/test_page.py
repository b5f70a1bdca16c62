"""The page in a real browser: quiet, closed, answering, readable in light and dark, on a desk, a phone and paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chromium import Browser, Page
from conftest import CHAT, DATE

import kvplan
from kvplan import Report


@pytest.fixture
def page_of(browser: Browser, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Open a report in a tab of a given width."""

    def opened(report: Report, width: int = 1280, *, dark: bool = False) -> Page:
        path = tmp_path / "report.html"
        path.write_text(report.as_html(), encoding="utf-8")
        page = Page(browser, width, dark=dark)
        page.open(path)
        return page

    return opened


NO = {"model": "405b", "gpu": "l4", "context_tokens": "4k", "date": DATE}
UNKNOWN = {"model": "70b", "gpu_memory": "80GiB", "tp": 4, "ctx": "8k", "concurrency": 8, "date": DATE}
MANY = {**CHAT, "compare": "bf16,fp8,fp8_per_token_head,int8_per_token_head,int4_per_token_head,fp8_e5m2"}
CASES = pytest.mark.parametrize(
    "question", [CHAT, NO, UNKNOWN, MANY], ids=["yes", "no", "unknown speed", "six formats"]
)


@CASES
@pytest.mark.parametrize("width", [1280, 768, 390, 320])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_is_quiet_asks_for_nothing_and_is_as_wide_as_its_window(page_of, question, width, dark) -> None:  # type: ignore[no-untyped-def]
    page = page_of(kvplan.report(**question), width, dark=dark)
    assert page.complaints() == []
    assert [url for url in page.requests() if not url.startswith("file:")] == []
    assert len(page.requests()) == 1
    assert page.run("document.documentElement.scrollWidth") == width
    light, dark_ = "rgb(255, 255, 255)", "rgb(18, 22, 27)"
    assert page.run("getComputedStyle(document.body).backgroundColor") == (dark_ if dark else light)


def test_every_picture_is_drawn_and_has_its_figures_beside_it(page_of, chat: Report) -> None:  # type: ignore[no-untyped-def]
    page = page_of(chat)
    for name in ("memory", "capacity", "speed"):
        assert page.run(f"document.querySelectorAll('#chart-{name} svg path').length") > 5
        assert page.run(f"document.querySelector('#chart-{name}').getAttribute('role')") == "img"
        assert page.run(f"document.querySelector('#{name} details table') !== null")


def test_the_controls_change_the_numbers_and_the_picture(page_of, chat: Report) -> None:  # type: ignore[no-untyped-def]
    page = page_of(chat)
    grid = chat.what_if
    asked = kvplan.itl(model="70b", gpu="h200", tp_size=4, kv_cache_dtype="fp8", context_tokens="32k", batch_size=64)
    assert page.run("document.getElementById('w-itl').textContent") == f"{asked.itl_s * 1e3:.1f} ms"
    before = page.run("document.getElementById('chart-speed').innerHTML")
    page.run(f"""(() => {{
        const set = (id, value) => {{ const c = document.getElementById(id); c.value = value;
            c.dispatchEvent(new Event("input", {{bubbles: true}})); }};
        set("users", {grid.users.index(8)}); set("context", {grid.contexts_tokens.index(8192)});
        set("precision", "bfloat16");
    }})()""")
    plan = kvplan.itl(model="70b", gpu="h200", tp_size=4, kv_cache_dtype="bf16", context_tokens=8192, batch_size=8)
    assert page.run("document.getElementById('w-itl').textContent") == f"{plan.itl_s * 1e3:.1f} ms"
    assert page.run("document.getElementById('w-kv').textContent") == "5.00 GiB"  # 8 users × 8,192 tokens × 81,920 B
    assert page.run("document.getElementById('w-fits').textContent") == "✓ yes"
    assert page.run("document.getElementById('chart-speed').innerHTML") != before
    assert page.run("document.getElementById('speed-users').textContent") == "8 users"


def test_what_does_not_fit_says_so_and_is_announced(page_of, chat: Report) -> None:  # type: ignore[no-untyped-def]
    page = page_of(chat)
    page.run("""(() => { const c = document.getElementById("context"); c.value = c.max;
        c.dispatchEvent(new Event("input", {bubbles: true})); })()""")
    assert page.run("document.getElementById('w-fits').textContent") == "✕ no"
    assert page.run("document.getElementById('w-itl').textContent") == "–"
    said = page.run("new Promise((done) => setTimeout(() => done(document.getElementById('w-live').textContent), 500))")
    assert said == "64 users at 131,072 tokens with fp8: does not fit, 18 users would"
    assert page.run("document.getElementById('w-live').getAttribute('aria-live')") == "polite"


def test_the_controls_work_from_the_keyboard(page_of, chat: Report) -> None:  # type: ignore[no-untyped-def]
    page = page_of(chat)
    page.run("document.getElementById('users').focus()")
    page.press("ArrowLeft", 37)
    assert page.run("document.getElementById('users-value').textContent") == "32"
    assert page.run("document.getElementById('users').getAttribute('aria-valuetext')") == "32 users"
    page.press("Tab", 9)
    assert page.run("document.activeElement.id") == "context"


def test_the_break_even_map_follows_the_precision(page_of, chat: Report) -> None:  # type: ignore[no-untyped-def]
    """The script works out the same map as the template: choosing the format that is shown changes nothing."""
    page = page_of(chat)
    cells = "[...document.querySelectorAll('#map td')].map((c) => [c.className, c.textContent, c.dataset.level || ''])"
    choose = """(() => {{ const c = document.getElementById("precision"); c.value = "{}";
        c.dispatchEvent(new Event("input", {{bubbles: true}})); }})()"""
    first = page.run(cells)
    page.run(choose.format("fp8_per_token_head"))
    assert page.run("document.getElementById('map-name').textContent") == "fp8_per_token_head"
    second = page.run(cells)
    assert second != first
    page.run(choose.format("fp8"))
    assert page.run(cells) == first


def test_measured_points_lie_on_the_lines_of_their_users(page_of, run_folder: Path) -> None:  # type: ignore[no-untyped-def]
    report = kvplan.report(model="8b", gpu="h200", context_tokens="32k", concurrency=32, measured=str(run_folder),
                           date=DATE)  # fmt: skip
    page = page_of(report)
    assert page.complaints() == []
    texts = page.run("[...document.querySelectorAll('#chart-speed text')].map((t) => t.textContent).join('|')")
    assert "bfloat16, measured step" in texts and "fp8, measured kernel" in texts


def test_a_hostile_name_runs_nothing(page_of, hostile: Report) -> None:  # type: ignore[no-untyped-def]
    page = page_of(hostile, 390)
    assert page.complaints() == []
    assert len(page.requests()) == 1
    assert page.run("document.title").startswith("</script><script>document.title='owned'</script>")
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("document.documentElement.scrollWidth") == 390


def test_dark_and_light_redraw_the_pictures_at_once(page_of, chat: Report) -> None:  # type: ignore[no-untyped-def]
    page = page_of(chat)
    light = page.run("document.getElementById('chart-memory').innerHTML")
    page.scheme("dark")
    page.call("Page.bringToFront")
    changed = f"""new Promise((done) => {{ let tries = 0; const look = () => {{
        const now = document.getElementById("chart-memory").innerHTML !== {json.dumps(light)};
        if (now || ++tries > 100) done(now); else setTimeout(look, 30); }}; look(); }})"""
    assert page.run(changed)


def test_the_page_prints_with_every_table_and_signature(page_of, chat: Report) -> None:  # type: ignore[no-untyped-def]
    page = page_of(chat, dark=True)
    printed = page.pdf()
    assert printed.startswith(b"%PDF")
    assert 3 <= printed.count(b"/Type /Page\n") <= 14
    assert page.complaints() == []
    assert page.run("document.querySelectorAll('details[open]').length") == 0, "tables close again after printing"


def test_the_index_of_a_fleet_is_quiet_and_links_to_its_pages(browser: Browser, tmp_path: Path) -> None:
    scenario = tmp_path / "fleet.yaml"
    scenario.write_text("gpu: h200\nctx: 8k\ndeployments:\n"
                        "  - {name: a, model: 8b, concurrency: 4}\n  - {name: '<i>b', model: nothing}\n")  # fmt: skip
    kvplan.fleet(scenario, tmp_path / "out", date=DATE)
    for width in (1280, 390):
        page = Page(browser, width)
        page.open(tmp_path / "out" / "index.html")
        assert page.complaints() == []
        assert page.run("document.documentElement.scrollWidth") == width
        link = page.run("document.querySelector('tbody a').href")
        assert Path(link.removeprefix("file://")) == tmp_path / "out" / "a.html"
        assert page.run("document.querySelectorAll('i').length") == 0
