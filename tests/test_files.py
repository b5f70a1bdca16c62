"""A file is written whole, where it was asked for, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvplan.errors import InputError
from kvplan.files import refuse_shared, write_text


def test_a_file_that_exists_is_replaced_only_when_that_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "first", force=False)
    with pytest.raises(InputError, match="exists"):
        write_text(path, "second", force=False)
    assert path.read_text() == "first"
    write_text(path, "second", force=True)
    assert path.read_text() == "second" and [each.name for each in path.parent.iterdir()] == ["a.txt"]


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    """Putting a file in its place would take a pipe, a device or a folder away."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(InputError, match=f"{name} is no file"):
            write_text(tmp_path / name, "text", force=True)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir() and (tmp_path / "link").is_symlink()


def test_through_a_link_the_file_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("first")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "second", force=True)
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "second"


def test_a_text_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("first")

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"a\.txt: cannot be written \(No space left on device\)"):
        write_text(tmp_path / "a.txt", "second", force=True)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.txt", "first")]


def test_an_output_is_no_input_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text("samples")
    (tmp_path / "link.csv").symlink_to("in.csv")
    for name in ("in.csv", "./in.csv", str(tmp_path / "in.csv"), "link.csv"):
        with pytest.raises(InputError, match=r"in\.csv is named twice|link\.csv is named twice"):
            refuse_shared([Path(name)], [None, Path("in.csv")])
    with pytest.raises(InputError, match="out is named twice"):
        refuse_shared([Path("out"), Path("./out")], [])
    refuse_shared([Path("out"), Path("other")], [None, Path("in.csv")])
