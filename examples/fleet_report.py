"""A fleet report: a page for each deployment of a scenario file and an index, in HTML and Markdown.

Run: python examples/fleet_report.py [SCENARIO.yaml] [FOLDER]
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import kvplan

SCENARIO = """\
engine: vllm
gpu: h200
deployments:
  - {name: chat, model: 70b, tp: 4, ctx: 32k, concurrency: 64, kv_cache_dtype: fp8}
  - {name: code, model: qwen3-32b, tp: 2, isl: 12k, osl: 4k, concurrency: 24}
  - {name: long documents, model: gpt-oss-120b, tp: 2, ctx: 128k, concurrency: 16}
"""


def main(scenario: str = "fleet.yaml", folder: str = "fleet") -> None:
    path = Path(scenario)
    if not path.exists():
        path.write_text(SCENARIO)
        print(f"wrote {path}: change it and run again")
    found = kvplan.fleet(path, Path(folder), formats=("html", "md"), force=True)
    for entry in found.entries:
        print(f"{entry.name}: {entry.headline or entry.problem}")
    print(f"{found.num_gpus} GPUs for {found.num_users} users; open {Path(folder) / 'index.html'}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly under `| head`
    main(*sys.argv[1:])
