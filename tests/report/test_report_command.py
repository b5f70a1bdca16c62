"""``kvplan report`` from a shell: files, stdout, several forms, scenario files, exit codes, time."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DATE, ROOT
from support import Ran

import kvplan
from kvplan import KvplanError
from kvplan.document.fleet import slugs_of
from kvplan.scenario import read_scenario

Cli = Callable[..., Ran]
KVPLAN = str(Path(sys.executable).parent / "kvplan")
CHAT = ("report", "--model", "70b", "--gpu", "h200", "--tp", "4", "--ctx", "32k", "--concurrency", "64",
        "--kv-cache-dtype", "fp8", "--date", DATE)  # fmt: skip
FLEET = """
gpu: h200
context_tokens: 32k
deployments:
  - {name: chat, model: 70b, tp: 4, concurrency: 64, kv_cache_dtype: fp8}
  - {name: "<b>code</b> & more", model: 8b, concurrency: 8}
  - {name: broken, model: nothing-like-it}
  - {name: large, model: 405b, tp: 4, concurrency: 32}
"""


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    return path


def test_several_files_at_once_are_one_report_in_several_forms(kvplan_cli: Cli, tmp_path: Path) -> None:
    paths = [tmp_path / "new" / f"r.{suffix}" for suffix in ("html", "md", "json")]
    done = kvplan_cli(*CHAT, *(word for path in paths for word in ("-o", str(path))))
    assert (done.code, done.out) == (0, "")
    assert done.err.count("wrote") == 3
    page, text, data = (path.read_text() for path in paths)
    headline = json.loads(data)["answers"]["headline"]
    assert headline in page and "# llama-3.1-70b: fits" in text


def test_without_a_file_markdown_goes_to_stdout_and_json_on_request(kvplan_cli: Cli) -> None:
    assert kvplan_cli(*CHAT).out.startswith("# llama-3.1-70b: fits\n\n**Yes: ")
    assert kvplan_cli(*CHAT, "--json").json["schema_version"] == 1


@pytest.mark.parametrize("model", ["tiny", "tiny/config.json", "link.json"])
def test_a_report_is_not_written_over_what_it_is_made_of(
    kvplan_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    config = tmp_path / "tiny" / "config.json"
    config.write_text("{}")
    (tmp_path / "link.json").symlink_to(config)
    done = kvplan_cli("report", "--model", model, "--gpu", "h200", "-o", str(config), "--force")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert f"{config} is named twice" in done.err and config.read_text() == "{}"
    measured = ("-o", "fit.json", "--calibration", "fit.json", "--force")
    assert "fit.json is named twice" in kvplan_cli("report", "--model", "8b", "--gpu", "h200", *measured).err


def test_a_file_that_exists_stays_unless_force_is_given(kvplan_cli: Cli, tmp_path: Path) -> None:
    kept, new = tmp_path / "kept.html", tmp_path / "new.md"
    kept.write_text("mine")
    done = kvplan_cli(*CHAT, "-o", str(new), "-o", str(kept))
    assert done.code == 2
    assert "kept.html exists (choose another name or add --force)" in done.err
    assert kept.read_text() == "mine" and not new.exists(), "nothing is written when one file cannot be"
    assert kvplan_cli(*CHAT, "-o", str(kept), "--force").code == 0
    assert kept.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("words", "says"),
    [(("-o", "report.pdf"), "a report is .html, .md or .json"), (("--gpu", "h2000"), "unknown GPU 'h2000'"),
     (("--ctx", "-5"), "--ctx '-5' is not a token count"), (("--ctx", "0"), "--ctx must be between 1"),
     (("--isl", "1e99"), "--isl '1e99' is not a token count"),
     (("--concurrency", "0"), "--concurrency must be between 1"),
     (("--tp", "3"), "3"), (("--date", "yesterday"), "'yesterday' is not a date"),
     (("--measured", "/nowhere"), "is no run"), (("--calibration", "/nowhere"), "cannot be read")],
)  # fmt: skip
def test_bad_options_are_one_line_and_exit_2(kvplan_cli: Cli, words: tuple[str, ...], says: str) -> None:
    done = kvplan_cli(*CHAT, *words)
    assert (done.code, done.out) == (2, "")
    assert says in done.err and len(done.err.splitlines()) == 1


def test_check_exits_1_when_the_answer_is_no_and_the_report_is_written(kvplan_cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "no.html"
    words = ("report", "--model", "405b", "--gpu", "l4", "--ctx", "4k", "-o", str(path))
    assert kvplan_cli(*words).code == 0
    assert kvplan_cli(*words, "--force", "--check").code == 1
    assert "No: the weights" in path.read_text()


def test_a_path_that_cannot_be_written_is_one_line(kvplan_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = kvplan_cli(*CHAT, "-o", str(tmp_path / "file" / "r.html"))
    assert done.code == 2 and "cannot be made" in done.err


# -------------------------------------------------------------------------------------------------------------- fleets


def test_a_scenario_makes_a_page_each_and_an_index_and_names_what_is_broken(
    kvplan_cli: Cli, fleet_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = kvplan_cli("report", str(fleet_file), "-o", str(out), "--format", "html,json", "--date", DATE)
    assert done.code == 2
    assert "1 of 4 deployments could not be planned: broken" in done.err
    assert "[3/4] broken: not planned: unknown model 'nothing-like-it'" in done.err
    assert {path.name for path in out.iterdir()} == {
        f"{stem}.{form}" for stem in ("index", "chat", "b-code-b-more", "large") for form in ("html", "json")
    }
    index = json.loads((out / "index.json").read_text())
    assert [entry["fits"] for entry in index["entries"]] == [True, True, None, False]
    assert (index["num_fitting"], index["num_not_fitting"], index["num_failed"]) == (2, 1, 1)
    assert index["num_gpus"] == 4 + 1 + 4 == index["totals"][0]["num_gpus"]
    page = (out / "index.html").read_text()
    assert "&lt;b&gt;code&lt;/b&gt; &amp; more" in page and "<b>code" not in page
    assert 'href="b-code-b-more.html"' in page and "unknown model" in page


def test_a_scenario_is_named_by_a_path_of_either_kind(fleet_file: Path, tmp_path: Path) -> None:
    assert kvplan.fleet(str(fleet_file), str(tmp_path / "out"), date=DATE).num_fitting == 2
    assert (tmp_path / "out" / "index.html").is_file()


def test_an_index_says_of_each_deployment_what_its_page_says(fleet_file: Path) -> None:
    entry = next(entry for entry in kvplan.fleet(fleet_file, date=DATE).entries if entry.name == "chat")
    page = kvplan.report(**next(d.options for d in read_scenario(fleet_file) if d.name == "chat"), date=DATE)
    now = page.answers.now
    assert now is not None
    assert (entry.itl_s, entry.tpot_s, entry.ttft_s) == (now.itl.value_s, now.tpot.value_s, now.ttft.value_s)


def test_a_fleet_is_the_same_to_the_byte_with_a_date(fleet_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        kvplan.fleet(fleet_file, tmp_path / name, formats=("html", "md", "json"), date=DATE)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_date_in_the_scenario_is_that_of_the_pages_unless_one_is_given(tmp_path: Path) -> None:
    scenario = tmp_path / "dated.yaml"
    scenario.write_text("{gpu: h200, date: 2026-01-31, deployments: [{model: 8b, ctx: 8k}]}\n")
    assert kvplan.fleet(scenario, tmp_path / "a", formats=["md"]).date == "2026-01-31"
    assert "2026-01-31" in (tmp_path / "a" / "8b.md").read_text()
    assert kvplan.fleet(scenario, date="2026-02-28").date == "2026-02-28"


def test_the_json_of_a_scenario_needs_no_folder(kvplan_cli: Cli, fleet_file: Path) -> None:
    done = kvplan_cli("report", str(fleet_file), "--json")
    assert done.json["entries"][0]["page"] is None
    assert kvplan_cli("report", str(fleet_file)).code == 2


def test_an_existing_page_stops_a_fleet_before_anything_is_planned(fleet_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "large.html").write_text("mine")
    with pytest.raises(KvplanError, match=r"large\.html exists"):
        kvplan.fleet(fleet_file, out)
    assert [path.name for path in out.iterdir()] == ["large.html"]


def test_an_interrupted_fleet_keeps_what_is_done_and_says_so(fleet_file: Path, tmp_path: Path) -> None:
    def stop(number: int, total: int, entry: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        kvplan.fleet(fleet_file, out, formats=("html", "json"), progress=stop)
    index = json.loads((out / "index.json").read_text())
    assert not index["is_complete"]
    assert [entry["name"] for entry in index["entries"]] == ["chat", "<b>code</b> & more"]
    assert "Interrupted" in (out / "index.html").read_text() and (out / "chat.html").exists()


def test_ctrl_c_ends_with_130_and_leaves_whole_pages_and_an_index(tmp_path: Path) -> None:
    lines = [f"  - {{name: d{n}, model: 70b, tp: 4, ctx: {1024 * (n + 1)}}}" for n in range(400)]
    (tmp_path / "fleet.yaml").write_text("gpu: h200\ndeployments:\n" + "\n".join(lines) + "\n")
    with subprocess.Popen([KVPLAN, "report", "fleet.yaml", "-o", "out"], cwd=tmp_path, stderr=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline().startswith("[1/400] d0: Yes")
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    pages = list((tmp_path / "out").iterdir())
    assert 2 <= len(pages) < 400
    assert all(page.read_text().endswith("</html>\n") for page in pages), "no page is half written"
    assert "Interrupted" in (tmp_path / "out" / "index.html").read_text()


def test_options_of_one_deployment_do_not_mix_with_a_scenario(kvplan_cli: Cli, fleet_file: Path) -> None:
    done = kvplan_cli("report", str(fleet_file), "--tp", "4", "-o", "out")
    assert done.code == 2 and "--tp are both given" in done.err


def test_a_scenario_goes_into_a_folder_and_not_a_file(kvplan_cli: Cli, fleet_file: Path, tmp_path: Path) -> None:
    done = kvplan_cli("report", str(fleet_file), "-o", str(tmp_path / "fleet.html"))
    assert done.code == 2 and "is not a folder" in done.err
    assert not (tmp_path / "fleet.html").exists()


def test_the_forms_of_pages_may_be_a_list_or_repeated(kvplan_cli: Cli, fleet_file: Path, tmp_path: Path) -> None:
    listed, repeated = tmp_path / "a", tmp_path / "b"
    kvplan_cli("report", str(fleet_file), "-o", str(listed), "--format", "md,json")
    kvplan_cli("report", str(fleet_file), "-o", str(repeated), "--format", "md", "--format", "json")
    names = sorted(path.name for path in listed.iterdir())
    assert {"index.md", "index.json"} < set(names) and names == sorted(path.name for path in repeated.iterdir())


def test_a_toml_scenario_reads_the_same(kvplan_cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('gpu = "h200"\n[[deployments]]\nname = "chat"\nmodel = "8b"\nctx = "8k"\nconcurrency = 4\n')
    assert kvplan_cli("report", str(path), "--json").json["entries"][0]["num_users"] == 4


def test_file_names_are_plain_and_each_is_used_once() -> None:
    assert slugs_of(["Chat", "chat", "../../etc/passwd", "index", "\u202e<>", "", "a" * 200]) == [
        "chat", "chat-2", "etc-passwd", "index-2", "deployment-5", "deployment-6", "a" * 60,
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- time


def cpu_seconds(*words: str, cwd: Path) -> float:
    """The fastest of three runs: user and system time, which other processes change little."""
    best = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run([KVPLAN, *words], cwd=cwd, check=True, capture_output=True)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        best = min(best, used)
    return best


def test_one_report_takes_at_most_2_seconds(tmp_path: Path) -> None:
    assert cpu_seconds(*CHAT, "-o", "r.html", "-o", "r.md", "-o", "r.json", "--force", cwd=tmp_path) <= 2.0


def test_fifty_reports_take_at_most_20_seconds(tmp_path: Path) -> None:
    models = ("70b", "8b", "qwen3-32b", "gpt-oss-120b", "deepseek-v3", "qwen3.5-27b", "gemma-3-27b", "qwen3-235b-a22b",
              "llama-4-scout", "mistral-small-3.2-24b")  # fmt: skip
    lines = [
        f"  - {{name: d{n}, model: {models[n % 10]}, concurrency: {n + 1}, ctx: {1024 * (8 + n)}}}" for n in range(50)
    ]
    (tmp_path / "fleet.yaml").write_text("gpu: b200\ntp: 8\ndeployments:\n" + "\n".join(lines) + "\n")
    started = time.monotonic()
    used = cpu_seconds("report", "fleet.yaml", "-o", "out", "--force", cwd=tmp_path)
    assert len(list((tmp_path / "out").glob("d*.html"))) == 50
    assert used <= 20.0, f"{used:.1f} s of CPU, {time.monotonic() - started:.1f} s in all for three runs"


def test_every_readme_command_of_the_section_runs(run_folder: Path, tmp_path: Path, kvplan_cli: Cli) -> None:
    """With the scenario that the README shows, and a run folder in place of runs/8b."""
    section = (ROOT / "README.md").read_text().split("## Sign it off")[1].split("\n## ")[0]
    (tmp_path / "fleet.yaml").write_text(section.split("```yaml\n")[1].split("```")[0])
    replaced = {"fleet.yaml": str(tmp_path / "fleet.yaml"), "runs/8b": str(run_folder), "out/": str(tmp_path / "out")}
    commands = section.split("```sh\n")[1].split("```")[0].splitlines()
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command.split("  #")[0])[1:]
        words = [replaced.get(word, word.replace("report.", f"{tmp_path}/report.")) for word in words]
        done = kvplan_cli(*words, "--force")
        assert done.code == 0, done.err
