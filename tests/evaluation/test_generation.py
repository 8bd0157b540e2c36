import json
import os
import signal
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from PIL import Image

from evaluation.generation import PictureMaker, batches, generate, shared
from evaluation.methods import RealImages, TextualInversion
from evaluation.plan import Evaluation
from evaluation.stamps import read_stamp, stamp_path
from moma_lightning.training.guards import Preempted
from tests.evaluation.fakes import BlindPainter, Painter, fake_config, made

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
    assert settings["sampler"]["num_inference_steps"] == 8
    assert settings["weights"] == {}  # test_methods.py has those of methods that have some
    assert set(settings["input"]) == {"image", "mask"}
    assert all(settings["input"].values())
    assert (provenance["name"], provenance["protocol"]) == ("a", "dreambooth-mini, modified")
    assert provenance["protocol_digest"] == config.resolved_protocol().digest
    assert provenance["reference"].endswith("old_boot/00.png")


def test_methods_share_their_noise(tmp_path, log):
    generate(fake_config(tmp_path, {"a": Painter(0.3, log), "b": Painter(0.6, log + "b")}))
    assert made(log) == made(log + "b")


class Small(Painter):
    """On a device that holds so many pictures at a time as `most`."""

    most = 0
    error: ClassVar[Exception] = torch.OutOfMemoryError("CUDA out of memory")

    def generate(self, subject, reference, tasks):
        if len(tasks) > self.most:
            raise self.error
        return super().generate(subject, reference, tasks)


class Forgetful(Painter):
    """Returns no picture for its last task."""

    def generate(self, subject, reference, tasks):
        return super().generate(subject, reference, tasks[:-1])


@pytest.mark.parametrize(("most", "tried"), [(2, [2]), (1, [2, 1])])
def test_a_batch_too_large_for_the_device_is_halved_until_it_fits(tmp_path, monkeypatch, log, most, tried):
    """Five pictures a subject: halved for the first subject, and so for the others; the next method begins with the whole batch."""
    monkeypatch.setattr(Small, "most", most)
    prompts = {"context_prompts": 3, "texture_prompts": 2}
    config = fake_config(tmp_path / "small", {"a": Small(0.3, log), "b": BlindPainter(0.3, log + "b")}, prompts)
    config.batch_size = 8
    with pytest.warns(UserWarning, match="a: the device's memory does not hold 5 pictures at once, 2 are tried") as warned:
        generate(config)
    told = [str(one.message) for one in warned if "does not hold" in str(one.message)]
    assert all(f"{count} are tried" in text for count, text in zip(tried, told, strict=True))
    whole = fake_config(tmp_path / "whole", {"a": Painter(0.3), "b": BlindPainter(0.3)}, prompts)
    generate(whole)
    pictures = {path.relative_to(whole.pictures): path.read_bytes() for path in whole.pictures.rglob("*.png")}
    assert pictures == {path.relative_to(config.pictures): path.read_bytes() for path in config.pictures.rglob("*.png")}
    assert len(made(log)) == len(pictures) // 2 == 3 * 5


@pytest.mark.parametrize("told", ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."])
def test_a_shortage_that_the_driver_tells_halves_the_batch_too(tmp_path, monkeypatch, told):
    monkeypatch.setattr(Small, "most", 1)
    monkeypatch.setattr(Small, "error", RuntimeError(told))
    with pytest.warns(UserWarning, match="does not hold 2"):
        generate(fake_config(tmp_path, {"a": Small(0.3)}))


def test_a_picture_that_a_method_refuses_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Small, "error", ValueError("the mask of 'cat' is empty"))
    with pytest.raises(ValueError, match=r"a, with .*00\.png: the mask of 'cat' is empty"):
        generate(fake_config(tmp_path, {"a": Small(0.3)}))


