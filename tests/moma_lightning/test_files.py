"""Files are there whole or not at all, and errors say what they are of."""

import errno

import pytest
import torch

from moma_lightning.files import write_beside


def test_a_file_is_renamed_into_its_place_and_nothing_is_left_beside_it(tmp_path):
    write_beside(tmp_path / "deep/a.txt", lambda path: path.write_text("one"))
    write_beside(tmp_path / "deep/a.txt", lambda path: path.write_text("two"))
    assert [(path.name, path.read_text()) for path in (tmp_path / "deep").iterdir()] == [("a.txt", "two")]


@pytest.mark.parametrize(("raised", "why"), [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (RuntimeError("PytorchStreamWriter failed\nand more"), "PytorchStreamWriter failed"),
    (RuntimeError(), ""),
])  # fmt: skip
def test_a_disk_that_fails_is_told_with_the_files_name(tmp_path, raised, why):
    (tmp_path / "a.txt").write_text("before")

    def half(path):
        path.write_text("half")
        raise raised

    with pytest.raises(OSError, match=rf"a.txt was not written \({why}\); a file of that name from before is unchanged"):
        write_beside(tmp_path / "a.txt", half)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


@pytest.mark.parametrize("raised", [OSError("o/model is not a repository"), FileNotFoundError("o/model could not be loaded"), ValueError("bad"),
                                    torch.OutOfMemoryError("CUDA out of memory"), NotImplementedError("no kernel")])  # fmt: skip
def test_what_is_not_of_the_disk_is_raised_as_it_is(tmp_path, raised):
    """Work may be done while a file is written: a captioner's error is no full disk."""
    def half(path):
        path.write_text("half")
        raise raised

    with pytest.raises(type(raised)) as error:
        write_beside(tmp_path / "a.txt", half)
    assert error.value is raised and not list(tmp_path.iterdir())
