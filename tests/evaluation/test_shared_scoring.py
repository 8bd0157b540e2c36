import os
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
import torch

from evaluation import scoring
from evaluation.dreambooth import run_scoring
from evaluation.generation import generate
from evaluation.methods import RealImages
from evaluation.metrics import CachedEncoder
from evaluation.plan import Evaluation
from evaluation.processes import Progress
from evaluation.scoring import open_judges, score
from evaluation.shared_scoring import CacheFiller, fill_caches
from moma_lightning.training.guards import Preempted
from tests.evaluation.fakes import ColorEncoder, Painter, fake_config, random_picture

METHODS = {"real_images": RealImages(), "a": Painter(0.3)}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = fake_config(tmp_path_factory.mktemp("shared"), METHODS, {"extra_scores": ["dino_masked"]})
    generate(config)
    return config


def test_two_processes_see_every_picture_once_and_the_table_is_the_same(config):
    alone = score(Evaluation.open(config), METHODS)
    shutil.rmtree(config.eval_folder / "cache")
    config.num_processes = 2
    environment = dict(os.environ)
    fill_caches(config, METHODS)
    assert environment == os.environ, "a port that is left there may be taken when the next processes start"
    parts = sorted((config.eval_folder / "cache").glob("*.part*.npz"))
    assert {part.name.split(".")[-2] for part in parts} == {"part0", "part1"}
    judges = open_judges(Evaluation.open(config))
    for encoder in judges.encoders.values():
        encoder.encoder.encode_images = None  # whoever asks it again fails
    judges.masker._find = None
    shared = score(Evaluation.open(config), METHODS, judges)
    pd.testing.assert_frame_equal(alone, shared, rtol=1e-5)
    assert not list((config.eval_folder / "cache").glob("*.part*.npz"))  # put into the one file of each encoder


def test_a_kill_on_one_process_loses_no_more_than_the_last_minute(config, monkeypatch):
    seen, rows = [], scoring.subject_rows

    def killed(*given):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(given)
        return rows(*given)

    shutil.rmtree(config.eval_folder / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("evaluation.extra_scores.SAVE_SECONDS", -1)
        patch.setattr(scoring, "subject_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            score(Evaluation.open(config), METHODS)
    known = {name: len(encoder.known) for name, encoder in open_judges(Evaluation.open(config)).encoders.items()}
    assert len(seen) == 2 and all(count > 0 for count in known.values())


def test_a_missing_picture_is_an_error_with_two_processes_too(config):
    config.num_processes = 2
    lost = next(config.pictures.rglob("*.png"))
    lost.unlink()
    with pytest.raises(ValueError, match="1 of 9 pictures are missing"):
        run_scoring(config)


def test_a_part_writes_what_it_found_and_the_whole_takes_the_parts_in(tmp_path):
    pictures = [random_picture(i) for i in range(4)]
    first = CachedEncoder(ColorEncoder(), tmp_path / "dino.npz")
    first.encode_images(pictures[:1])
    first.save()
    for number in (0, 1):
        part = CachedEncoder(ColorEncoder(), tmp_path / "dino.npz", part=number)
        part.encode_images([pictures[0], pictures[1 + number]])
        part.save()
        assert part.encoder.seen == 1  # the first picture was known
    resumed = CachedEncoder(ColorEncoder(), tmp_path / "dino.npz", part=0)
    resumed.encode_images(pictures)
    resumed.save()
    whole = CachedEncoder(ColorEncoder(), tmp_path / "dino.npz")
    torch.testing.assert_close(whole.encode_images(pictures), ColorEncoder().encode_images(pictures))
    assert whole.encoder.seen == 0
    whole.save()
    assert [path.name for path in tmp_path.iterdir()] == ["dino.npz"]


def test_a_process_that_is_told_to_end_keeps_what_its_judges_said(config):
    filler = CacheFiller(config, METHODS, {})
    filler._trainer, filler.judges, filler.progress = SimpleNamespace(received_sigterm=True), Mock(), Progress(2)
    for end in (lambda: filler.predict_step(0, 0), filler.on_predict_end):
        with pytest.raises(Preempted) as stop:
            end()
        assert stop.value.code == 143
    assert filler.judges.save.call_count == 2
