import os

import pytest
from PIL import Image

from evaluation.stamps import is_current, load_pictures, write_picture


def test_an_option_that_was_not_there_yet_is_as_one_at_none(tmp_path):
    write_picture(tmp_path / "a.png", Image.new("RGB", (4, 4), "red"), {"method": {"beta": 1.0}, "seed": 3}, {})
    assert is_current(tmp_path / "a.png", {"method": {"beta": 1.0, "scheduler": None}, "seed": 3})
    assert not is_current(tmp_path / "a.png", {"method": {"beta": 1.0, "scheduler": "UniPCMultistepScheduler"}, "seed": 3})


def test_a_picture_does_not_wait_for_the_disk_and_an_empty_one_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: pytest.fail("thousands of small pictures must not wait for the disk"))
    write_picture(tmp_path / "a.png", Image.new("RGB", (4, 4)), {"seed": 3}, {})
    assert is_current(tmp_path / "a.png", {"seed": 3})
    for damage in (b"", b"\xff\xfe\x80", b"[]"):  # as a power cut may leave it
        (tmp_path / "a.json").write_bytes(damage)
        assert not is_current(tmp_path / "a.png", {"seed": 3})
    write_picture(tmp_path / "a.png", Image.new("RGB", (4, 4)), {"seed": 3}, {})
    (tmp_path / "a.png").write_bytes(b"")
    assert not is_current(tmp_path / "a.png", {"seed": 3})


def test_a_picture_of_weights_whose_commit_nobody_knows_here_is_as_it_was(tmp_path):
    """As where it is scored on a machine without them; its prompt is compared to the letter."""
    made = {"weights": {"adapter": "o/m@main (abc)", "decoder": None}, "task": {"prompt": "a cat (red)"}}
    write_picture(tmp_path / "a.png", Image.new("RGB", (4, 4)), made, {})
    for adapter, is_same in (("o/m@main (abc)", True), ("o/m@main", True), ("o/m@abc", True), ("o/m@main (def)", False), ("o/n@main", False)):
        assert is_current(tmp_path / "a.png", made | {"weights": {"adapter": adapter, "decoder": None}}) is is_same
    assert not is_current(tmp_path / "a.png", made | {"task": {"prompt": "a cat"}})


def test_pictures_are_read_in_order_by_several_threads_and_a_cut_one_is_named(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    assert [picture.getpixel((0, 0))[0] for picture in load_pictures(paths, threads=4)] == list(range(20))
    assert load_pictures([], threads=4) == []
    paths[7].write_bytes(paths[7].read_bytes()[:40])
    with pytest.raises(OSError, match=r"/7\.png is not a whole picture"):
        load_pictures(paths, threads=4)
