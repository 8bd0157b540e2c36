"""Readers that go on where a checkpoint says that they stood."""

import collections
import itertools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from tests.datamodules.test_triplets import epochs


@pytest.mark.parametrize(("workers", "handed_over"), [(0, 1), (0, 3), (0, 4), (0, 7), (0, 11), (2, 3), (2, 6), (3, 5)])
def test_resume_goes_on_with_the_next_batch(shards, tools, workers, handed_over):
    """Within an epoch too, where with three workers the next batch is not the first worker's; a fourth of its epochs is uneven."""
    whole = epochs(tools.datamodule(shards, flip=True, num_workers=workers), 4)
    killed = tools.datamodule(shards, flip=True, num_workers=workers)
    loader = killed.train_dataloader()
    stream = itertools.chain.from_iterable(loader for _ in range(4))
    before = [next(stream).key for _ in range(handed_over)]
    resumed = tools.datamodule(shards, flip=True, num_workers=workers)
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict()), object_pairs_hook=_integer_keys))
    after = epochs(resumed, 4)
    assert before + after[: 16 - handed_over] == whole


def _integer_keys(pairs):
    return {int(key) if key.isdigit() else key: value for key, value in pairs}


def test_resumed_pixels_are_the_same(shards, tools):
    """Not the keys alone: the random square and flip of a sample do not depend on when it was read."""
    pixels = [batch.pixel_values for batch in tools.datamodule(shards, flip=True, steps_per_epoch=9).train_dataloader()]
    resumed = tools.datamodule(shards, flip=True, steps_per_epoch=9)
    resumed.load_state_dict({"readers": [1, 1], "positions": {0: (0, 8)}})
    assert all(torch.equal(a, b.pixel_values) for a, b in zip(pixels[4:], resumed.train_dataloader(), strict=False))


def test_resume_with_workers_repeats_and_loses_nothing_at_an_epochs_end(shards, tools):
    options = {"num_workers": 2, "steps_per_epoch": 4}
    whole = epochs(tools.datamodule(shards, **options), 3)
    killed = tools.datamodule(shards, **options)
    before = epochs(killed, 1)
    resumed = tools.datamodule(shards, **options)
    resumed.load_state_dict(killed.state_dict())
    assert before + epochs(resumed, 2) == whole


def test_each_rank_goes_on_where_it_stood(shards, tools, monkeypatch):
    """Rank 1 of 2 with two workers reads readers 2 and 3 of the checkpoint."""
    rank = collections.namedtuple("Trainer", "global_rank world_size default_root_dir")
    module = tools.datamodule(shards, num_workers=2, prepared=False)
    module.trainer = rank(1, 2, "")
    module.progress.positions = {0: (1, 2), 1: (0, 3)}
    monkeypatch.setattr("datamodules.triplets.over_ranks", lambda own: [{0: (5, 5), 1: (6, 6)}, own])
    state = module.state_dict()
    assert state["positions"] == {0: (5, 5), 1: (6, 6), 2: (1, 2), 3: (0, 3)}
    resumed = tools.datamodule(shards, num_workers=2, prepared=False)
    resumed.trainer = rank(1, 2, "")
    resumed.load_state_dict(state)
    assert resumed.progress.positions == {0: (1, 2), 1: (0, 3)}


def test_resume_with_other_workers_starts_the_next_pass(shards, tools):
    killed = tools.datamodule(shards)
    epochs(killed, 2)
    state = killed.state_dict()
    assert state == {"readers": [1, 1], "order": state["order"], "sizes": state["sizes"], "positions": {0: (1, 4)}, "given": 0,
                     "samples_a_step": 2}
    resumed = tools.datamodule(shards, num_workers=2)
    with pytest.warns(UserWarning, match="reading goes on with the next pass"):
        resumed.load_state_dict(killed.state_dict())
    assert resumed.progress.positions == {0: (2, 0), 1: (2, 0)}
    with pytest.warns(UserWarning, match="reading goes on with the next pass"):
        resumed.load_state_dict(state | {"readers": [2, 1], "positions": {0: (1, 4), 1: (3, 2)}})
    assert resumed.progress.positions == {0: (4, 0), 1: (4, 0)}, "no reader reads what the fastest has read"


@pytest.mark.parametrize(("ranks", "accumulated", "size", "told"), [(4, 1, 2, None), (1, 2, 4, None), (2, 1, 2, 4), (4, 2, 2, 16), (4, 1, 3, 12)])
def test_a_step_of_another_number_of_samples_is_told_of(shards, tools, ranks, accumulated, size, told):
    """Eight in the checkpoint. One from before that knows no number is no other."""
    state = {"readers": [ranks, 1], "positions": {}, "samples_a_step": 8}
    resumed = tools.datamodule(shards, batch_size=size)
    resumed.trainer = SimpleNamespace(global_rank=0, world_size=ranks, accumulate_grad_batches=accumulated, default_root_dir="")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.load_state_dict(state)
        resumed.load_state_dict({"readers": [ranks, 1], "positions": {}})
    assert [str(each.message)[:64] for each in caught] == ([f"a step has {told} samples from here on, the checkpoint's had 8 (ranks"[:64]] if told else [])


@pytest.mark.parametrize("changed", [{"seed": 3}, {"shuffle_buffer": 2}])
def test_a_changed_order_starts_with_the_next_pass(shards, tools, changed):
    """A position in one order means nothing in another: samples would be seen twice or never."""
    first = tools.datamodule(shards)
    iterator = iter(first.train_dataloader())
    next(iterator), next(iterator)
    state = first.state_dict()
    same, other = tools.datamodule(shards), tools.datamodule(shards, **changed)
    same.load_state_dict(state)
    other.load_state_dict(state)
    assert same.progress.positions == {0: (0, 4)} and other.progress.positions == {0: (1, 0)}


def test_shards_that_were_replaced_under_their_names_are_told(shards, tools):
    first = tools.datamodule(shards)
    next(iter(first.train_dataloader()))
    state = first.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tools.datamodule(shards).load_state_dict(state)
        tools.datamodule(shards).load_state_dict({key: value for key, value in state.items() if key != "sizes"})  # of a checkpoint from before
    tools.write_tar(shards / "train-00001.tar", {f"new{i}": tools.sample(i) for i in range(9)})
    resumed = tools.datamodule(shards)
    with pytest.warns(UserWarning, match="of other sizes than the checkpoint's"):
        resumed.load_state_dict(state)
    assert resumed.progress.positions == {0: (0, 2)}
