"""A run's folder: what goes on, what begins anew, what is finished, and who may train there."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from moma_lightning.digests import identity
from moma_lightning.training.run import Run
from tests.moma_lightning.one_weight import early_stopping, last_step, logged_steps


def test_a_finished_run_says_so_and_is_left_alone(run, tmp_path, caplog):
    run()
    before = (tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt").stat().st_mtime_ns
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 0 and "training is complete" in caplog.text
    assert (tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt").stat().st_mtime_ns == before


def test_a_finished_run_with_other_settings_is_no_answer_to_these(run, tmp_path):
    run()
    with pytest.raises(SystemExit, match=r"other settings than these \(model.init_args.slope 2.0, it was 1.0; data.init_args.count 7, it was 8\)"):
        run("--model.slope", "2.0", "--data.count", "7")
    with pytest.raises(SystemExit, match=r"seed_everything 1, it was 0"):
        run("--seed_everything", "1")
    with pytest.raises(SystemExit) as stop:
        run("--trainer.log_every_n_steps", "3")
    assert stop.value.code == 0


def test_a_finished_stage_2_is_not_taken_for_one_of_a_new_stage_1(tmp_path):
    decoder, run = tmp_path / "decoder", Run(tmp_path / "stage2")
    run.folder.mkdir()
    decoder.mkdir()
    (decoder / "model.safetensors").write_bytes(b"first")
    told = {"model": {"init_args": {"decoder": str(decoder)}}}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(told))
    run.mark_finished(10, {}, identity(str(decoder)))
    assert run.changed(told) == []
    settings = {"num_workers": 4, "val": "b.tar", "flip": False}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(told | {"data": {"init_args": {"config": settings | {"num_workers": 0, "val": "a.tar"}}}}))
    assert run.changed(told | {"data": {"init_args": {"config": settings}}}) == [], "neither moves what is trained"
    moved = run.changed(told | {"data": {"init_args": {"config": settings | {"flip": True}}}})
    assert moved == ["data.init_args.config.flip True, it was False"]
    (decoder / "model.safetensors").write_bytes(b"second")
    assert run.changed(told) == [f"model.init_args.decoder {str(decoder)!r} holds other weights now"]
    shutil.rmtree(decoder)
    assert run.changed(told) == [], "it is needed no longer"


def test_a_refused_run_does_not_change_what_is_known_of_the_finished_one(run, tmp_path):
    run()
    with pytest.raises(ValueError, match="was trained with other options"):
        run("--model.strict", "other", "--trainer.max_steps", "9")
    with pytest.raises(SystemExit, match="model.init_args.strict 'other', it was 'one'"):
        run("--model.strict", "other")
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 0


@pytest.mark.parametrize("option, value", [("accumulate_grad_batches", "2"), ("gradient_clip_val", "0.5"), ("precision", "bf16-mixed")])
def test_how_it_was_trained_is_a_setting_too(run, option, value):
    run()
    with pytest.raises(SystemExit, match=rf"other settings than these \(trainer.{option} "):
        run(f"--trainer.{option}", value)


def test_a_run_that_goes_on_with_other_settings_says_so(run, tmp_path):
    run()
    with pytest.warns(UserWarning, match=r"goes on with other settings than before \(model.init_args.slope 2.0, it was 1.0\)"):
        run("--model.slope", "2.0", max_steps=6)


def test_a_run_by_epochs_or_stopped_early_is_finished(run, tmp_path):
    run(max_steps=-1, max_epochs=1)
    with pytest.raises(SystemExit) as stop:
        run(max_steps=-1, max_epochs=1)
    assert stop.value.code == 0
    with pytest.raises(SystemExit, match="slope 2.0, it was 1.0"):
        run("--model.slope", "2.0", max_steps=-1, max_epochs=1)
    run(max_steps=-1, max_epochs=2)
    assert last_step(tmp_path) == 16


def test_a_run_that_stopped_early_is_finished(run, tmp_path):
    stop_at_once = {"max_steps": 40, "callbacks": [early_stopping("val/weight", patience=1, mode="min")]}
    run(**stop_at_once)
    assert last_step(tmp_path) == 16
    with pytest.raises(SystemExit) as stop:
        run(**stop_at_once)
    assert stop.value.code == 0


def test_a_run_that_began_from_another_checkpoint_goes_on_from_its_own(run, tmp_path, caplog):
    """As where a job is put back into the queue with its command."""
    run()
    other = str(shutil.copy(tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt", tmp_path / "other.ckpt"))
    mine = ["--trainer.default_root_dir", str(tmp_path / "mine"), "--ckpt_path", other]
    with caplog.at_level("INFO"):
        run(*mine, max_steps=7)
        run(*mine, max_steps=9)
        with pytest.raises(SystemExit) as stop:
            run(*mine, max_steps=9)
    assert stop.value.code == 0 and f"of the run that began from {other}" in caplog.text
    with (tmp_path / "mine/metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == [5, 6, 7, 8]
    run("--trainer.default_root_dir", str(tmp_path / "mine"), "--ckpt_path", str(tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt"), max_steps=6)
    assert torch.load(tmp_path / "mine/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6, "another one is begun from"


def test_a_training_that_began_elsewhere_is_not_finished_by_what_was_there(run, tmp_path):
    """Cut off behind its first checkpoint, in the folder of a finished one with as many steps."""
    run(max_steps=3)
    other = str(shutil.copy(tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt", tmp_path / "other.ckpt"))
    run(max_steps=8)
    with pytest.raises(RuntimeError, match="cut"):
        run("--ckpt_path", other, "--model.raise_at", "7", max_steps=8)
    assert last_step(tmp_path) == 6
    run("--ckpt_path", other, max_steps=8)
    assert last_step(tmp_path) == 8


def test_a_damaged_last_checkpoint_is_left_by_naming_another(run, tmp_path):
    run(max_steps=3)
    last = tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt"
    other = str(shutil.copy(last, tmp_path / "other.ckpt"))
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match="--ckpt_path"):
        run(max_steps=5)
    with pytest.warns(UserWarning, match=f"Training begins from {other}"):
        run("--ckpt_path", other, max_steps=5)
    assert last_step(tmp_path) == 5


def test_a_folder_that_another_process_trains_in_is_refused(run, tmp_path):
    hold = "import sys, pathlib; from moma_lightning.training.run import Run; a = Run(pathlib.Path(sys.argv[1])); a.hold(); print('held', flush=True); input()"
    folder = tmp_path / "runs/tiny/stage1"
    root, pipe = Path(__file__).parents[3], subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold, str(folder)], cwd=root, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SystemExit, match=rf"another process trains here \(.*, process {other.pid}, since "):
            run()
        other.kill()
    run()
    assert last_step(tmp_path) == 5


@pytest.mark.parametrize("before, now, told", [
    ({"lora": None}, {"lora": {"rank": 4}}, ["lora is set, it was None"]),
    ({"lora": {"rank": 4}}, {"lora": None}, ["lora None, it was set"]),
    ({"optimizer": {"lr_multipliers": {}}}, {"optimizer": {"lr_multipliers": {"a": 0.1}}}, ["optimizer.lr_multipliers {'a': 0.1}, it was {}"]),
    ({"optimizer": {"lr_multipliers": {"a": 1, r"b\.": 2}}}, {"optimizer": {"lr_multipliers": {"a": 1}}},
     [r"optimizer.lr_multipliers {'a': 1}, it was {'a': 1, 'b\\.': 2}"]),
    ({"old": 1, "same": {"a": [1]}}, {"new": 2, "same": {"a": [1]}}, []),  # of an older version
])
def test_sections_and_tables_of_settings_are_compared(tmp_path, before, now, told):
    run = Run(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": before}))
    assert run.changed({"model": now}) == [f"model.{each}" for each in told]


def test_more_steps_go_on_from_a_finished_run(run, tmp_path):
    run()
    cli = run(max_steps=7)
    assert float(cli.model.weight.detach()) == 7.0
    assert logged_steps(tmp_path) == list(range(7))


def test_a_run_cut_before_its_exports_were_made_is_taken_up_again(run, tmp_path):
    run()
    (tmp_path / "runs/tiny/stage1/finished.json").unlink()
    assert run().trainer.global_step == 5
    assert (tmp_path / "runs/tiny/stage1/finished.json").exists()


def test_without_checkpoints_a_run_begins_anew(run, tmp_path):
    run()
    (tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt").unlink()
    assert float(run().model.weight.detach()) == 5.0
    assert logged_steps(tmp_path) == [0, 1, 2, 3, 4], "the earlier run's rows are gone"


def test_a_finished_mark_counts_only_with_its_checkpoint(tmp_path):
    run, until = Run(tmp_path), {"max_steps": -1, "max_epochs": 3, "max_time": None}
    run.mark_finished(10, until)
    assert not run.is_finished(**until)
    run.last_checkpoint.parent.mkdir()
    run.last_checkpoint.touch()
    assert run.is_finished(**until) and not run.is_finished(**until | {"max_epochs": 4})
    assert run.is_finished(**until | {"max_steps": 10}) and not run.is_finished(**until | {"max_steps": 11})
