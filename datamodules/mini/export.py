"""Exports the mini world as the data sets everything else reads: triplet shards and three DreamBooth-like folders.

    <out>/shards/{train,val,heldout}-{00000..}.tar, manifest.json
    <out>/dreambooth/dataset/<subject>/00.png ..., prompts_and_classes.txt, {texture,pose,camera}_prompts.txt
    <out>/dreambooth/masks/<subject>/00.png ...
    <out>/dreambooth-dev/...                    the same with training-split subjects: settings are chosen on these
    <out>/dreambooth-fresh/...                  the same with other held-out subjects: nothing is chosen on these
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.mini import world
from datamodules.mini.prompts import prompts_and_classes, texture_prompts, view_prompts
from datamodules.mini.render import render
from datamodules.shards import ShardSample, write_shards
from moma_lightning.files import commit, place_beside, write_json

#: Shards -> split of the world and first number of their identities; far apart, so that validation identities are new to the
#: adapters and to the base models alike. Nothing is trained on "heldout": stage 1 is judged on it in the end. What its tables showed led to new recipes at
#: times (LOG: the IP-Adapter's steps, stage 1's edits), so its 30 subjects are not quite unseen: "dreambooth-fresh" has 30 that nothing was chosen on.
SHARDS = {"train": ("train", 0), "val": ("train", 1_000_000_000), "heldout": ("heldout", 1_000_000_000)}

#: DreamBooth folder -> the same. The dev subjects are in no shard.
FOLDERS = {"dreambooth": ("heldout", 0), "dreambooth-dev": ("train", 1_500_000_000), "dreambooth-fresh": ("heldout", 700_000)}

#: Triplets: few accessories and other materials. Captions name the accessory, and lose colour, pattern and material; `caption_full` keeps them.
ACCESSORY_RATE = 0.1
MATERIAL_RATE = 0.12
SUBJECTS_PER_LABEL = 3


def export(
    out: Path = Path("runs/mini/data"),
    train_count: int = 12_000,
    val_count: int = 512,
    samples_per_shard: int = 500,
    size: int = 64,
    seed: int = 0,
) -> None:
    """Write triplet shards and dreambooth-mini; what is there already stays, what another configuration left is replaced.

    Args:
        out: folder for both.
        train_count: training pictures, one identity each.
        val_count: validation pictures, of other identities, and as many held-out ones.
        samples_per_shard: training pictures a shard (the others: a quarter of it).
        size: side of the pictures in pixels.
        seed: of scenes and poses; identities do not depend on it.
    """
    config = {"size": size, "accessory_rate": ACCESSORY_RATE, "material_rate": MATERIAL_RATE, "renderer": _renderer_digest()}
    for split in SHARDS:
        count, a_shard = (train_count, samples_per_shard) if split == "train" else (val_count, max(1, samples_per_shard // 4))
        part = write_shards(out / "shards", split, count, partial(triplets, split, size=size, seed=seed),
                            samples_per_shard=a_shard, seed=seed, config=config, overwrite=True)
        print(f"{split}: {part['count']} triplets in {len(part['shards'])} shards under {out / 'shards'}")
    for folder in FOLDERS:
        export_dreambooth(out / folder, size, seed)
        print(f"{folder}: {len(subjects(folder))} subjects under {out / folder}")


def triplet_picture(split: str, index: int, seed: int = 0) -> world.Picture:
    """Picture number `index` of a split's shards."""
    of, first = SHARDS[split]
    rng = np.random.default_rng([11, seed, first + index])
    return world.sample_picture(rng, world.identity(of, first + index), accessory_rate=ACCESSORY_RATE, material_rate=MATERIAL_RATE)


def triplets(split: str, rows: range, size: int = 64, seed: int = 0) -> Iterator[ShardSample]:
    """The shard samples of a range of picture numbers."""
    described = [triplet_picture(split, index, seed) for index in rows]
    images, masks = render(described, size)
    for index, picture, image, mask in zip(rows, described, images, masks, strict=True):
        key, full = f"mini-{split}-{index:06d}", world.caption(picture)
        fields = {"caption": world.filter_caption(full), "caption_full": full, "label": picture.identity.label, "image_id": key,
                  "source": "mini", "license": "Apache-2.0", "author": "moma_lightning mini world",
                  "identity": asdict(picture.identity)}
        yield ShardSample(key, _png(image), "png", _png(mask), fields)


def subjects(folder: str = "dreambooth") -> dict[str, world.Identity]:
    """A folder's 30 identities by name ("cat", "cat2", "cat3", ...), in the order of `world.LABELS`."""
    (split, first), found = FOLDERS[folder], {}
    for number, label in enumerate(world.LABELS):
        for copy in range(SUBJECTS_PER_LABEL):
            name = label.replace(" ", "_") + (str(copy + 1) if copy else "")
            found[name] = world.identity(split, first + number * SUBJECTS_PER_LABEL + copy, label)
    return found


def subject_pictures(subject: int, identity: world.Identity, seed: int = 0) -> list[world.Picture]:
    """The 4 to 6 pictures of identity number `subject`: each in a scene of its own, without material or accessory."""
    rng = np.random.default_rng([13, seed, subject])
    count = int(rng.integers(4, 7))
    by_scene: dict[str, world.Picture] = {}
    while len(by_scene) < count:
        picture = world.sample_picture(rng, identity)
        by_scene.setdefault(picture.scene, picture)
    return list(by_scene.values())


def export_dreambooth(folder: Path, size: int = 64, seed: int = 0) -> None:
    """Write `folder`, named as in FOLDERS, beside its place and rename it; kept when its manifest says that it is the same already."""
    manifest = {"size": size, "seed": seed, "renderer": _renderer_digest()}
    if (folder / "manifest.json").exists() and json.loads((folder / "manifest.json").read_text()) == manifest:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = place_beside(folder)
    identities = subjects(folder.name)
    for number, (name, identity) in enumerate(identities.items()):
        images, masks = render(subject_pictures(FOLDERS[folder.name][1] + number, identity, seed), size)
        _write_pictures(beside / "dataset" / name, images)
        _write_pictures(beside / "masks" / name, masks)
    labels = {name: identity.label for name, identity in identities.items()}
    (beside / "dataset" / "prompts_and_classes.txt").write_text(prompts_and_classes(labels))
    for kind, text in {"texture": texture_prompts(), **view_prompts()}.items():
        (beside / "dataset" / f"{kind}_prompts.txt").write_text(text)
    write_json(beside / "manifest.json", manifest)
    shutil.rmtree(folder, ignore_errors=True)
    commit(beside, folder)


def _write_pictures(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        (folder / f"{number:02d}.png").write_bytes(_png(image))


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _renderer_digest() -> str:
    """Of the code that draws and words the world: pictures of an older renderer are not mistaken for this one's."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(code).hexdigest()[:16]
