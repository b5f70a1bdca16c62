"""``kvplan itl --explain``: the parts are those of the deployment at hand, and multiply out."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from support import Ran

from kvplan.gpu import resolve_gpu

LINKS = {"l40s": "PCIe", "rtx-4090": "PCIe", "mi300x": "xGMI", "h100": "NVLink", "b200": "NVLink"}
COLLECTIVES = re.compile(
    r"collectives +([\d.]+) (ms|µs)  (\d+) all-reduces over (\w+): ([\d.]+) µs each and ([\d.]+) µs of data"
)


@pytest.mark.parametrize(("gpu", "link"), LINKS.items())
def test_collectives_run_over_the_gpus_own_link_and_add_up(kvplan_cli: Callable[..., Ran], gpu: str, link: str):
    """160 all-reduces of a Llama 70B (2 a layer), each its latency and its data, are the line's total."""
    out = kvplan_cli("itl", "--model", "70b", "--gpu", gpu, "--tp", "8", "--ctx", "8k", "--batch", "8", "--explain",
                     width=120).out  # fmt: skip
    found = COLLECTIVES.search(out)
    assert found is not None and (found[3], found[4]) == ("160", link)
    total_us = float(found[1]) * (1000 if found[2] == "ms" else 1)
    assert 160 * (float(found[5]) + float(found[6])) == pytest.approx(total_us, rel=0.02)  # each is rounded to 0.1 µs
    assert {"PCIe": "pcie", "xGMI": "xgmi", "NVLink": "nvlink"}[link] == resolve_gpu(gpu).link_kind
    assert link == "NVLink" or "NVLink" not in out


def test_a_fraction_that_leaves_activations_no_room_quotes_no_line(kvplan_cli: Callable[..., Ran]):
    out = kvplan_cli("itl", "--model", "8b", "--gpu", "h100", "--engine", "sglang", "--ctx", "8k", "--batch", "30",
                     "--mem-fraction-static", "0.99").out  # fmt: skip
    assert "does not fit: with --mem-fraction-static 0.99, 773.1 MiB are missing on each GPU" in " ".join(out.split())


def test_one_gpu_has_no_collectives(kvplan_cli: Callable[..., Ran]):
    out = kvplan_cli("itl", "--model", "8b", "--gpu", "h100", "--ctx", "8k", "--explain").out
    assert "one GPU: none" in out and "a collective" not in out
