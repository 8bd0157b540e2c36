"""Joins, human filter, bounds, and each bad picture under its own name: one spoilt miniature a test, built whole."""

import csv
import io
import json
import os
import struct
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from miniature_bucket import CLASSES, PATHS, encode
from PIL import Image

from datamodules.openimages.build import build
from datamodules.openimages.candidates import with_box
from datamodules.openimages.config import SelectConfig, ShardConfig
from datamodules.openimages.hierarchy import descendants
from datamodules.openimages.perceptual import Lookalikes, distance, perceptual_hash
from datamodules.openimages.subjects import fit_mask, read_picture
from datamodules.openimages.tables import read_csv
from datamodules.samples import BadSamples, decode, read_shards
from datamodules.triplets import TripletConfig, TripletDataModule

MAN, HAND = "/m/04yx4", "/m/0k65p"
CLASS_NAMES = "v7/oidv7-class-descriptions-boxable.csv"


@pytest.fixture
def built(miniature, config_of, tmp_path, counted):
    """Builds the spoilt miniature; returns the funnel's counts."""
    def run(**options):
        return counted(build(config_of(miniature.write(tmp_path / "bucket"), **options)))
    return run


def box_of(miniature, i):
    return next(row for row in miniature.rows["boxes"] if row["ImageID"] == miniature.ids[i])


def samples_of(config) -> list[dict]:
    """Undecoded, in the shards' order."""
    return list(read_shards(map(str, sorted(Path(config.out).glob("*.tar"))), BadSamples(Path(config.out) / "bad.log", "raise")))


def test_a_good_miniature_comes_through_whole_and_trains(plain_bucket, config_of, counted, tmp_path):
    config = config_of(plain_bucket)
    assert counted(build(config)) == {"masks": 40, "triplets": 40}
    module = TripletDataModule(TripletConfig(train=f"{config.out}/train-*.tar", val=f"{config.out}/train-*.tar", batch_size=40, on_error="raise",
                                             bad_samples=str(tmp_path / "bad.log")))
    module.setup()
    batch = next(iter(module.val_dataloader()))
    assert len(batch) == 40 and 0.03 < batch.subject_mask.mean() < 0.5


def test_people_are_seen_in_masks_boxes_and_labels(miniature, built):
    ids = miniature.ids
    miniature.rows["boxes"].append(box_of(miniature, 0) | {"LabelName": MAN})
    miniature.rows["labels"].append(dict(ImageID=ids[1], Source="verification", LabelName=HAND, Confidence=1))
    miniature.rows["labels"].append(dict(ImageID=ids[2], Source="verification", LabelName=MAN, Confidence=0))  # verified: nobody
    miniature.add_mask(ids[3], MAN, Image.new("L", (72, 72), 255), (0, 1, 0, 1))
    assert built() == {"masks": 13, "human_subject": 1, "human_in_picture": 3, "triplets": 9}


def test_people_are_seen_in_bad_rows(miniature, config_of, tmp_path, counted):
    ids = miniature.ids
    miniature.rows["boxes"].append(box_of(miniature, 0) | {"LabelName": MAN, "IsGroupOf": ""})
    miniature.add_mask(ids[1], MAN, Image.new("L", (72, 72), 255), (0, 1, 0, 1))
    miniature.rows["masks"][-1]["BoxXMin"] = "left"
    miniature.rows["boxes"].pop()
    miniature.rows["labels"].append(dict(ImageID=ids[2], Source="verification", LabelName=HAND, Confidence="surely"))
    root = miniature.write(tmp_path / "bucket")
    with (root / "annotations" / PATHS["boxes"]).open("a") as file:
        file.write(f"{ids[3]},xclick,{MAN},1,0.1\n")
    assert counted(build(config_of(root))) == {"masks": 13, "bad_row": 1, "human_in_picture": 4, "triplets": 8}


def test_people_beside_the_subject_can_be_allowed(miniature, built):
    miniature.rows["boxes"].append(box_of(miniature, 0) | {"LabelName": MAN})
    miniature.add_mask(miniature.ids[3], MAN, Image.new("L", (72, 72), 255), (0, 1, 0, 1))
    select = SelectConfig(humans="subject", min_side=32, near_duplicate_bits=None)
    assert built(select=select) == {"masks": 13, "human_subject": 1, "triplets": 12}


