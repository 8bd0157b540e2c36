"""The verdict: good shards pass, and each kind of damage is named."""

import io
import json
import re
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from datamodules import shards as sharding
from datamodules.mini.prompts import prompts_and_classes
from datamodules.openimages.build import build
from datamodules.openimages.validate import ValidateConfig, validate
from moma_lightning.files import write_json


@pytest.fixture
def built(plain_bucket, config_of):
    config = config_of(plain_bucket)
    build(config)
    return Path(config.out)


def verdict(folder: Path, capsys, **options) -> tuple[int, str]:
    capsys.readouterr()
    return validate(ValidateConfig(str(folder), **{"workers": 0, "image_size": 32} | options)), capsys.readouterr().out


def rewrite(shard: Path, change) -> None:
    """Change a shard's files, and the manifest to fit: damage that neither digest nor index tells of."""
    with tarfile.open(shard) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(shard, "w") as tar:
        for name, content in change(files):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    manifest = sharding.read_manifest(shard.parent)
    del manifest["train"]["index"]
    manifest["train"]["shards"][shard.name]["sha256"] = sharding.sha256(shard)
    write_json(shard.parent / sharding.MANIFEST, manifest)


UNSOUGHT = "; pictures of the evaluation were not looked for (--dreambooth FOLDER)"


def test_good_shards_are_good(built, capsys):
    assert verdict(built, capsys) == (0, f"GOOD: 40 samples in 3 shards, 0 problems{UNSOUGHT}\n")


def test_two_workers_find_what_one_finds(built, capsys):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'moma-lightning[openimages]'")
    shard = built / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    found = [verdict(built, capsys, workers=workers) for workers in (2, 0)]
    assert found[0] == found[1] and found[0][0] == 1 and "train-00001.tar: its sha256 is not" in found[0][1]


def change_index(folder: Path, change) -> None:
    index = pd.read_parquet(folder / "train-index.parquet")
    change(index).to_parquet(folder / "train-index.parquet", index=False)


@pytest.mark.parametrize(("change", "named", "problems"), [
    (lambda i: i.assign(sha256=i.sha256.where(i.index != 7, "0" * 64)), "train-00000.tar {7}: train-index.parquet has another digest or place", 1),
    (lambda i: i.assign(mask_offset=i.mask_offset.where(i.index != 20, 512)), "train-00001.tar {20}: train-index.parquet has another digest or place", 1),
    (lambda i: i.drop(index=30), "train-00002.tar {30}: is not in train-index.parquet", 2),
    (lambda i: i.assign(key=i.key.where(i.index != 30, "nobody")), "train-00002.tar nobody: is in train-index.parquet, but not in the shard", 2),
    (lambda i: pd.concat([i, i.tail(1).assign(shard="train-00009.tar")]), "train-index.parquet: 41 rows, the manifest says 40", 1),
])
def test_an_index_of_something_else_is_named(built, capsys, change, named, problems):
    keys = pd.read_parquet(built / "train-index.parquet").key
    change_index(built, change)
    code, out = verdict(built, capsys)
    assert code == 1 and re.sub(r"\{(\d+)\}", lambda m: keys[int(m[1])], named) in out and f"{problems} problems" in out


def test_an_index_that_is_gone_or_broken_is_named(built, capsys):
    (built / "train-index.parquet").write_bytes(b"no Parquet")
    assert "train-index.parquet: the index cannot be read" in verdict(built, capsys)[1]
    (built / "train-index.parquet").unlink()
    code, out = verdict(built, capsys)
    assert code == 1 and "train-index.parquet: the index is missing" in out and "1 problems" in out


def test_a_split_without_samples_is_bad(tmp_path, capsys):
    write_json(tmp_path / sharding.MANIFEST, {"train": {"count": 0, "shards": {}}})
    code, out = verdict(tmp_path, capsys)
    assert code == 1 and out == f"train: has no samples\nBAD: 0 samples in 0 shards, 1 problems{UNSOUGHT}\n"


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
    assert code == 1 and lines[-1] == f"BAD: 40 samples in 3 shards, 4 problems{UNSOUGHT}"


@pytest.mark.parametrize("extension", ["jpeg", "webp"])
def test_every_picture_that_training_takes_is_checked(built, capsys, extension):
    def change(files):
        return [(name.replace(".jpg", f".{extension}"), content) for name, content in files]

    rewrite(built / "train-00000.tar", change)
    assert verdict(built, capsys)[0] == 0


def test_pictures_of_the_evaluation_are_found_among_the_samples(built, plain_bucket, capsys, tmp_path):
    picture = Image.open(sorted((plain_bucket / "pictures/train").iterdir())[7])
    (tmp_path / "dataset/cat").mkdir(parents=True)
    picture.resize((300, 300)).save(tmp_path / "dataset/cat/00.jpg", quality=70)
    (tmp_path / "dataset/prompts_and_classes.txt").write_text(prompts_and_classes({"cat": "cat"}))
    code, out = verdict(built, capsys, dreambooth=str(tmp_path), leak_bits=4)
    assert code == 1 and "looks like the evaluation's cat/00.jpg" in out and UNSOUGHT not in out


def test_a_folder_without_manifest_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest.json is missing"):
        validate(ValidateConfig(str(tmp_path), workers=0))
