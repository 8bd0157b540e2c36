"""docs/data.md, "Your own pictures": its code, run on rendered pictures as files."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.mini import world
from datamodules.mini.render import render
from datamodules.triplets import TripletConfig, TripletDataModule

CODE = re.search(r"## Your own pictures\n.*?```python\n(.*?)```", Path("docs/data.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_a_table_of_pictures_becomes_shards_that_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = ["cat", "mug"]
    images, masks = render([world.sample_picture(np.random.default_rng(i), world.identity("train", i, label)) for i, label in enumerate(labels)])
    with open("mine.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "caption"])
        for i, label in enumerate(labels):
            Image.fromarray(images[i]).save(f"{label}.png")
            table.writerow([f"{label}.png", label, f"a {label} on a table"])
    exec(CODE[1], {})
    module = TripletDataModule(TripletConfig("runs/mine/shards/train-*.tar", "runs/mine/shards/train-*.tar", 64, 2))
    module.setup("validate")
    (batch,) = module.val_dataloader()
    assert batch.label == labels and batch.caption == ["a cat on a table", "a mug on a table"]
    found, true = batch.subject_mask[:, 0].bool().numpy(), masks > 127
    assert all((a & b).sum() / (a | b).sum() > 0.7 for a, b in zip(found, true, strict=True)), "mini's SAM has found the subjects"
