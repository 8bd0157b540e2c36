"""The verdict: good shards pass, and each kind of damage is named."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from datamodules import shards as sharding
from datamodules.mini.prompts import prompts_and_classes
from datamodules.openimages.build import build
from datamodules.openimages.validate import ValidateConfig, validate


@pytest.fixture
def built(plain_bucket, config_of):
    config = config_of(plain_bucket)
    build(config)
    return Path(config.out)


def verdict(folder: Path, capsys, **options) -> tuple[int, str]:
    capsys.readouterr()
    return validate(ValidateConfig(str(folder), workers=0, image_size=32, **options)), capsys.readouterr().out


def rewrite(shard: Path, change) -> None:
    """Change a shard's files, and the manifest to fit: damage that no digest tells of."""
    with tarfile.open(shard) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(shard, "w") as tar:
        for name, content in change(files):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    manifest = sharding.read_manifest(shard.parent)
    manifest["train"]["shards"][shard.name]["sha256"] = sharding.sha256(shard)
    sharding.write_json(shard.parent / sharding.MANIFEST, manifest)


def test_good_shards_are_good(built, capsys):
    assert verdict(built, capsys) == (0, "GOOD: 40 samples in 3 shards, 0 problems\n")


def test_damaged_and_missing_and_unlisted_shards_are_named(built, capsys):
    whole = (built / "train-00000.tar").read_bytes()
    (built / "train-00000.tar").write_bytes(whole[: len(whole) // 2])  # the last part of a tar may be padding
    (built / "train-00001.tar").rename(built / "train-00009.tar")
    code, out = verdict(built, capsys)
    assert code == 1 and "train-00000.tar: its sha256 is not" in out and "train-00000.tar, sample -: shard is cut short" in out
    assert "train-00001.tar: the shard is missing" in out and "train-00009.tar: in no manifest" in out


def test_bad_members_are_named(built, capsys):
    def change(files):
        keys = sorted({name.partition(".")[0] for name, _ in files})
        content = dict(files)
        small = io.BytesIO()
        Image.open(io.BytesIO(content[f"{keys[0]}.mask.png"])).resize((48, 48)).save(small, "PNG")
        content[f"{keys[0]}.mask.png"] = small.getvalue()
        fields = json.loads(content[f"{keys[1]}.json"])
        content[f"{keys[1]}.json"] = json.dumps(fields | {"caption": "nothing of it"}).encode()
        content[f"{keys[2]}.jpg"] = content[f"{keys[2]}.jpg"][:500]
        for extension in ("jpg", "mask.png"):
            content[f"{keys[4]}.{extension}"] = content[f"{keys[3]}.{extension}"]
        change.keys = keys
        return content.items()

    rewrite(built / "train-00000.tar", change)
    code, out = verdict(built, capsys)
    lines = out.splitlines()
    for key, words in zip(change.keys, ("mask of 48x48 beside", "label is absent", "picture cannot be read", "the same digest"), strict=False):
        assert any(key in line and words in line for line in lines), (key, words, out)
    assert code == 1 and lines[-1] == "BAD: 40 samples in 3 shards, 4 problems"


@pytest.mark.parametrize("extension", ["jpeg", "webp"])
def test_every_picture_that_training_takes_is_checked(built, capsys, extension):
    def change(files):
        return [(name.replace(".jpg", f".{extension}"), content) for name, content in files]

    rewrite(built / "train-00000.tar", change)
    assert verdict(built, capsys) == (0, "GOOD: 40 samples in 3 shards, 0 problems\n")


def test_pictures_of_the_evaluation_are_found_among_the_samples(built, plain_bucket, capsys, tmp_path):
    picture = Image.open(sorted((plain_bucket / "pictures/train").iterdir())[7])
    (tmp_path / "dataset/cat").mkdir(parents=True)
    picture.resize((300, 300)).save(tmp_path / "dataset/cat/00.jpg", quality=70)
    (tmp_path / "dataset/prompts_and_classes.txt").write_text(prompts_and_classes({"cat": "cat"}))
    code, out = verdict(built, capsys, dreambooth=str(tmp_path), leak_bits=4)
    assert code == 1 and "looks like the evaluation's cat/00.jpg" in out


def test_a_folder_without_manifest_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest.json is missing"):
        validate(ValidateConfig(str(tmp_path), workers=0))
