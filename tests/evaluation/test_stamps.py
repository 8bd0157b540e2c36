from PIL import Image

from evaluation.stamps import is_current, write_picture


def test_an_option_that_was_not_there_yet_is_as_one_at_none(tmp_path):
    write_picture(tmp_path / "a.png", Image.new("RGB", (4, 4), "red"), {"method": {"beta": 1.0}, "seed": 3}, {})
    assert is_current(tmp_path / "a.png", {"method": {"beta": 1.0, "scheduler": None}, "seed": 3})
    assert not is_current(tmp_path / "a.png", {"method": {"beta": 1.0, "scheduler": "UniPCMultistepScheduler"}, "seed": 3})
