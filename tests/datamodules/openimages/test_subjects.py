"""Pictures and masks: each bad one under its own name, odd ones made plain, both turned upright together."""

import io
import json
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from miniature_bucket import encode
from PIL import Image

from datamodules.openimages.build import build
from datamodules.openimages.config import SelectConfig, ShardConfig
from datamodules.openimages.sources import Sources
from datamodules.openimages.subjects import RejectedError, Subject, fit_mask, largest, read_picture, read_subject
from tests.datamodules.openimages.conftest import samples_of


def animated() -> bytes:
    frames = [Image.new("RGB", (96, 96), c) for c in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def huge() -> bytes:
    """A PNG whose header says 30,000 x 30,000."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)) + \
        chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_pictures_and_masks_each_count_under_their_name(miniature, built):
    ids, masks = miniature.ids, list(miniature.masks)
    good = Image.open(io.BytesIO(miniature.pictures[ids[0]]))
    miniature.pictures |= {
        ids[0]: miniature.pictures[ids[0]][:-400], ids[1]: animated(), ids[2]: huge(), ids[3]: b"<html>not found</html>",
        ids[4]: encode(good.resize((20, 20)), "JPEG"), ids[5]: encode(good.resize((96, 40)), "JPEG"),
    }
    del miniature.pictures[ids[6]], miniature.masks[masks[7]]
    miniature.masks[masks[8]] = miniature.masks[masks[8]][:40]
    miniature.row("metadata", ids[9])["OriginalMD5"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    miniature.captions[ids[10]] = b"caf\xe9"
    assert built() == {"masks": 12, "picture_broken": 2, "picture_animated": 1, "picture_too_large": 1, "picture_too_small": 1, "mask_misfit": 1,
                       "picture_missing": 1, "mask_missing": 1, "mask_broken": 1, "picture_checksum": 1, "caption_not_utf8": 1, "triplets": 1}


@pytest.mark.parametrize(("change", "note"), [
    (lambda p: encode(p.convert("CMYK"), "JPEG"), "mode CMYK"),
    (lambda p: encode(Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) * 257)), "mode I;16, format PNG"),
    (lambda p: encode(p.convert("L"), "JPEG"), "mode L"),
    (lambda p: encode(p.resize((2000, 1500)), "JPEG"), "scaled"),
    (lambda p: encode(p, "MPO", save_all=True, append_images=[Image.new("RGB", p.size)]), "format MPO"),
])
def test_odd_pictures_become_plain_ones(change, note):
    picture = Image.fromarray((np.indices((96, 128)).sum(0)[..., None] * np.array([1, 0.6, 0.9])).astype(np.uint8))
    read = read_picture(change(picture), None, SELECT, ShardConfig())
    upright = Image.open(io.BytesIO(read.content))
    assert read.note == note and upright.mode == "RGB" and upright.format == "JPEG" and max(upright.size) <= 1024
    seen = np.asarray(upright.resize((128, 96)).convert("L"), float)
    assert np.abs(seen - np.asarray(picture.convert("L"), float)).mean() < 6


def cornered(size=(64, 96)) -> Image.Image:
    """Grey, with its top left corner white."""
    image = Image.new("RGB", size, (90, 90, 90))
    image.paste("white", (0, 0, 20, 30))
    return image


SELECT = SelectConfig(min_side=32)


def white_share(picture: bytes, mask: bytes) -> float:
    """How much of what the mask covers is white."""
    pixels, inside = np.asarray(Image.open(io.BytesIO(picture)).convert("L")), np.asarray(Image.open(io.BytesIO(mask))) > 0
    return (pixels[inside] > 170).mean()


@pytest.mark.parametrize("rotation", [None, 0.0, 90.0, 180.0, 270.0])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_and_mask_turn_together(rotation, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    mask = Image.new("L", (64, 96))
    mask.paste(255, (0, 0, 20, 30))
    read = read_picture(encode(cornered(), "JPEG", exif=exif), rotation, SELECT, ShardConfig())
    fitted = fit_mask(encode(mask.resize((32, 48), 0)), read, SELECT)
    assert Image.open(io.BytesIO(fitted)).size == Image.open(io.BytesIO(read.content)).size == read.size
    assert Image.open(io.BytesIO(fitted)).mode == "1"
    assert white_share(read.content, fitted) > 0.9
    assert Image.open(io.BytesIO(read.content)).getexif().get(0x0112, 1) == 1


def test_rotation_is_counter_clockwise():
    read = read_picture(encode(cornered(), "JPEG"), 90.0, SELECT, ShardConfig())
    pixels = np.asarray(Image.open(io.BytesIO(read.content)).convert("L"))
    assert read.size == (96, 64) and pixels[-5, 5] > 200 and pixels[5, 5] < 120  # top left goes to bottom left


def test_a_picture_is_turned_once():
    """Where the metadata's rotation and the file's EXIF say the same."""
    exif = Image.Exif()
    exif[0x0112] = 6
    both, plain = (read_picture(encode(cornered(), "JPEG", **said), 90.0, SELECT, ShardConfig()) for said in ({"exif": exif}, {}))
    assert (both.size, both.content) == (plain.size, plain.content)


def test_the_box_is_the_subjects_in_the_upright_picture(miniature, config_of, tmp_path):
    ids, exif = miniature.ids, Image.Exif()
    for image_id, degrees in zip(ids, (90.0, 180.0, 270.0), strict=False):
        miniature.row("metadata", image_id)["Rotation"] = degrees
    exif[0x0112] = 6
    miniature.pictures[ids[3]] = encode(Image.open(io.BytesIO(miniature.pictures[ids[3]])), "JPEG", exif=exif)
    config = config_of(miniature.write(tmp_path / "bucket"))
    build(config)
    for sample in samples_of(config):
        mask = Image.open(io.BytesIO(sample["mask.png"]))
        left, top, right, bottom = mask.getbbox()
        edges = np.array([left, right, top, bottom]) / np.array([mask.width, mask.width, mask.height, mask.height])
        assert np.abs(json.loads(sample["json"])["box"] - edges).max() < 0.03  # masks are smaller than the pictures
    assert json.loads((Path(config.out) / "manifest.json").read_text())["train"]["notes"] == {
        "exif 6": 1, "rotation 180": 1, "rotation 270": 1, "rotation 90": 1}


def test_a_mask_drawn_on_the_picture_as_exif_turns_it_fits():
    exif = Image.Exif()
    exif[0x0112] = 6
    read = read_picture(encode(cornered(), "JPEG", exif=exif), None, SELECT, ShardConfig())
    mask = Image.new("L", (96, 64))
    mask.paste(255, (66, 0, 96, 20))  # top right, where orientation 6 puts the corner
    assert white_share(read.content, fit_mask(encode(mask), read, SELECT)) > 0.9


@pytest.mark.parametrize(("tolerance", "fits"), [(0.05, False), (0.2, True)])
def test_how_far_a_masks_shape_may_be_from_its_pictures_is_the_configs(tolerance, fits):
    read = read_picture(encode(cornered(), "JPEG"), None, SELECT, ShardConfig())
    mask = encode(Image.new("L", (64, 84), 255))  # for 64 x 96
    select = SelectConfig(min_side=32, mask_tolerance=tolerance)
    if fits:
        assert Image.open(io.BytesIO(fit_mask(mask, read, select))).size == read.size
    else:
        with pytest.raises(RejectedError, match="64, 84"):
            fit_mask(mask, read, select)


def test_the_largest_come_first_and_equal_ones_by_name():
    subjects = [Subject({"MaskPath": name}, b"", area, 0.0) for name, area in (("b", 0.2), ("c", 0.5), ("a", 0.2))]
    first, rest = ([subject.row["MaskPath"] for subject in part] for part in largest(subjects, 2))
    assert (first, rest) == (["c", "a"], ["b"])


def test_a_corner_counts_once_for_the_border():
    inside = np.zeros((4, 6), bool)
    inside[0, 0] = True
    sources = Mock(Sources, mask=lambda name: encode(Image.fromarray(inside)))
    subject = read_subject({"MaskPath": "m.png"}, sources, SelectConfig(min_area=0, max_border=1))
    assert subject.border == pytest.approx(1 / 16)