def test_annotation_filters_each_count_under_their_name(miniature, built):
    for i, flag in enumerate(("IsGroupOf", "IsDepiction", "IsInside")):
        box_of(miniature, i)[flag] = 1
    miniature.row("masks", miniature.ids[3])["PredictedIoU"] = 0.3
    miniature.row("masks", miniature.ids[4])["PredictedIoU"] = ""  # as in validation and test: passes
    miniature.rows["boxes"].remove(box_of(miniature, 5))
    miniature.rows["metadata"].remove(miniature.row("metadata", miniature.ids[6]))
    miniature.row("masks", miniature.ids[7])["LabelName"] = "/m/never_heard"
    miniature.row("masks", miniature.ids[8])["BoxXMax"] = float(miniature.row("masks", miniature.ids[8])["BoxXMin"]) + 0.001
    del miniature.captions[miniature.ids[9]]
    found = built(select=SelectConfig(min_side=32, near_duplicate_bits=None, require_box=True, box_tolerance=1.0))
    assert found == {"masks": 12, "group_of": 1, "depiction": 1, "inside": 1, "low_predicted_iou": 1, "no_box": 1, "no_metadata": 1,
                     "unknown_class": 1, "box_too_small": 1, "no_caption": 1, "triplets": 3}


def test_bad_rows_and_bad_paths_are_counted(miniature, built, tmp_path):
    rows = miniature.rows["masks"]
    rows.append(dict(rows[0]))
    rows[1]["MaskPath"] = "../../" + rows[1]["MaskPath"]
    rows[2]["BoxXMin"] = "left"
    rows[3]["ImageID"] = "no-such-id"
    assert built() == {"masks": 13, "bad_row": 2, "malformed_mask_path": 1, "duplicate_row": 1, "triplets": 9}


def test_a_row_with_too_few_cells_is_a_bad_row(miniature, config_of, tmp_path, counted):
    root = miniature.write(tmp_path / "bucket")
    with (root / "annotations" / PATHS["masks"]).open("a") as file:
        file.write("677c122b0eaa5d16_m04yx4_9a041d52.png,677c122b0eaa5d16\n")
    assert counted(build(config_of(root))) == {"masks": 13, "bad_row": 1, "triplets": 12}


def test_a_stray_quote_spoils_its_own_row_alone(miniature, config_of, tmp_path, counted):
    root = miniature.write(tmp_path / "bucket")
    for kind in ("masks", "boxes", "labels"):
        path = root / "annotations" / PATHS[kind]
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:4], '"5,x', *lines[4:], ""]))
    part = build(config_of(root))
    assert counted(part) == {"masks": 13, "bad_row": 1, "triplets": 12}
    assert [part["tables"][kind] for kind in ("masks", "boxes", "image_labels")] == [{"rows": 13, "bad_rows": 1}] * 3


def test_rows_are_counted_by_one_thread(tmp_path):
    """Arrow tells of rows with too many or too few cells from threads of its own."""
    threads = set()

    class Watched(Counter):
        def __setitem__(self, name, count):
            threads.add(threading.get_ident())
            super().__setitem__(name, count)

    good, bad = "0123456789abcdef,/m/01yrx,1\n" * 50_000, "0123456789abcdef,/m/04yx4\n" * 50_000
    (tmp_path / "labels.csv").write_text("ImageID,LabelName,Confidence\n" + (good + bad) * 2)
    counts = Watched()
    parts = list(read_csv(tmp_path / "labels.csv", "image_labels", counts))
    assert counts == {"rows": 200_000, "bad_rows": 100_000} and threads == {threading.get_ident()}
    assert [sum(len(part[i]) for part in parts) for i in (0, 1)] == [100_000, 100_000], "good ones, and what the bad ones name"


