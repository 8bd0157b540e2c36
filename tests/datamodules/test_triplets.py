import collections
import itertools
import json
import re
import traceback
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import streams, triplets
from datamodules.samples import BadSampleError, decode
from datamodules.streams import TrainStream, ValStream
from datamodules.triplets import TripletDataModule, require_the_same_shards
from moma_lightning.batch import TripletBatch
from moma_lightning.training.pace import Pace

ALL = [f"s{row:02d}" for row in range(12)]
quiet = pytest.mark.filterwarnings("ignore:.*It is skipped")


def epochs(module: TripletDataModule, count: int) -> list[list[str]]:
    """Keys of each batch over some epochs."""
    loader = module.train_dataloader()
    return [batch.key for _ in range(count) for batch in loader]


def error_of(read: Callable[[], object]) -> str:
    """The BadSampleError's message. The traceback goes at once: for workers of a loader in it, collected at some time, PyTorch waits 5 s each."""
    try:
        read()
    except BadSampleError as error:
        traceback.clear_frames(error.__traceback__)
        return str(error)
    pytest.fail("no BadSampleError")


def test_batch(shards, tools):
    batch = next(iter(tools.datamodule(shards, batch_size=3).train_dataloader()))
    assert isinstance(batch, TripletBatch) and len(batch) == 3
    assert batch.pixel_values.shape == (3, 3, 16, 16) and batch.subject_mask.shape == (3, 1, 16, 16)
    assert batch.pixel_values.min() >= -1 and batch.pixel_values.max() <= 1
    assert batch.subject_mask.unique().tolist() == [0, 1]
    for key, caption, pixels in zip(batch.key, batch.caption, batch.pixel_values, strict=True):
        number = int(key[1:])
        assert caption.endswith(f" {number}") and pixels[1, 5, 5] == pytest.approx(number / 127.5 - 1, abs=1e-6)


def test_the_full_caption_is_the_samples_own_where_it_has_one(tmp_path, tools):
    fields = {"caption": "a toy robot in the city", "caption_full": "a red toy robot in the city", "label": "toy robot"}
    tools.write_tar(tmp_path / "train-00000.tar", {"s00": tools.sample(0, json=json.dumps(fields).encode()), "s01": tools.sample(1)})
    batch = next(iter(tools.datamodule(tmp_path).val_dataloader()))
    assert (batch.caption[0], batch.full_caption) == (fields["caption"], [fields["caption_full"], batch.caption[1]])


def test_epochs_have_a_fixed_length_and_go_through_pass_after_pass(shards, tools):
    loader = tools.datamodule(shards, steps_per_epoch=3).train_dataloader()
    assert len(loader) == 3 == len(list(loader)) == len(list(loader))
    keys = list(itertools.chain(*epochs(tools.datamodule(shards, steps_per_epoch=6), 3)))
    passes = [keys[i : i + 12] for i in range(0, 36, 12)]
    assert all(sorted(one) == ALL for one in passes), "every pass has every sample once, across the borders of epochs"
    assert passes[0] != passes[1] != passes[2], "passes are shuffled anew"
    assert [k[:2] for k in passes[0]] != sorted(k[:2] for k in passes[0])


def test_it_tells_how_long_batches_were_waited_for(shards, tools, monkeypatch):
    """A clock that goes on by 1 second a sample read, and by 50 between the batches."""
    now = [0.0]
    monkeypatch.setattr(triplets, "time", Mock(perf_counter=lambda: now[0]))
    monkeypatch.setattr(streams, "decode", lambda *args: (now.__setitem__(0, now[0] + 1), decode(*args))[1])
    loader = tools.datamodule(shards, batch_size=4, steps_per_epoch=3).train_dataloader()
    for _ in range(2):
        for _ in loader:
            now[0] += 50
    assert loader.waited == 2 * 3 * 4 and now[0] == 24 + 6 * 50


def test_same_seed_same_batches(shards, tools):
    assert epochs(tools.datamodule(shards), 2) == epochs(tools.datamodule(shards), 2)
    assert epochs(tools.datamodule(shards), 2) != epochs(tools.datamodule(shards, seed=1), 2)


@pytest.mark.parametrize(("count", "buffer"), [(12, 0), (1, 12)], ids=["shards", "samples"])
def test_the_order_is_new_in_each_pass_and_for_each_seed(tmp_path, tools, count, buffer):
    """Of the shards, here of one sample each, and of the samples, here in one shard."""
    for number, keys in enumerate([ALL] if count == 1 else [[key] for key in ALL]):
        tools.write_tar(tmp_path / f"train-{number:05d}.tar", {key: tools.sample(0) for key in keys})
    orders = [batch.key for seed in (0, 1) for batch in tools.datamodule(
        tmp_path, batch_size=12, steps_per_epoch=2, shuffle_buffer=buffer, seed=seed).train_dataloader()]
    assert all(sorted(order) == ALL for order in orders) and len(set(map(tuple, orders))) == 4


