"""A file is replaced whole or not at all, and nothing is left beside it."""

import os
from pathlib import Path

import pytest

from models.files import write, write_all


def test_it_replaces_a_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    write(target, "ä")
    write(target, b"second")
    assert target.read_bytes() == b"second"
    assert [it.name for it in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_failure_leaves_the_old_file_and_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "page.html"
    write(target, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "replace")}[step], full)
    with pytest.raises(OSError, match=r"No space left on device: .*page\.html"):
        write(target, "new")
    assert target.read_text() == "old"
    assert [it.name for it in tmp_path.iterdir()] == ["page.html"]


def test_of_several_files_all_are_on_the_disk_before_the_first_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {tmp_path / "moments": b"1", tmp_path / "rows": b"2"}
    done: list[str] = []
    fsync = os.fsync

    def full_at_the_second(descriptor: int) -> None:
        done.append("fsync")
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_at_the_second)
        with pytest.raises(OSError, match=r"No space left on device: .*rows"):
            write_all(contents)
    assert list(tmp_path.iterdir()) == []
    write_all(contents)
    assert {it: it.read_bytes() for it in tmp_path.iterdir()} == contents


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        write(tmp_path / "nowhere" / "page.html", "x")
