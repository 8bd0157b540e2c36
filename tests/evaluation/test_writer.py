import threading
from concurrent.futures import wait

import pytest
from PIL import Image

from evaluation import writer
from evaluation.stamps import is_current
from evaluation.writer import BackgroundWriter


@pytest.fixture
def picture():
    return Image.new("RGB", (4, 4), "red")


def test_all_that_was_given_is_on_disk_with_its_stamp(tmp_path, picture):
    background = BackgroundWriter(waiting=2)
    for i in range(5):
        background.write(tmp_path / f"{i}.png", picture, {"seed": i}, {})
    background.finish()
    assert all(is_current(tmp_path / f"{i}.png", {"seed": i}) for i in range(5))


def test_no_more_are_held_than_allowed(tmp_path, picture, monkeypatch):
    let_go, written = threading.Event(), []
    monkeypatch.setattr(writer, "write_picture", lambda path, *rest: let_go.wait(10) and written.append(path.name))
    background = BackgroundWriter(waiting=2)
    background.write(tmp_path / "a", picture, {}, {})
    background.write(tmp_path / "b", picture, {}, {})
    assert not written, "neither was waited for"
    let_go.set()
    background.write(tmp_path / "c", picture, {}, {})
    assert written[0] == "a"
    background.finish()
    assert written == ["a", "b", "c"]


@pytest.mark.parametrize("more", [0, 3])
def test_an_error_is_raised_by_a_later_picture_or_at_the_end(tmp_path, picture, monkeypatch, more):
    def full(path, *rest):
        raise OSError(f"{path.name} could not be written")

    monkeypatch.setattr(writer, "write_picture", full)
    with pytest.raises(OSError, match="a could not be written"):
        write_all(BackgroundWriter(waiting=1), [tmp_path / name for name in "abcd"[: 1 + more]], picture)


@pytest.mark.parametrize("finishes", [False, True])
def test_the_first_call_after_an_error_raises_it(tmp_path, picture, monkeypatch, finishes):
    asked = []

    def full(path, *rest):
        asked.append(path.name)
        raise OSError("no space left")

    monkeypatch.setattr(writer, "write_picture", full)
    background = BackgroundWriter()
    background.write(tmp_path / "a", picture, {}, {})
    wait(background.pending)
    with pytest.raises(OSError, match="no space left"):
        background.finish() if finishes else background.write(tmp_path / "b", picture, {}, {})
    background.finish()
    assert asked == ["a"]


def test_what_waits_behind_an_error_is_not_written(tmp_path, picture, monkeypatch):
    given, let_go, written = threading.Event(), threading.Event(), []

    def write(path, *rest):
        if path.name == "a":
            given.wait(10)
            raise OSError("no space left")
        let_go.wait(10)  # the thread may have begun b before anyone has seen a's error
        written.append(path.name)

    monkeypatch.setattr(writer, "write_picture", write)
    background = BackgroundWriter()
    for name in "abc":
        background.write(tmp_path / name, picture, {}, {})
    background.pending[-1].add_done_callback(lambda _: let_go.set())
    given.set()
    with pytest.raises(OSError, match="no space left"):
        background.finish()
    assert "c" not in written


def write_all(background, paths, picture):
    for path in paths:
        background.write(path, picture, {}, {})
    background.finish()