@pytest.mark.parametrize(("name", "content", "said"), [
    (PATHS["masks"], b"<html>" + bytes(200_000), r"object-segmentation.csv lacks the columns .*remove it, or name the right one"),
    (PATHS["metadata"], np.random.default_rng(0).bytes(300_000), r"boxable-with-rotation.csv lacks the columns"),
    (CLASS_NAMES, "LabelName,DisplayName\n/m/01yrx,Ch\xe2t\n".encode("latin-1"), r"class-descriptions-boxable.csv is no file of class names.*remove it"),
    (CLASS_NAMES, b"/m/01yrx," + b"x" * 200_000, r"class-descriptions-boxable.csv is no file of class names"),
])
def test_a_file_that_is_something_else_is_named(miniature, config_of, tmp_path, name, content, said):
    root = miniature.write(tmp_path / "bucket")
    (root / "annotations" / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        build(config_of(root))


def test_missing_columns_are_an_error_and_extra_ones_are_not(miniature, config_of, tmp_path, counted):
    root = miniature.write(tmp_path / "bucket")
    path = root / "annotations" / PATHS["boxes"]
    rows = list(csv.DictReader(path.open()))
    for change, columns in (({"Extra": "x;y"}, [*rows[0], "Extra"]), ({}, [c for c in rows[0] if c != "IsGroupOf"])):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows([row | change for row in rows])
        if change:
            assert counted(build(config_of(root, "with-extra"))) == {"masks": 12, "triplets": 12}
    with pytest.raises(ValueError, match=r"annotations-bbox.csv lacks the columns \['IsGroupOf'\]"):
        build(config_of(root, "without"))


def test_bounds_on_the_mask(miniature, built):
    ids, whole = miniature.ids, (0, 1, 0, 1)
    small, border = Image.new("L", (72, 72)), Image.new("L", (72, 72))
    small.paste(255, (30, 30, 34, 34))
    border.paste(255, (0, 0, 40, 72))
    for image, mask in ((ids[0], small), (ids[0], Image.new("L", (72, 72))), (ids[1], Image.new("L", (72, 72), 255)), (ids[2], border)):
        miniature.add_mask(image, CLASSES["hat"], mask, (*whole[:3], 1 - 0.0001 * len(miniature.masks)))
    assert built() == {"masks": 16, "area_too_small": 1, "mask_empty": 1, "area_too_large": 1, "at_border": 1, "triplets": 12}


def test_the_largest_subjects_of_a_picture(miniature, built):
    mask = Image.new("L", (72, 72))
    mask.paste(255, (2, 2, 62, 62))
    miniature.add_mask(miniature.ids[0], CLASSES["hat"], mask, (0, 0.9, 0, 0.9))
    assert built() == {"masks": 13, "not_the_largest": 1, "triplets": 12}


def test_two_subjects_of_a_picture(miniature, config_of, tmp_path, counted):
    for side in (62, 50):
        mask = Image.new("L", (72, 72))
        mask.paste(255, (2, 2, side, side))
        miniature.add_mask(miniature.ids[0], CLASSES["hat"], mask, (0, side / 72, 0, side / 72))
    config = config_of(miniature.write(tmp_path / "bucket"), select=SelectConfig(min_side=32, near_duplicate_bits=0, subjects_per_picture=2))
    assert counted(build(config)) == {"masks": 14, "not_the_largest": 1, "triplets": 13}
    both = [sample for sample in samples_of(config) if json.loads(sample["json"])["image_id"] == miniature.ids[0]]
    assert len(both) == 2 and both[0]["jpg"] == both[1]["jpg"] and both[0]["mask.png"] != both[1]["mask.png"]


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
])
def test_odd_pictures_become_plain_ones(change, note):
    picture = Image.fromarray((np.indices((96, 128)).sum(0)[..., None] * np.array([1, 0.6, 0.9])).astype(np.uint8))
    read = read_picture(change(picture), None, SelectConfig(min_side=32), ShardConfig())
    upright = Image.open(io.BytesIO(read.content))
    assert read.note == note and upright.mode == "RGB" and upright.format == "JPEG" and max(upright.size) <= 1024
    seen = np.asarray(upright.resize((128, 96)).convert("L"), float)
    assert np.abs(seen - np.asarray(picture.convert("L"), float)).mean() < 6


def cornered(size=(64, 96)) -> Image.Image:
    """Grey, with its top left corner white."""
    image = Image.new("RGB", size, (90, 90, 90))
    image.paste("white", (0, 0, 20, 30))
    return image


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
    read = read_picture(encode(cornered(), "JPEG", exif=exif), rotation, SelectConfig(min_side=32), ShardConfig())
    fitted = fit_mask(encode(mask.resize((32, 48), 0)), read)
    assert Image.open(io.BytesIO(fitted)).size == Image.open(io.BytesIO(read.content)).size == read.size
    assert white_share(read.content, fitted) > 0.9
    assert Image.open(io.BytesIO(read.content)).getexif().get(0x0112, 1) == 1


