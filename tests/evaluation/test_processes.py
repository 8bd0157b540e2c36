import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessExitedException

from evaluation import processes as evaluation_processes
from evaluation.plan import Evaluation
from evaluation.processes import Progress, launch
from moma_lightning.training.guards import Preempted
from tests.evaluation import processes
from tests.evaluation.fakes import made
from tests.forked import on_two_processes


def stamped(config) -> dict[Path, tuple[bytes, int]]:
    """The pictures that count: their bytes and when they were written."""
    plans = Evaluation.open(config).planned("a", config.methods["a"])
    return {plan.path: (plan.path.read_bytes(), plan.path.stat().st_mtime_ns) for plan in plans if plan.is_done}


def start(*arguments: str) -> subprocess.Popen:
    """Not a forked one: that could start no processes of its own."""
    command, environment = [sys.executable, "-m", "tests.evaluation.processes", *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.timeout(300)
def test_processes_end_when_who_started_them_is_killed(tmp_path):
    run = start(str(tmp_path), "3")
    while len(found := list(tmp_path.glob("log.*"))) < 2 or not all(path.read_text() for path in found):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    pids = {int(path.read_text()) for path in found}
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    run.kill()
    run.wait(60)
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.timeout(600)
def test_two_processes_one_killed_then_a_launchers_two_go_on(tmp_path):
    """Spawned processes, one of which dies by SIGKILL when the other has made its share; then two as torchrun starts them, one without work."""
    config, log = processes.config(tmp_path), str(tmp_path / "log")
    run = start(str(tmp_path), "0.3")
    boots = [plan for plan in Evaluation.open(config).planned("a", config.methods["a"]) if plan.task.subject == "old_boot"]
    while not all(plan.is_done for plan in boots):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.01)
    pids = {name: int(Path(f"{log}.{name}").read_text()) for name in ("old_boot", "red_mug")}
    os.kill(pids["red_mug"], signal.SIGKILL)
    output = run.communicate(timeout=250)[0]
    assert run.returncode != 0 and "SIGKILL" in output
    assert len({*pids.values(), run.pid}) == 3
    before, made_before = stamped(config), len(made(log))
    assert 6 < len(before) < processes.PICTURES
    assert made_before - len(before) in (0, 1, 2)  # a batch may be lost
    on_two_processes("tests.evaluation.processes", str(tmp_path), "0", log=tmp_path / "again")
    after = stamped(config)  # rank 1's own config has another noise: its pictures would not count
    assert len(after) == processes.PICTURES
    assert all(after[path] == before[path] for path in before)
    assert len(made(log)) - made_before == processes.PICTURES - len(before)
    assert "process 1 of 2, a: " in (tmp_path / "again").read_text()


def test_a_sweeps_point_on_two_processes_is_rank_0s(tmp_path):
    """Rank 1's own config asks for another noise: it draws and scores what rank 0 was told, and writes no second summary."""
    on_two_processes("tests.evaluation.processes", str(tmp_path), "0", "point", log=tmp_path / "told")
    config = processes.config(tmp_path)
    (summary,) = config.sweeps_folder.glob("*.json")
    name = summary.stem
    assert "noise" not in name and name in json.loads(summary.read_text())  # rank 1's name would tell of its own
    plans = Evaluation.open(config).planned(name, config.methods["a"])
    assert len(plans) == processes.PICTURES and all(plan.is_done for plan in plans)  # with rank 0's settings
    drawn = {subject for subject, *_ in made(str(tmp_path / "log"))}
    assert len({Path(f"{tmp_path / 'log'}.{subject}").read_text() for subject in drawn}) == 2  # processes


def test_processes_are_the_launchers(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launch(1) == (1, 1, "auto")
    assert launch(0) == (1, 1, "auto")
    nodes, devices, strategy = launch(3)
    assert (nodes, devices) == (1, 3)
    assert isinstance(strategy, DDPStrategy)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "evaluation")
    assert launch(3)[:2] == (2, 4)
    environment = {"RANK": "5", "GROUP_RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch(3)[:2] == (3, 4)


def test_fewer_processes_than_asked_for_are_told(monkeypatch, caplog):
    class Few:
        world_size, is_global_zero, strategy = 2, True, SimpleNamespace(barrier=lambda name: None)

        def predict(self, *given, **options):
            pass

    monkeypatch.setattr(evaluation_processes, "build_trainer", lambda device, count: Few())
    evaluation_processes.run_processes(LightningModule(), "cpu", 2)
    assert not caplog.records
    evaluation_processes.run_processes(LightningModule(), "cpu", 8)
    assert "2 of the 8 processes asked for: torchrun or the SLURM job (--ntasks) has no more" in caplog.text


@pytest.mark.parametrize(("code", "error"), [(143, Preempted), (1, ProcessExitedException)])
def test_where_a_process_started_here_was_told_to_end_this_one_ends_like_it(monkeypatch, code, error):
    def predict(*given, **options):
        raise ProcessExitedException(f"process 1 terminated with exit code {code}", error_index=1, error_pid=2, exit_code=code)

    monkeypatch.setattr(evaluation_processes, "build_trainer", lambda device, count: SimpleNamespace(world_size=2, predict=predict))
    with pytest.raises(error) as stop:
        evaluation_processes.run_processes(LightningModule(), "cpu", 2)
    assert getattr(stop.value, "code", code) == code


def test_progress_tells_rate_and_time_left():
    progress = Progress(100, rank=1, count=4)
    progress.made = 25
    assert progress.line("moma", 50.0) == "process 2 of 4, moma: 25/100 pictures, 0.5 a second, 3 min left"
    progress.made = 100
    assert progress.line("moma", 50.0).endswith("100/100 pictures, 2.0 a second, 0 min left")
    assert Progress(4).line("moma", 1.0).startswith("moma: 0/4")