def test_pictures_are_flipped_anew_by_each_reader_in_each_pass_and_for_each_seed(tmp_path, tools):
    for number in range(2):
        tools.write_tar(tmp_path / f"train-{number:05d}.tar", {f"s{row:02d}": tools.sample(row) for row in range(24)})

    def flips(rank: int, seed: int) -> list[tuple[bool, ...]]:
        """Of one rank of two in two passes over its one shard of 24, by the mask's place."""
        module = tools.datamodule(tmp_path, flip=True, shuffle_buffer=0, batch_size=24, seed=seed)
        stream = TrainStream(module.config, module.train_shards, module.bad_samples, rank, 2, {})
        return [tuple(batch.subject_mask[:, 0, 5, 11].bool().tolist()) for batch, *_ in itertools.islice(stream._batches(0, 1), 2)]

    drawn = [*flips(0, 0), *flips(1, 0), *flips(0, 1)]
    assert len(set(drawn)) == 6 and 0.4 < sum(map(sum, drawn)) / (6 * 24) < 0.6


def test_training_cuts_and_flips_at_random_and_validation_neither(tmp_path, tools):
    """A subject on the left of a wide picture: the most central square with all of it has it at its left edge."""
    wide = tools.sample(0, png=tools.encode(tools.picture(0, (32, 16))), mask_png=tools.encode(tools.mask((32, 16))))
    tools.write_tar(tmp_path / "train-00000.tar", dict.fromkeys(ALL, wide))
    module = tools.datamodule(tmp_path, flip=True, batch_size=12, steps_per_epoch=1)
    trained, validated = (next(iter(loader)).subject_mask[:, 0, 5] for loader in (module.train_dataloader(), module.val_dataloader()))
    assert len(trained.unique(dim=0)) > 4
    assert torch.equal(validated, (torch.arange(16) < 6).float().expand(12, -1))


