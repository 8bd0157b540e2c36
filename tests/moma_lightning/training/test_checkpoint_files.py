"""Checkpoints that are cut short, of another kind, or could not be written."""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

from moma_lightning.training import checkpoint_folder, strategy
from moma_lightning.training.checkpoint_io import WholeCheckpointIO

TENSORS = {"state_dict": {"weight": torch.ones(4, 4)}}


def save(path, step):
    checkpoint_folder.save(path, TENSORS, {"global_step": step}, rank=0, barrier=lambda: None, broadcast=lambda value: value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_cut_short_is_named(tmp_path, share):
    path = tmp_path / "last.ckpt"
    torch.save(TENSORS | {"epoch": 1}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"last\.ckpt is not a whole checkpoint .*--ckpt_path"):
        WholeCheckpointIO().load_checkpoint(path, weights_only=True)


def test_a_folder_read_by_a_strategy_that_does_not_shard_is_named(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    with pytest.raises(ValueError, match=r"last\.ckpt is a folder.*--trainer\.strategy sharded"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=True)


def test_a_removed_checkpoint_takes_its_folder_along(tmp_path):
    save(tmp_path / "best.ckpt", 1)
    save(tmp_path / "last.ckpt", 1)
    WholeCheckpointIO().remove_checkpoint(tmp_path / "best.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".last.ckpt-1", "last.ckpt"]


def test_a_folder_takes_a_files_place_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    torch.save({"global_step": 1}, path)

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(path, 2)
    assert torch.load(path, weights_only=True) == {"global_step": 1}
    save(path, 3)
    assert path.is_dir() and torch.load(path / checkpoint_folder.REST, weights_only=True) == {"global_step": 3}


def test_a_file_takes_a_folders_place_and_leaves_nothing_of_it(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    save(tmp_path / "best.ckpt", 1)
    WholeCheckpointIO().save_checkpoint(TENSORS, tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".best.ckpt-1", "best.ckpt", "last.ckpt"] and (tmp_path / "last.ckpt").is_file()


def test_a_folders_files_are_on_the_disk_before_the_link_turns_to_it(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}"))) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda source, target: done.append(f"turned {target.name}") or replace(source, target))
    save(tmp_path / "last.ckpt", 1)
    before = done[: done.index("turned last.ckpt")]
    assert {path.name for path in (tmp_path / "last.ckpt").iterdir()} <= set(before) and checkpoint_folder.REST in before


def test_a_full_disk_leaves_the_folder_from_before(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(path, 1)

    def full(tensors, checkpoint_id):
        (checkpoint_id / "__0_0.distcp").parent.mkdir()
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", full)
        for step in (2, 3):
            with pytest.raises(OSError, match=r"last\.ckpt was not written .*No space left"):
                save(path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".last.ckpt-1", ".last.ckpt-3", "last.ckpt"], "what was left half takes no more place"
    assert torch.load(path / checkpoint_folder.REST, weights_only=True) == {"global_step": 1}
    save(path, 2)
    assert torch.load(path / checkpoint_folder.REST, weights_only=True) == {"global_step": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".last.ckpt-2", "last.ckpt"]


def test_a_disk_that_is_full_for_the_last_part_is_told_too(tmp_path, monkeypatch):
    path, written = tmp_path / "last.ckpt", torch.save
    save(path, 1)

    def full(value, file):
        if isinstance(value, dict) and value.get("global_step") == 2:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662")
        written(value, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"last\.ckpt was not written .*unexpected pos"):
        save(path, 2)
    assert torch.load(path / checkpoint_folder.REST, weights_only=True) == {"global_step": 1}


def test_a_parameter_that_never_had_a_gradient_is_not_asked_for():
    """A fresh optimizer is given state for all that is trained; the folder has it for what was stepped."""
    fresh = {"state": {0: {"step": 1}, 1: {"step": 1}, 10: {"step": 1}}, "param_groups": []}
    entries = ["optimizer_states.0.state.1.step", "optimizer_states.0.state.1.exp_avg", "optimizer_states.1.state.10.step", "state_dict.0"]
    assert strategy._saved(fresh, "optimizer_states.0.state.", entries) == {"state": {1: {"step": 1}}, "param_groups": []}