def test_another_error_does_not_halve_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(Small, "error", RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        generate(fake_config(tmp_path, {"a": Small(0.3)}))


def test_a_device_too_small_for_one_picture_is_told(tmp_path):
    with pytest.warns(UserWarning, match="does not hold 2"), pytest.raises(torch.OutOfMemoryError):
        generate(fake_config(tmp_path, {"a": Small(0.3)}))


def test_a_picture_too_few_is_an_error_and_not_another_tasks(tmp_path):
    config = fake_config(tmp_path, {"a": Forgetful(0.3)})
    with pytest.raises(ValueError, match=r"a: 1 pictures of \w+ for 2 tasks"):
        generate(config)
    assert not list(config.pictures.rglob("*.png"))


@pytest.mark.parametrize("returned", [None, torch.zeros(2, 3, 8, 8), [np.zeros((8, 8, 3))] * 2])
def test_what_is_no_list_of_pictures_is_an_error(tmp_path, monkeypatch, returned):
    """None too, of a method without `return`: it is not taken for a device that is full, and asked again for ever."""
    config = fake_config(tmp_path, {"a": Painter(0.3)})
    monkeypatch.setattr(Painter, "generate", lambda *_: returned)
    with pytest.raises(ValueError, match="a: generate has to return a list of PIL pictures"):
        generate(config)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_black_picture_is_told_and_not_scored(tmp_path, monkeypatch, mode):
    """As diffusers' safety checkers leave them, and values that are no numbers."""
    black, speck = Image.new(mode, (8, 8)), Image.new("RGB", (8, 8))
    speck.putpixel((3, 3), (1, 0, 0))
    config = fake_config(tmp_path, {"a": Painter(0.3)})
    monkeypatch.setattr(Painter, "generate", lambda *_: [speck, black])
    with pytest.raises(ValueError, match=r"^a, red_mug, 'a mug in the jungle': all black"):
        generate(config)
    assert not list(config.pictures.rglob("*.png"))


def test_nothing_is_made_twice(tmp_path, log):
    config = fake_config(tmp_path, {"a": Painter(0.3, log)})
    generate(config)
    generate(config)
    assert len(made(log)) == PICTURES


@pytest.fixture
def interruptible():
    """The Trainer ends on Ctrl-C by leaving the process, deaf to further ones."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_goes_on_after_an_interrupt(tmp_path, log):
    with pytest.raises(SystemExit):
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


def share(config, rank: int, count: int) -> PictureMaker:
    """What one of `count` processes would make, without starting it."""
    maker = PictureMaker(config, config.methods, {})
    strategy = SimpleNamespace(broadcast=lambda told: told, root_device=torch.device("cpu"))
    maker._trainer = SimpleNamespace(global_rank=rank, world_size=count, strategy=strategy)
    maker.setup("predict")
    assert list(maker.predict_dataloader()) == list(range(len(maker.work)))
    return maker


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_all_pictures_once(tmp_path, count):
    """Nothing is padded to even shares, and a process may have none."""
    config = fake_config(tmp_path, {"a": Painter(0.3), "b": Painter(0.4), "real": RealImages()})
    shares = [[plan.path for _, batch in share(config, rank, count).work for (plan,) in batch] for rank in range(count)]
    expected = [plan.path for name in "ab" for plan in Evaluation.open(config).planned(name, config.methods[name])]
    assert sorted(path for one in shares for path in one) == sorted(expected)
    assert [len({path.parent.name for path in one}) for one in shares] == {1: [3], 2: [2, 1], 3: [1] * 3, 5: [1, 1, 1, 0, 0]}[count]


@pytest.mark.parametrize(("batch", "pictures"), [(1, 2), (6, PICTURES)])
def test_a_sigterm_ends_it_after_its_batch_with_trainings_exit_code(tmp_path, log, monkeypatch, caplog, batch, pictures):
    """Also where no batch is left: what comes next, in this process or in a Makefile, is not begun."""
    config, calls, draw = fake_config(tmp_path, {"a": Painter(0.3, log)}), [], Painter.generate

    def told(*given):
        calls.append(given)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*given)

    monkeypatch.setattr(Painter, "generate", told)
    monkeypatch.setattr(_SignalConnector, "_sigterm_notifier_fn", lambda *_: pytest.fail("Lightning's own waits for the other processes"))
    before = signal.getsignal(signal.SIGTERM)
    with caplog.at_level("INFO"), pytest.raises(Preempted) as stop:
        generate(config)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert len(made(log)) == len(list(config.pictures.rglob("*.png"))) == pictures
    assert "told to end: what is made is kept, and the same command goes on from there" in caplog.messages


def test_nothing_is_left_beside_the_pictures(tmp_path):
    config = fake_config(tmp_path, {"a": Painter(), "real": RealImages()})
    generate(config)
    assert {p.suffix for p in Path(config.run).rglob("*") if p.is_file()} == {".png", ".json"}
    assert not list(Path(config.run).rglob(".*"))
    assert [p.name for p in config.pictures.iterdir()] == ["a"]


def test_batches_never_mix_references(tmp_path):
    config = fake_config(tmp_path, {"a": Painter()}, {"references": "every"})
    found = list(batches(shared(config.methods["a"], Evaluation.open(config).planned("a", config.methods["a"])), 2))
    assert [len(batch) for batch in found] == [2, 1] * 9
    assert all(len({plan.reference for (plan,) in batch}) == 1 for batch in found)


def test_a_method_without_the_reference_draws_once_for_all_references(tmp_path, log):
    config = fake_config(tmp_path, {"blind": BlindPainter(0.3, log)}, {"references": "every"})
    generate(config)
    assert len(made(log)) == PICTURES
    plans = Evaluation.open(config).planned("blind", config.methods["blind"])
    assert len(plans) == 3 * PICTURES and all(plan.is_done for plan in plans)
    for _, same in groupby(sorted(plans, key=lambda plan: plan.task.seed), key=lambda plan: plan.task.seed):
        assert len({plan.path.read_bytes() for plan in same}) == 1
    plans[0].path.unlink()
    generate(config)
    assert len(made(log)) == PICTURES + 1 and plans[0].is_done


def test_what_a_method_cannot_work_with_is_said_before_the_first_picture(tmp_path, log):
    config = fake_config(tmp_path, {"a": Painter(0.3, log), "word": TextualInversion()}, dtype="bfloat16")
    with pytest.raises(ValueError, match="TextualInversion trains, which needs `dtype: float32`"):
        generate(config)
    assert not made(log)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    config = fake_config(tmp_path, {"a": Painter()})

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"was not written \(No space left on device\)"):
        generate(config)


def test_no_methods_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no methods"):
        generate(fake_config(tmp_path, {}))
