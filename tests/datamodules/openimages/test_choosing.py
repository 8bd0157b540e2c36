"""Joins, human filter, bounds and near-duplicates: one spoilt miniature a test, built whole."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from miniature_bucket import CLASSES, PATHS, encode
from PIL import Image

from datamodules.openimages.build import build
from datamodules.openimages.candidates import with_box
from datamodules.openimages.config import SelectConfig
from datamodules.openimages.hierarchy import descendants
from datamodules.openimages.perceptual import Lookalikes, distance, perceptual_hash
from datamodules.samples import decode
from datamodules.triplets import TripletConfig, TripletDataModule
from tests.datamodules.openimages.conftest import samples_of

MAN, HAND = "/m/04yx4", "/m/0k65p"


def box_of(miniature, i):
    return next(row for row in miniature.rows["boxes"] if row["ImageID"] == miniature.ids[i])


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


def test_a_class_is_chosen_by_its_whole_name_and_called_without_what_is_in_brackets(miniature, config_of, tmp_path, counted):
    miniature.names[CLASSES["hat"]] = "Hat (clothing)"
    for image in miniature.ids[:2]:
        miniature.row("masks", image)["LabelName"] = miniature.row("boxes", image)["LabelName"] = CLASSES["hat"]
    config = config_of(miniature.write(tmp_path / "bucket"), select=SelectConfig(min_side=32, near_duplicate_bits=None, classes=["hat (Clothing)"]))
    hats = sum(row["LabelName"] == CLASSES["hat"] for row in miniature.rows["masks"])
    assert counted(build(config)) == {"masks": 12, "class_not_chosen": 12 - hats, "triplets": hats} and 2 <= hats < 12
    assert {json.loads(sample["json"])["label"] for sample in samples_of(config)} == {"hat"}


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


def test_near_duplicates_are_found_and_others_are_not(miniature, built):
    first = Image.open(io.BytesIO(miniature.pictures[miniature.ids[0]]))
    for i, quality in ((1, 60), (2, 85)):
        miniature.pictures[miniature.ids[i]] = encode(first, "JPEG", quality=quality)
    assert built(select=SelectConfig(min_side=32))["near_duplicate"] == 2, "as configured unless told otherwise"


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
