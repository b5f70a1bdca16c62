"""From what a user typed after ``--model`` to a ``ModelConfig``.

Order: a path that exists; a bundled profile's name or alias; a Hugging Face id, looked for in the local hub cache, then
among the bundled profiles, then on the hub when ``huggingface_hub`` is installed and ``HF_HUB_OFFLINE`` is not set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvplan import profiles
from kvplan.errors import ConfigError, InputError, UnknownNameError, reason, shorten
from kvplan.model_config.reader import read_model_config
from kvplan.model_config.safetensors import read_exact_weights
from kvplan.model_config.types import ModelConfig

MAX_CONFIG_BYTES = 64 * 1024 * 1024
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}$")
_HUB_FILES = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")


def resolve_model(reference: str) -> ModelConfig:
    """The model a name, alias, hub id, folder or config.json stands for.

    Raises:
        UnknownNameError: nothing of that name; carries the closest names.
        ConfigError: a file was found and cannot be planned from.

    """
    if not isinstance(reference, str) or not reference.strip():
        raise InputError("no model given", hint="--model takes a name (70b), a hub id, a folder or a config.json")
    named = reference.strip()
    return _resolve(named, os.environ.get("HF_HOME", ""), os.environ.get("HF_HUB_CACHE", ""), _stamp(named))


def _stamp(reference: str) -> tuple[str | int, ...]:
    """Where a file or folder lies and when it was written, so that a changed one is read anew; empty for a name."""
    path = Path(os.path.expanduser(reference))
    if not _exists(path):
        return ()
    folder = path if path.is_dir() else path.parent
    files = (path, *(folder / name for name in _HUB_FILES))
    return (str(path.absolute()), *(file.stat().st_mtime_ns if _exists(file) else 0 for file in files))


@lru_cache(maxsize=512)
def _resolve(reference: str, hf_home: str, hf_hub_cache: str, stamp: tuple[str | int, ...]) -> ModelConfig:
    looks_like_path = reference.startswith((".", "/", "~", "\\")) or reference.endswith(".json") or os.sep in reference
    path = Path(os.path.expanduser(reference))
    if looks_like_path and _exists(path):
        return _from_path(path, reference)
    profile = profiles.find("models", reference)
    if _HUB_ID.match(reference):
        cached = _hub_cache_folder(reference)
        if cached is not None:
            return _from_path(cached, reference)
        if profile is not None:
            return from_profile(profile)
        return _from_path(_download(reference), reference)
    if profile is not None:
        return from_profile(profile)
    if _exists(path):
        return _from_path(path, reference)
    if looks_like_path:
        raise ConfigError(
            f"{shorten(reference)}: no such file or folder",
            hint="--model takes a config.json, a folder that holds one, a name such as 70b, or a hub id",
        )
    raise UnknownNameError("model", reference, profiles.index("models"), hint="`kvplan models` lists the bundled ones")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def from_profile(name: str) -> ModelConfig:
    """The bundled model profile called ``name`` (its exact name)."""
    data = profiles.load("models", name)
    return read_model_config(
        data["config"],
        where=f"profile {name}",
        name=name,
        source=f"bundled profile {name} ({data['source']})",
        hf_quant=data.get("hf_quant_config"),
    )


def _from_path(path: Path, reference: str) -> ModelConfig:
    folder = path if path.is_dir() else path.parent
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file}: no such file", hint="a model folder must hold a config.json")
    data = read_json_object(file)
    quant_file = folder / "hf_quant_config.json"
    quant = read_json_object(quant_file) if quant_file.is_file() else None
    own = folder.name if file.name == "config.json" else file.name
    shown = reference if _HUB_ID.match(reference) else (own or reference)
    return read_model_config(
        data,
        where=str(file),
        name=shown,
        source=str(file),
        hf_quant=quant,
        exact_weights=read_exact_weights(folder) if file.name == "config.json" else None,
    )


def read_json_object(path: Path) -> Mapping[str, Any]:
    """A file that must hold one JSON object.

    Raises:
        ConfigError: unreadable, too large, not JSON, or not an object.

    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_CONFIG_BYTES // 2**20} MiB, which no config.json is")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        what = "is not text" if isinstance(error, UnicodeDecodeError) else "is not JSON"
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{path}: {what}{where}", hint="is the download complete?") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(data).__name__}")
    return data


def hub_cache_root() -> Path:
    """Where ``huggingface_hub`` keeps snapshots: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    explicit = os.environ.get("HF_HUB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hub"


def _hub_cache_folder(hub_id: str) -> Path | None:
    """The newest cached snapshot of ``hub_id`` that holds a config.json, or None."""
    repo = hub_cache_root() / f"models--{hub_id.replace('/', '--')}"
    try:
        ref = (repo / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError, ValueError):
        ref = ""
    if ref and "/" not in ref and (repo / "snapshots" / ref / "config.json").is_file():
        return repo / "snapshots" / ref
    found = sorted(repo.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def _download(hub_id: str) -> Path:
    """Fetch the small JSON files of ``hub_id`` into the hub cache and return their folder."""
    tried = [f"the local hub cache ({hub_cache_root()})", "the bundled profiles"]
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    help_offline = "copy its config.json here and pass --model ./config.json, or use a bundled name (`kvplan models`)"
    if offline:
        raise _unreachable(hub_id, [*tried, "not the hub: HF_HUB_OFFLINE is set"], help_offline)
    try:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from huggingface_hub import hf_hub_download
    except ImportError:
        hint = f"pip install 'kvplan[hub]' to fetch from the hub, or {help_offline}"
        raise _unreachable(hub_id, [*tried, "not the hub: huggingface_hub is not installed"], hint) from None
    problem = _hub_problem()
    if problem is not None:
        raise _unreachable(hub_id, [*tried, f"the hub ({problem})"], help_offline)
    import logging

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    folder: Path | None = None
    for name in _HUB_FILES:
        try:
            folder = Path(hf_hub_download(hub_id, name, etag_timeout=5)).parent
        except Exception as error:  # the library raises its own, requests', httpx's and OS errors
            if name == "config.json":
                lines = str(error).splitlines() or [""]
                reason = shorten(f"{type(error).__name__}: {lines[0]}", 120)
                raise _unreachable(hub_id, [*tried, f"the hub ({reason})"], help_offline) from error
    assert folder is not None
    return folder


def _hub_problem() -> str | None:
    """Why the hub cannot be reached, found out in seconds; None when it answers, or when a proxy decides."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "huggingface.co", port), timeout=5).close()
    except OSError as error:
        return f"no connection to {parts.hostname}: {error.strerror or error}"
    return None


def _unreachable(hub_id: str, tried: list[str], hint: str) -> InputError:
    close = UnknownNameError("model", hub_id, profiles.index("models")).closest
    suggestion = f"closest bundled: {', '.join(close)}; " if close else ""
    return InputError(f"no config for {shorten(hub_id)!r}; looked in {'; '.join(tried)}", hint=suggestion + hint,
                      code="unknown_name")  # fmt: skip