def test_rotation_is_counter_clockwise():
    read = read_picture(encode(cornered(), "JPEG"), 90.0, SelectConfig(min_side=32), ShardConfig())
    pixels = np.asarray(Image.open(io.BytesIO(read.content)).convert("L"))
    assert read.size == (96, 64) and pixels[-5, 5] > 200 and pixels[5, 5] < 120  # top left goes to bottom left


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
    read = read_picture(encode(cornered(), "JPEG", exif=exif), None, SelectConfig(min_side=32), ShardConfig())
    mask = Image.new("L", (96, 64))
    mask.paste(255, (66, 0, 96, 20))  # top right, where orientation 6 puts the corner
    assert white_share(read.content, fit_mask(encode(mask), read)) > 0.9


def test_near_duplicates_are_found_and_others_are_not(miniature, built):
    first = Image.open(io.BytesIO(miniature.pictures[miniature.ids[0]]))
    for i, quality in ((1, 60), (2, 85)):
        miniature.pictures[miniature.ids[i]] = encode(first, "JPEG", quality=quality)
    assert built(select=SelectConfig(min_side=32, near_duplicate_bits=2))["near_duplicate"] == 2


def test_lookalikes_find_exactly_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    values = [int(v) for v in rng.integers(0, 2**63, 60)]
    values += [v ^ (1 << int(rng.integers(64))) ^ (1 << int(rng.integers(64))) ^ (1 << int(rng.integers(64))) for v in values[:30]]
    for bits in (0, 2, 3, 5):
        seen = Lookalikes(bits)
        for i, value in enumerate(values):
            assert (seen.find(value) is not None) == any(distance(value, other) <= bits for other in values[:i])
            seen.add(value, str(i))


def test_the_hash_survives_scaling_and_decoding_small():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (12, 16, 3), np.uint8)).resize((1024, 768), Image.Resampling.BICUBIC)
    small = Image.open(io.BytesIO(encode(picture, "JPEG")))
    small.draft("RGB", (64, 64))
    assert small.size == (128, 96)
    assert distance(perceptual_hash(picture), perceptual_hash(small)) <= 2
    assert distance(perceptual_hash(picture), perceptual_hash(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 10


def test_boxes_are_joined_by_their_corners():
    sides = dict(BoxXMin=[0.1, 0.5], BoxXMax=[0.4, 0.9], BoxYMin=[0.1, 0.1], BoxYMax=[0.3, 0.3])
    masks = pd.DataFrame(dict(MaskPath=["a", "b"], ImageID="i", LabelName="l", **sides))
    boxes = pd.DataFrame(dict(ImageID="i", LabelName="l", XMin=[0.5, 0.1], XMax=[0.9, 0.4], YMin=[0.1, 0.102], YMax=[0.3, 0.3], IsGroupOf=[1, 0],
                              IsDepiction=0, IsInside=0))
    assert with_box(masks, boxes, 0.005).IsGroupOf.tolist() == [0, 1]
    assert with_box(masks, boxes, 0.001).IsGroupOf.isna().tolist() == [True, False]


def test_human_classes_of_the_hierarchy(plain_bucket):
    tree = plain_bucket / "annotations/2018_04/bbox_labels_600_hierarchy.json"
    assert descendants(tree, ["/m/01g317"]) == {"/m/01g317", "/m/04yx4", "/m/03bt1vf", "/m/02p0tk3", "/m/0k65p", "/m/0dzct"}
    with pytest.raises(ValueError, match="hierarchy.json.*/m/nothing"):
        descendants(tree, ["/m/nothing"])


def test_human_classes_of_the_whole_hierarchy():
    folder = os.environ.get("MOMA_OPENIMAGES")
    if not folder:
        pytest.skip("MOMA_OPENIMAGES names no folder with OpenImages' bbox_labels_600_hierarchy.json")
    found = descendants(Path(folder) / "bbox_labels_600_hierarchy.json", SelectConfig().human_roots)
    assert len(found) == 19 and {"/m/04yx4", "/m/03bt1vf", "/m/01bl7v", "/m/05r655", "/m/0k65p"} < found


def test_shards_read_back_with_metadata(plain_bucket, config_of):
    config = config_of(plain_bucket)
    build(config)
    for sample in samples_of(config):
        fields = json.loads(sample["json"])
        assert decode(sample, 64).label == fields["label"] and fields["license"].startswith("https://creativecommons")
        assert fields["caption_full"] and fields["source"] == "openimages-v7" and len(fields["box"]) == 4
