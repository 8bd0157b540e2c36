import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from evaluation.generation import batches, generate
from evaluation.methods import RealImages
from evaluation.plan import Evaluation
from evaluation.stamps import read_stamp, stamp_path
from tests.evaluation.fakes import Painter, fake_config, made

PICTURES = 3 * (2 + 1)


@pytest.fixture
def log(tmp_path) -> str:
    return str(tmp_path / "log")


def test_every_picture_gets_a_stamp_that_says_how(tmp_path, log):
    config = fake_config(tmp_path, {"a": Painter(0.3, log)})
    generate(config)
    pictures = sorted(config.pictures.rglob("*.png"))
    assert len(pictures) == len(made(log)) == PICTURES
    stamp = read_stamp(pictures[0])
    settings, provenance = stamp["settings"], stamp["provenance"]
    assert settings["method"] == {"kind": "Painter", "noise": 0.3}
    assert settings["task"]["prompt"].startswith("a boot")
    assert settings["task"]["seed"] in {seed for _, _, seed in made(log)}
    assert settings["sampler"]["num_inference_steps"] == 12
    assert set(settings["input"]) == {"image", "mask"}
    assert all(settings["input"].values())
    assert (provenance["name"], provenance["protocol"]) == ("a", "mini, modified")
    assert provenance["protocol_digest"] == config.resolved_protocol().digest
    assert provenance["reference"].endswith("old_boot/00.png")


def test_methods_share_their_noise(tmp_path, log):
    generate(fake_config(tmp_path, {"a": Painter(0.3, log), "b": Painter(0.6, log + "b")}))
    assert made(log) == made(log + "b")


def test_nothing_is_made_twice(tmp_path, log):
    config = fake_config(tmp_path, {"a": Painter(0.3, log)})
    generate(config)
    generate(config)
    assert len(made(log)) == PICTURES


def test_goes_on_after_a_kill(tmp_path, log):
    with pytest.raises(KeyboardInterrupt):
        generate(fake_config(tmp_path, {"a": Painter(0.3, log, fail_after=4)}))
    config = fake_config(tmp_path, {"a": Painter(0.3, log)})
    kept = {p: p.read_bytes() for p in config.pictures.rglob("*.png")}
    assert len(kept) == 3  # two whole batches: two pictures and one
    generate(config)
    assert len(list(config.pictures.rglob("*.png"))) == PICTURES
    assert all(p.read_bytes() == content for p, content in kept.items())
    assert len(made(log)) == PICTURES + 1  # the fourth was lost with its batch


@pytest.mark.parametrize("harm", ["no stamp", "cut picture", "cut stamp", "no picture", "other stamp"])
def test_what_is_not_whole_is_made_again(tmp_path, log, harm):
    config = fake_config(tmp_path, {"a": Painter(0.3, log)})
    generate(config)
    picture = sorted(config.pictures.rglob("*.png"))[4]
    whole, stamp = picture.read_bytes(), read_stamp(picture)
    if harm == "no stamp":
        stamp_path(picture).unlink()
    elif harm == "no picture":
        picture.unlink()
    elif harm == "other stamp":
        stamp_path(picture).write_text(json.dumps(stamp | {"settings": {}}))
    else:
        broken = picture if harm == "cut picture" else stamp_path(picture)
        broken.write_bytes(broken.read_bytes()[:-20])
    generate(config)
    assert picture.read_bytes() == whole
    assert read_stamp(picture) == stamp
    assert len(made(log)) == PICTURES + 1


def test_changed_settings_make_all_again(tmp_path, log):
    generate(fake_config(tmp_path, {"a": Painter(0.3, log)}))
    generate(fake_config(tmp_path, {"a": Painter(0.4, log)}))
    assert len(made(log)) == 2 * PICTURES
    generate(fake_config(tmp_path, {"a": Painter(0.4, log)}, {"sampler": {"seed": 1}}))
    assert len(made(log)) == 3 * PICTURES


def test_changed_scoring_keeps_the_pictures(tmp_path, log):
    generate(fake_config(tmp_path, {"a": Painter(0.3, log)}))
    generate(fake_config(tmp_path, {"a": Painter(0.3, log)}, {"comparison": "input", "clip_t_scale": 2.5}))
    assert len(made(log)) == PICTURES


def test_a_changed_reference_makes_its_subject_again(tmp_path, log):
    config = fake_config(tmp_path, {"a": Painter(0.3, log)})
    generate(config)
    folder = tmp_path / "data" / "dataset" / "tabby"
    (folder / "00.png").write_bytes((folder / "01.png").read_bytes())
    generate(config)
    assert [name for name, *_ in made(log)[PICTURES:]] == ["tabby"] * 3


def test_processes_share_the_subjects(tmp_path, log, monkeypatch):
    """Workers are run one after another here; that what they are given can be sent to a process is checked."""
    shares = []

    def in_turn(function, args, nprocs):
        threads = torch.get_num_threads()
        for rank in range(nprocs):
            before = len(made(log))
            function(rank, *pickle.loads(pickle.dumps(args)))
            shares.append({name for name, *_ in made(log)[before:]})
        torch.set_num_threads(threads)

    monkeypatch.setattr(mp, "spawn", in_turn)
    generate(fake_config(tmp_path, {"a": Painter(0.3, log)}, num_processes=2))
    assert shares == [{"red_mug", "tabby"}, {"old_boot"}]
    alone = fake_config(tmp_path, {"a": Painter(0.3)})
    assert all(plan.is_done for plan in Evaluation.open(alone).planned("a", alone.methods["a"]))


def test_nothing_is_left_beside_the_pictures(tmp_path):
    config = fake_config(tmp_path, {"a": Painter(), "real": RealImages()})
    generate(config)
    assert {p.suffix for p in Path(config.run).rglob("*") if p.is_file()} == {".png", ".json"}
    assert not list(Path(config.run).rglob(".*"))
    assert [p.name for p in config.pictures.iterdir()] == ["a"]


def test_batches_never_mix_references(tmp_path):
    config = fake_config(tmp_path, {"a": Painter()}, {"references": "every"})
    found = list(batches(Evaluation.open(config).planned("a", config.methods["a"]), 2))
    assert [len(batch) for batch in found] == [2, 1] * 9
    assert all(len({plan.reference for plan in batch}) == 1 for batch in found)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    config = fake_config(tmp_path, {"a": Painter()})

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="could not be written .No space left on device.: free space there"):
        generate(config)


def test_no_methods_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no methods"):
        generate(fake_config(tmp_path, {}))