def test_ranks_and_workers_share_a_pass(shards, tools):
    config = tools.datamodule(shards, batch_size=1).config
    for ranks in (1, 2, 4):
        seen = collections.Counter()
        for rank in range(ranks):
            module = tools.datamodule(shards)
            stream = TrainStream(config, module.train_shards, module.bad_samples, rank, ranks, {})
            seen.update(batch.key[0] for batch, *_ in itertools.islice(stream._batches(0, 1), 12 // ranks))
        assert sorted(seen.elements()) == ALL


def test_two_workers_share_a_pass(shards, tools):
    module = tools.datamodule(shards, num_workers=2, batch_size=3, steps_per_epoch=4)
    loader = module.train_dataloader()
    first, second = ([key for batch in loader for key in batch.key] for _ in range(2))
    assert sorted(first) == sorted(second) == ALL and first != second
    assert module.progress.positions == {0: (1, 6), 1: (1, 6)}


def test_uneven_shards_give_every_rank_the_same_number_of_steps(shards, tools):
    tools.write_tar(shards / "train-00000.tar", {"s00": tools.sample(0)})
    module = tools.datamodule(shards, steps_per_epoch=50)
    for rank in range(4):
        stream = TrainStream(module.config, module.train_shards, module.bad_samples, rank, 4, {})
        assert len(list(stream)) == 50


@pytest.mark.parametrize("other", [["b.tar"], ["a.tar", "b.tar", "c.tar"], ["a.tar", "x.tar"], ["a.tar", "b.tar", "b.tar"]])
def test_ranks_that_see_other_shards_are_named(other):
    require_the_same_shards([["a.tar", "b.tar"]] * 3)
    with pytest.raises(ValueError, match=r"rank 2 sees \d shards and rank 0 2: .*Put the same shards on every node"):
        require_the_same_shards([["a.tar", "b.tar"], ["a.tar", "b.tar"], other])


def test_too_few_shards_is_an_early_error(shards, tools):
    with pytest.raises(ValueError, match=r"4 training shards are too few for 1 ranks x 5 workers"):
        tools.datamodule(shards, num_workers=5)
    module = tools.datamodule(shards, num_workers=2, prepared=False)
    module.trainer = collections.namedtuple("Trainer", "global_rank world_size default_root_dir")(0, 4, "")
    with pytest.raises(ValueError, match="4 ranks need data.config.val_batches"):
        module.setup("fit")
    module.config.val_batches = 1
    with pytest.raises(ValueError, match="for 4 ranks x 2 workers = 8 readers: set num_workers to at most 1,"):
        module.setup("fit")
    module.setup("validate")


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_is_each_sample_once_in_the_same_batches(shards, tools, workers):
    loader = tools.datamodule(shards, num_workers=workers, batch_size=5).val_dataloader()
    assert tools.keys(loader) == tools.keys(loader) == [ALL[:5], ALL[5:10], ALL[10:]]
    short = tools.datamodule(shards, num_workers=workers, batch_size=5, val_batches=2).val_dataloader()
    assert tools.keys(short) == [ALL[:5], ALL[5:10]]


def test_validation_over_ranks(shards, tools):
    def batches_of(rank, ranks, batches):
        module = tools.datamodule(shards, batch_size=3, val_batches=batches)
        return list(ValStream(module.config, module.val_shards, module.bad_samples, rank, ranks))

    def of_rank(*args):
        return [batch.key for batch in batches_of(*args)]

    assert [of_rank(rank, 2, 2) for rank in (0, 1)] == [[ALL[:3], ALL[6:9]], [ALL[3:6], ALL[9:]]]
    assert of_rank(2, 3, 2) == [ALL[6:9], ALL[6:9]] and of_rank(0, 3, 2) == [ALL[:3], ALL[9:]]
    assert of_rank(4, 5, 1) == [ALL[:3]] and of_rank(6, 7, 2) == [ALL[6:9], ALL[6:9]]  # four batches: ranks beyond them give those again
    for ranks in (2, 3, 7):
        counted = [batch.key for rank in range(ranks) for batch in batches_of(rank, ranks, 4) if not batch.repeated]
        assert sorted(counted) == [ALL[:3], ALL[3:6], ALL[6:9], ALL[9:]], "each counts once, however many ranks and batches there are"


OTHER = json.dumps({"caption": "a dog", "label": "cat"}).encode()
BAD = {
    "cut": ("picture cannot be read", lambda tools: {"png": None, "jpg": tools.encode(tools.picture(), "JPEG")[:500]}),
    "black": ("mask is empty", lambda tools: {"mask_png": tools.encode(tools.mask(box=(0, 0, 0, 0)))}),
    "mute": ("caption is missing", lambda tools: {"json": json.dumps({"label": "cat"}).encode()}),
    "other": ("label is absent from the caption", lambda tools: {"json": OTHER}),
}


@pytest.fixture
def shards_with_bad(shards, tools):
    samples = {"s00": tools.sample(0)} | {key: tools.sample(0, **make(tools)) for key, (_, make) in BAD.items()}
    tools.write_tar(shards / "train-00000.tar", samples | {"s01": tools.sample(1), "s02": tools.sample(2)})
    whole = (shards / "train-00003.tar").read_bytes()
    (shards / "train-00003.tar").write_bytes(whole[: whole.index(b"s11.json") + 100])
    return shards


@quiet
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_counted_and_named(shards_with_bad, tools, workers):
    module = tools.datamodule(shards_with_bad, num_workers=workers, batch_size=1, steps_per_epoch=40)
    keys = {key for batch in epochs(module, 2) for key in batch}
    assert keys == set(ALL[:11])
    assert module.bad_samples.counts() == {reason: 1 for reason, _ in BAD.values()} | {"shard is cut short or damaged": 1}
    log = (shards_with_bad / "bad.log").read_text()
    for key in BAD:
        assert f"train-00000.tar\t{key}\t" in log
    assert "train-00003.tar\t-\t" in log


@quiet
def test_bad_samples_in_validation_leave_batches_smaller(shards_with_bad, tools):
    loader = tools.datamodule(shards_with_bad, batch_size=4).val_dataloader()
    assert tools.keys(loader)[:2] == [["s00"], ["s01", "s02", "s03"]] and tools.keys(loader) == tools.keys(loader)


@quiet
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("bad", "given"), [
    ([2], [(ALL[:3], False), (ALL[:3], True)]),
    ([0], [(ALL[3:6], True), (ALL[6:9], False)]),
    ([0, 2], [(ALL[3:6], True), (ALL[3:6], True)]),
])
def test_a_rank_with_a_validation_batch_of_bad_samples_alone_keeps_step(shards, tools, workers, bad, given):
    """Shards and batches of three; of two ranks the first has the first batch and the third."""
    for number in bad:
        tools.write_tar(shards / f"train-{number:05d}.tar", {f"b{i}": tools.sample(0, json=b"") for i in range(3)})
    module = tools.datamodule(shards, batch_size=3, num_workers=workers, val_batches=2)
    module.trainer = Mock(global_rank=0, world_size=2, default_root_dir=str(shards))
    assert [(batch.key, batch.repeated) for batch in module.val_dataloader()] == given


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_can_be_fatal(shards_with_bad, tools, workers):
    module = tools.datamodule(shards_with_bad, on_error="raise", num_workers=workers, steps_per_epoch=40)
    assert re.search(r"train-0000[03].tar, sample (cut|black|mute|other|-): ", error_of(lambda: epochs(module, 1)))


@quiet
@pytest.mark.parametrize("workers", [0, 2])
def test_no_good_sample_at_all_raises(shards, tools, workers):
    for number in range(4):
        tools.write_tar(shards / f"train-{number:05d}.tar", {"k": tools.sample(0, json=b"")})
    module = tools.datamodule(shards, num_workers=workers)
    assert re.search(r"none of 4 shards .* has a usable sample: see .*bad.log", error_of(lambda: epochs(module, 1)))
    assert re.search("none of 4 shards", error_of(lambda: list(module.val_dataloader())))


def test_shards_without_samples_raise_and_name_no_log(shards, tools):
    for number in range(4):
        tools.write_tar(shards / f"train-{number:05d}.tar", {})
    assert re.search(r"none of 4 shards .* has a usable sample: they are empty", error_of(lambda: epochs(tools.datamodule(shards), 1)))


@quiet
def test_a_reader_with_bad_shards_only_goes_on_with_the_next_pass(shards, tools):
    for number in range(1, 4):
        tools.write_tar(shards / f"train-{number:05d}.tar", {"k": tools.sample(0, json=b"")})
    module = tools.datamodule(shards, num_workers=2, batch_size=1, steps_per_epoch=20)
    assert {key for batch in epochs(module, 1) for key in batch} == {"s00", "s01", "s02"}


class Recorder(LightningModule):
    """Keeps the keys it sees; fails at a step when told to."""

    def __init__(self, fails_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fails_at, self.seen, self.validated = fails_at, [], []

    def training_step(self, batch: TripletBatch, index: int):
        if self.global_step == self.fails_at:
            raise KeyboardInterrupt
        self.seen.append(batch.key)
        return self.weight * batch.pixel_values.mean()

    def validation_step(self, batch: TripletBatch, index: int):
        self.validated.append(batch.key)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, module: Recorder, data: TripletDataModule, resume=None, callback: Callback | None = None):
    callback = callback or ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=0)
    trainer = Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
                      callbacks=[callback], default_root_dir=folder)
    trainer.fit(module, data, ckpt_path=resume)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fails_at", [2, 4, 6])
