"""A measured choice among the few configurations of a shape, remembered on disk by GPU and versions.

The file is one JSON object; a key names the GPU, the versions and the shape, so another GPU or another Triton measures
anew. A file that cannot be read counts as empty. `KVPLAN_CACHE_DIR` moves it.
"""

import functools
import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

from ..configs import Config
from ..device import architecture
from .decode_attention import DecodeCell, measure

MEASURED_TOKENS = 1 << 20
"""Tokens of the cell that configurations are compared on: 2 GB of 8-bit KV for 8 heads of 128."""
CLEARLY_FASTER = 0.99
"""The default stays unless another takes at most this share of its time: below that lies the spread between runs."""


def cache_file() -> Path:
    """Where choices are kept."""
    base = os.environ.get("KVPLAN_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "kvplan"
    )
    return Path(base) / "kernel-choices.json"


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, choices: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(choices, indent=1, sort_keys=True), encoding="utf-8")
    fresh.replace(path)


@functools.cache
def _kernels() -> str:
    """Digest of the kernels' source: a choice among other kernels says nothing."""
    files = sorted((Path(__file__).parents[1] / "decode_attention").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def choice_key(cell: DecodeCell, gpu: str) -> str:
    """What a choice depends on: GPU, versions, kernels, format, scales, layout, block size, head_dim, group."""
    parts = (gpu, torch.__version__, triton.__version__, _kernels(), cell.kv_dtype, cell.scale_granularity, cell.layout)
    shape = cell.shape
    return " ".join(map(str, (*parts, shape.block_size_tokens, shape.head_dim, shape.group_size, shape.one_sequence)))


def default(cell: DecodeCell, device: str = "cuda") -> Config:
    """The configuration of a plan for `cell` that is told none."""
    return cell.shape.configs(architecture(device))[0]


def is_default(cell: DecodeCell, device: str = "cuda") -> bool:
    """Whether `cell` is of a batch that has the configuration a plan takes unless told: what gates compare first."""
    return not cell.shape.one_sequence and cell.config == default(cell, device)


def choose(cell: DecodeCell, *, device: str = "cuda", time_cell=measure) -> Config:
    """The fastest of at most four configurations for cells like `cell`: remembered, or measured now and remembered.

    `time_cell(cell, samples=..., device=...)` returns a record with `time_s`; it is `measure` but for tests.
    """
    candidates = cell.shape.configs(architecture(device))
    if len(candidates) == 1:
        return candidates[0]
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
    key, path = choice_key(cell, gpu), cache_file()
    choices = _read(path)
    known = {json.dumps(asdict(c), sort_keys=True): c for c in candidates}
    if choices.get(key) in known:
        return known[choices[key]]
    sequences = 1 if cell.shape.one_sequence else 16
    probe = replace(cell, seq_lens=(MEASURED_TOKENS // sequences,) * sequences, num_chunks=None)
    times = {
        text: time_cell(replace(probe, config=config), samples=15, device=device)["time_s"]
        for text, config in known.items()
    }
    default, best = next(iter(times)), min(times, key=lambda text: times[text])
    if times[best] > times[default] * CLEARLY_FASTER:
        best = default
    _write(path, {**_read(path), key: best})
    return known[best]
