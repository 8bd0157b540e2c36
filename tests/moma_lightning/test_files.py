"""Files are there whole or not at all, and errors say what they are of."""

import errno
import os
from pathlib import Path

import pytest
import torch

from moma_lightning.files import commit, place_beside, write_beside


def test_a_file_is_renamed_into_its_place_and_nothing_is_left_beside_it(tmp_path):
    write_beside(tmp_path / "deep/a.txt", lambda path: path.write_text("one"))
    write_beside(tmp_path / "deep/a.txt", lambda path: path.write_text("two"))
    assert [(path.name, path.read_text()) for path in (tmp_path / "deep").iterdir()] == [("a.txt", "two")]


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """What was put on the disk and what was renamed, in their order."""
    seen, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{number}')).name}") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda source, target: seen.append(f"rename to {Path(target).name}") or replace(source, target))
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, order):
    write_beside(tmp_path / "a.txt", lambda path: path.write_text("one"))
    assert order[0].startswith("sync .a.") and order[1:] == ["rename to a.txt", f"sync {tmp_path.name}"]


def test_a_folders_files_are_on_the_disk_before_it_has_its_name(tmp_path, order):
    (tmp_path / ".new/deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt"):
        (tmp_path / ".new" / name).write_text(name)
    commit(tmp_path / ".new", tmp_path / "folder")
    assert sorted(order[:-2]) == ["sync .new", "sync a.txt", "sync b.txt", "sync deep"] and order[-2:] == ["rename to folder", f"sync {tmp_path.name}"]
    assert (tmp_path / "folder/deep/b.txt").read_text() == "deep/b.txt"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    for name in (".masks.there.7.writing", ".masks.writing", ".other.there.7.writing"):
        (tmp_path / name).mkdir()
    (tmp_path / ".masks.here.8.writing").write_text("a file")
    (tmp_path / "masks").mkdir()
    beside = place_beside(tmp_path / "masks")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.there.7.writing", "masks"]
    assert str(os.getpid()) in beside.name and not beside.exists()


def test_a_disk_that_says_late_that_it_is_full_leaves_the_file_from_before(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.txt").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a.txt was not written \(No space left on device\)"):
        write_beside(tmp_path / "a.txt", lambda path: path.write_text("after"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


@pytest.mark.parametrize(("raised", "why"), [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (RuntimeError("PytorchStreamWriter failed\nand more"), "PytorchStreamWriter failed"),
    (RuntimeError(), ""),
])
def test_a_disk_that_fails_is_told_with_the_files_name(tmp_path, raised, why):
    (tmp_path / "a.txt").write_text("before")

    def half(path):
        path.write_text("half")
        raise raised

    with pytest.raises(OSError, match=rf"a.txt was not written \({why}\); a file of that name from before is unchanged"):
        write_beside(tmp_path / "a.txt", half)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


@pytest.mark.parametrize("raised", [OSError("o/model is not a repository"), FileNotFoundError("o/model could not be loaded"), ValueError("bad"),
                                    torch.OutOfMemoryError("CUDA out of memory"), NotImplementedError("no kernel")])
def test_what_is_not_of_the_disk_is_raised_as_it_is(tmp_path, raised):
    """Work may be done while a file is written: a captioner's error is no full disk."""
    def half(path):
        path.write_text("half")
        raise raised

    with pytest.raises(type(raised)) as error:
        write_beside(tmp_path / "a.txt", half)
    assert error.value is raised and not list(tmp_path.iterdir())
