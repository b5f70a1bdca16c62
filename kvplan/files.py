"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from kvplan.errors import InputError, reason


def write_text(path: Path, text: str, force: bool) -> None:
    """Write ``text`` to ``path`` through a temporary file beside it, in a folder that is made when absent.

    What is no character (a byte of a file name, maybe) is written as a question mark.

    Raises:
        InputError: the file exists and ``force`` is not given, it is a device or a folder, or it cannot be written.

    """
    if path.exists() and not force:
        raise InputError(f"{path} exists", hint="choose another name or add --force")
    if path.exists() and not path.is_file():  # a device or a folder would not be written but replaced
        raise InputError(f"{path} is no file", hint="name a file")
    target = Path(os.path.realpath(path))  # of a link, the file that it leads to
    _make(path.parent)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})", code="cannot_write") from error


def refuse_shared(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Hold what is written apart from what is read, and from each other, by whatever name or link each is given.

    Raises:
        InputError: an output is one of the inputs, or another output.

    """
    seen = {os.path.realpath(path) for path in inputs if path is not None}
    for path in outputs:
        target = os.path.realpath(path)
        if target in seen:
            raise InputError(f"{path} is named twice", hint="what is written takes a name of its own")
        seen.add(target)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({reason(error)})") from error
