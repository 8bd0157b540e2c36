import json
import subprocess
import sys

import numpy as np
import pytest
import webdataset as wds

from datamodules.dreambooth import DreamBooth, load_mask, load_picture
from datamodules.mini import export, world
from datamodules.mini.prompts import TEXTURES, live_prompts, object_prompts
from datamodules.mini.render import render
from datamodules.mini.views import VIEWS, say, seen
from datamodules.shards import contains_label
from datamodules.triplets import TripletConfig, TripletDataModule
from experiments.mini.recipe.common import sample_world


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    export.export(folder, train_count=24, val_count=10, samples_per_shard=8)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(folder, split):
    shards = sorted(str(p) for p in (folder / "shards").glob(f"{split}-*.tar"))
    return [json.loads(sample["json"]) for sample in wds.WebDataset(shards, shardshuffle=False)]


def test_same_bytes_again(exported, tmp_path):
    export.export(tmp_path, train_count=24, val_count=10, samples_per_shard=8)
    assert contents(tmp_path) == contents(exported)


def test_finished_exports_are_kept(exported, monkeypatch):
    monkeypatch.setattr(export, "render", None)  # drawing anything would fail
    before = contents(exported)
    export.export(exported, train_count=24, val_count=10, samples_per_shard=8)
    assert contents(exported) == before


def test_another_seed_replaces_both(exported, tmp_path):
    export.export(tmp_path, train_count=8, val_count=2, samples_per_shard=8)
    export.export(tmp_path, train_count=8, val_count=2, samples_per_shard=4, seed=1)
    names = {path.name for path in (tmp_path / "shards").iterdir()}
    assert names == {"manifest.json", "train-00000.tar", "train-00001.tar", "val-00000.tar", "val-00001.tar",
                     "heldout-00000.tar", "heldout-00001.tar"}
    old, new = contents(exported / "dreambooth"), contents(tmp_path / "dreambooth")
    assert old["dataset/cat/00.png"] != new["dataset/cat/00.png"]


def test_records(exported):
    found = records(exported, "train") + records(exported, "val")
    assert len(found) == 34 and len({record["image_id"] for record in found}) == 34
    for record in found:
        assert record["caption"] == world.filter_caption(record["caption_full"])
        assert contains_label(record["caption"], record["label"])
        assert not set(record["caption"].split()) & world.FILTERED_WORDS
        assert {record["identity"]["color"], *world.MATERIALS} & set(record["caption_full"].split())
        assert (record["source"], record["license"], record["author"]) == ("mini", "Apache-2.0", "moma_lightning mini world")


def test_shards_feed_the_datamodule(exported):
    module = TripletDataModule(TripletConfig(train=str(exported / "shards/train-*.tar"), val=str(exported / "shards/val-*.tar"),
                                             batch_size=5, steps_per_epoch=2, flip=False, on_error="raise"))
    module.setup("fit")
    batches = list(module.val_dataloader())
    pictures = [export.triplet_picture("val", index) for index in range(10)]
    images, masks = export.render(pictures)
    assert [key for batch in batches for key in batch.key] == [f"mini-val-{index:06d}" for index in range(10)]
    assert np.allclose(batches[0].pixel_values.permute(0, 2, 3, 1).numpy(), images[:5] / 127.5 - 1, atol=1e-6)
    assert (batches[1].subject_mask[:, 0].numpy() * 255 == masks[5:]).all()


def test_identities_of_training_validation_and_evaluation_never_meet():
    """Held-out subjects against every identity that anything trains on: the shards' and the base models' recipe's."""
    heldout, dev = set(export.subjects().values()), set(export.subjects("dreambooth-dev").values())
    train = {export.triplet_picture("train", index).identity for index in range(12_000)}
    val = {export.triplet_picture("val", index).identity for index in range(512)}
    fresh = set(export.subjects("dreambooth-fresh").values())
    assert len(fresh) == 30 and not fresh & heldout
    heldout |= fresh | {export.triplet_picture("heldout", index).identity for index in range(512)}
    base = {picture.identity for picture in sample_world(0, 12_000)}
    assert len(heldout) == 572 and len(val) == 512
    assert not heldout & (train | val | base) and not val & (train | base)
    assert len(dev) == 30 and not dev & (heldout | train | val | base)
    # Not only the whole identity: the look that a person would tell apart, without the proportions, is new as well.
    looks = [{(i.label, i.color, i.accent, i.pattern) for i in group} for group in (heldout, train | val | base)]
    assert not looks[0] & looks[1]
    assert {world.split_of(i) for i in train | val | base} == {"train"} and {world.split_of(i) for i in heldout} == {"heldout"}


