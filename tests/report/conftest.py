"""Reports and a browser, made once for all tests here."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvplan
from kvplan import Report
from kvplan.measure.family import Shape
from kvplan.measure.plan import MeasureRequest

sys.path.insert(0, str(Path(__file__).parent))
from chromium import Browser, find_chromium, open_chromium

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "profiles" / "measurements"
DATE = "2026-11-24"
CHAT = {"model": "70b", "gpu": "h200", "tp_size": 4, "context_tokens": "32k", "concurrency": 64,
        "kv_cache_dtype": "fp8", "date": DATE}  # fmt: skip
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e`|*_\"'&\n# " + "x" * 300


@pytest.fixture(scope="session")
def chat() -> Report:
    """Llama 70B in fp8 KV on four H200: 64 users at 32k fit, 73 would."""
    return kvplan.report(**CHAT)


@pytest.fixture(scope="session")
def hostile() -> Report:
    """The same under a name that is markup."""
    return kvplan.report(**CHAT, name=HOSTILE)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; tests that need one skip where there is none."""
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser (apt-get install chromium)")
    with open_chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``kvplan measure`` on an H200, put together from the records that ship: kernels and whole 8B steps."""
    folder = tmp_path_factory.mktemp("runs") / "h200"
    folder.mkdir()
    samples = RECORDS / "h200-measure-2026-11-24.jsonl"
    shutil.copy(samples, folder / "samples.jsonl")
    shutil.copy(RECORDS / "h200-steps-2026-11-24.jsonl", folder / "steps.jsonl")
    environment = json.loads(samples.read_text().splitlines()[0])["environment"]
    (folder / "environment.json").write_text(
        json.dumps({**environment, "kind": "cuda", "time": "2026-11-23T23:18:11Z"})
    )
    request = MeasureRequest((Shape(32, 8, 128),), ("bf16", "fp8"), (8, 32), (8192,), "quick", "cuda", model="8b")
    (folder / "request.json").write_text(json.dumps(request.as_dict()))
    return folder
