"""Weight bytes of a checkpoint, read from safetensors headers or from the index, never from the tensors themselves.

A safetensors file starts with a little-endian u64, the length of a JSON header that gives each tensor's byte range
(format: https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from kvplan.errors import ConfigError
from kvplan.model_config.types import ExactWeights

MAX_HEADER_BYTES = 100_000_000
NARROWED = {"F32": 2, "F64": 4}
"""How many times smaller the values of a dtype are in 16 bits."""
INDEX_NAME = "model.safetensors.index.json"


def read_exact_weights(folder: Path) -> ExactWeights | None:
    """Weight bytes of the checkpoint in ``folder``: headers when every shard is there, else the index's total.

    Raises:
        ConfigError: a header or the index is corrupt.

    """
    index = folder / INDEX_NAME
    shards = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not index.is_file():
        return _from_headers(folder, shards) if shards else None
    total, expected = _read_index(index)
    if shards and {path.name for path in shards} >= expected:
        return _from_headers(folder, [path for path in shards if path.name in expected])
    return None if total is None else ExactWeights(total, str(index))


def _read_index(path: Path) -> tuple[int | None, set[str]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as a safetensors index ({type(error).__name__})") from error
    if not isinstance(data, dict) or not isinstance(data.get("weight_map", {}), dict):
        raise ConfigError(f"{path}: is not a safetensors index")
    metadata = data.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or not 0 < total < 2**60):
        raise ConfigError(f"{path}: metadata.total_size must be a number of bytes")
    return total, {name for name in data.get("weight_map", {}).values() if isinstance(name, str)}


def _from_headers(folder: Path, shards: list[Path]) -> ExactWeights:
    tensors = tuple(tensor for shard in shards for tensor in _read_header(shard))
    total = sum(size for _, size, _ in tensors)
    return ExactWeights(total, f"{folder} ({len(shards)} safetensors headers)", tensors)


def _read_header(path: Path) -> list[tuple[str, int, int]]:
    """Name, bytes, and bytes with 16 bits a value at most of each tensor of one file."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (MAX_HEADER_BYTES + 1,)
            if length > MAX_HEADER_BYTES:
                raise ConfigError(f"{path}: is not a safetensors file (truncated, or a header of {length:,} bytes)")
            header = json.loads(file.read(length))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: its safetensors header cannot be read ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: its safetensors header is not an object")
    sizes = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(isinstance(o, int) and not isinstance(o, bool) for o in offsets)
            or not 0 <= offsets[0] <= offsets[1]
        ):
            raise ConfigError(f"{path}: tensor {name[:80]!r} has no valid data_offsets")
        size = offsets[1] - offsets[0]
        sizes.append((name, size, size // NARROWED.get(str(entry.get("dtype")), 1)))
    return sizes