def test_split_holds_for_any_index():
    for index in (12_001, 10**6, 10**9 + 513, 2**40):
        assert world.split_of(world.identity("train", index)) == "train"
        assert world.split_of(world.identity("heldout", index)) == "heldout"


def test_dreambooth_mini(exported):
    data = DreamBooth(exported / "dreambooth")
    assert len(data.subjects) == 30 and sum(subject.is_live for subject in data.subjects) == 12 and not data.missing
    for number, subject in enumerate(data.subjects):
        assert 4 <= len(subject.images) <= 6 and len(subject.masks) == len(subject.images)
        pictures = export.subject_pictures(number, export.subjects()[subject.name])
        assert len({p.scene for p in pictures}) == len(pictures) == len(subject.images)
        assert all(p.material is None and p.accessory is None for p in pictures)
        mask = np.asarray(load_mask(subject.masks[0]))
        assert 0.05 < (mask > 0).mean() < 0.7 and load_picture(subject.images[0]).size == mask.shape[::-1]


def test_prompts_use_the_worlds_words_only(exported):
    data = DreamBooth(exported / "dreambooth")
    known = {word for index in range(3000) for word in world.caption(sample_world(index, 1)[0]).split()}
    assert len(object_prompts()) == len(live_prompts()) == 25 and len(TEXTURES) == 10
    for subject in data.subjects:
        prompts = data.prompts(subject)
        assert len(set(prompts)) == 25 and all(contains_label(prompt, subject.label) for prompt in prompts)
        assert not {word for prompt in prompts + data.prompts_of("texture", subject) for word in prompt.split()} - known
        assert sum(prompt.endswith("at night") for prompt in prompts) == (4 if subject.is_live else 8)
        assert sum(prompt.endswith("at sunset") for prompt in prompts) == (3 if subject.is_live else 7)
        assert sum(" wearing " in prompt for prompt in prompts) == (8 if subject.is_live else 0)


def test_command(tmp_path):
    command = [sys.executable, "-m", "datamodules.mini", "--out", str(tmp_path), "--train_count=2", "--val_count=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train: 2 triplets in 1 shards" in result.stdout and (tmp_path / "dreambooth/dataset/fish3/03.png").exists()


def test_pose_and_camera_prompts_name_a_view_each(exported):
    data = DreamBooth(exported / "dreambooth")
    robot = next(subject for subject in data.subjects if subject.label == "toy robot")
    poses, cameras = data.prompts_of("pose", robot), data.prompts_of("camera", robot)
    assert "a toy robot upside down in the snow" in poses and "a toy robot far away in the city" in cameras
    assert {words for words in VIEWS for prompt in poses + cameras if f" {words} " in prompt} == set(VIEWS)


def test_views_turn_and_frame_the_subject():
    picture = world.Picture(world.Identity("hat", "red", "blue", "plain", (0.5, 0.5, 0.5)), "snow", center=(0.0, 0.0))
    plain, over, side, close, far = (mask > 0 for mask in render([picture, *(seen(picture, words) for words in VIEWS)])[1])
    assert np.mean(over == plain[::-1, ::-1]) > 0.98
    assert np.mean(side == np.rot90(plain, -1)) > 0.98  # clockwise
    assert close.sum() > 2 * plain.sum() > 4 * far.sum()


def test_a_view_is_said_behind_the_last_label():
    assert say("far away", "photo of a cat. a red cat in the snow", "cat") == "photo of a cat. a red cat far away in the snow"


@pytest.mark.parametrize(("label", "wears"), [("mug", False), ("cat", True)])
def test_only_the_living_wear_accessories(label, wears):
    rng, subject = np.random.default_rng(0), world.identity("train", 0, label)
    assert all((world.sample_picture(rng, subject, accessory_rate=1).accessory is not None) == wears for _ in range(5))