def test_lightning_run_killed_and_resumed_sees_what_an_unbroken_one_sees(shards, tools, tmp_path, fails_at):
    whole = fit(tmp_path / "whole", Recorder(), tools.datamodule(shards, prepared=False))
    assert len(whole.seen) == 12
    killed = Recorder(fails_at)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "killed", killed, tools.datamodule(shards, prepared=False))
    resumed = fit(tmp_path / "killed", Recorder(), tools.datamodule(shards, prepared=False), tmp_path / "killed" / "last.ckpt")
    assert killed.seen + resumed.seen == whole.seen
    assert resumed.validated[-6:] == whole.validated[-6:] and whole.validated[-6:] == [ALL[i : i + 2] for i in range(0, 12, 2)]


@pytest.mark.filterwarnings("ignore")
def test_the_wait_for_its_batches_is_logged(shards, tools, tmp_path):
    module = fit(tmp_path, Recorder(), tools.datamodule(shards, prepared=False), callback=Pace())
    assert 0 < module.trainer.callback_metrics["train/data_wait"] < 1


@pytest.mark.parametrize("limit", [1, 0.5])
def test_an_epoch_that_is_cut_off_is_refused(shards, tools, tmp_path, limit):
    """Workers read ahead, so that samples would be lost, and a resumed epoch would begin in the middle."""
    trainer = Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=limit, logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="limit_train_batches .* ends an epoch within its 4 steps: set data.config.steps_per_epoch"):
        trainer.fit(Recorder(), tools.datamodule(shards, prepared=False))


def test_batches_that_are_to_be_overfitted_are_refused(shards, tools, tmp_path):
    trainer = Trainer(accelerator="cpu", max_epochs=1, overfit_batches=4, logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="trainer.overfit_batches: every epoch has other batches here"):
        trainer.fit(Recorder(), tools.datamodule(shards, prepared=False))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"steps_per_epoch": 0}, {"num_workers": -1}])
def test_numbers_that_cannot_work_are_named(shards, tools, options):
    with pytest.raises(ValueError, match=f"data.config.{next(iter(options))} is"):
        tools.datamodule(shards, **options)


@pytest.mark.filterwarnings("ignore")
def test_log_stands_in_the_trainers_folder(shards_with_bad, tools, tmp_path):
    data = tools.datamodule(shards_with_bad, prepared=False, bad_samples=None, steps_per_epoch=9)
    fit(tmp_path / "run", Recorder(), data)
    assert "mask is empty" in (tmp_path / "run" / "bad_samples.log").read_text()
