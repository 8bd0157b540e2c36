"""The launchers: clean shell, and commands that start what they say. What runs them on a cluster is not there to be tested."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.mini.export import export

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "experiments/cluster"
STAGES = sorted(path for path in ROOT.glob("experiments/*/stage[12].yaml"))


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(CLUSTER / script), *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=280)


def command_of(script: str, *arguments: str, **environment: str) -> list[str]:
    done = run(script, *arguments, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_shellcheck_is_content():
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert checker, "shellcheck is missing: install the dev extras"
    scripts = [*CLUSTER.glob("*.sh"), ROOT / ".ci/run"]
    done = subprocess.run([checker, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (8, 8)])
def test_torchrun_starts_as_many_processes_as_lightning_is_told(nodes, gpus):
    command = command_of("torchrun.sh", "mini", "stage2", "--trainer.max_steps", "3", NODES=str(nodes), GPUS=str(gpus), MASTER="first")
    options = dict(itertools.pairwise(command))
    assert (options["--nnodes"], options["--nproc-per-node"]) == (options["--trainer.num_nodes"], options["--trainer.devices"]) == (str(nodes), str(gpus))
    assert options["--rdzv-endpoint"] == f"first:{29500 if nodes > 1 else 0}", "on one node a free port: it may have several trainings"
    assert options["--config"] == "experiments/mini/stage2.yaml"
    assert command[-2:] == ["--trainer.max_steps", "3"]


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (8, 8)])
def test_slurm_starts_a_task_for_each_gpu(nodes, gpus):
    command = command_of("slurm.sh", "mini", "stage1", SLURM_NTASKS_PER_NODE=str(gpus), SLURM_JOB_NUM_NODES=str(nodes), SLURM_CPUS_PER_TASK="12")
    options = dict(itertools.pairwise(command))
    assert options["--cpus-per-task"] == "12"
    assert command[0] == "srun" and (options["--trainer.num_nodes"], options["--trainer.devices"]) == (str(nodes), str(gpus))


def test_a_job_is_told_three_minutes_before_its_end_and_comes_back_when_preempted():
    header, *_ = (CLUSTER / "slurm.sh").read_text().partition("\nset ")  # sbatch reads no further than the first command
    directives = {line.removeprefix("#SBATCH ") for line in header.splitlines() if line.startswith("#SBATCH ")}
    assert {"--requeue", "--signal=B:USR1@180", "--open-mode=append", "--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8"} <= directives


def test_what_both_launchers_export_counts_unless_it_is_set_already():
    for given in ({}, {"NCCL_DEBUG": "INFO"}):
        done = subprocess.run(["bash", "-c", f"source {CLUSTER / 'nccl.sh'} && env"], env={"PATH": os.environ["PATH"]} | given, capture_output=True, check=True)
        exported = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
        wanted = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "NCCL_DEBUG": "WARN", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1"}
        assert exported.items() >= (wanted | given).items()
    assert all("\nsource experiments/cluster/nccl.sh\n" in (CLUSTER / script).read_text() for script in ("torchrun.sh", "slurm.sh"))


#: What stands in srun's place: ends by itself, or is told by the script that its time is up and ends as its tasks do.
ENDS = "exit {code}"
IS_TOLD = "trap 'sleep 1; exit {code}' USR1\nkill -USR1 $PPID\nwhile :; do sleep 0.1; done"


@pytest.mark.parametrize(
    ("srun", "code", "requeued", "left"),
    [(ENDS, 0, False, 0), (ENDS, 1, False, 1), (ENDS, 138, False, 138), (IS_TOLD, 138, True, 0), (IS_TOLD, 143, True, 0), (IS_TOLD, 0, False, 0)],
)
def test_only_a_job_whose_time_is_up_is_requeued(tmp_path, srun, code, requeued, left):
    for name, body in {"srun": srun.format(code=code), "scontrol": f'echo "$@" > {tmp_path}/asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = run("slurm.sh", "mini", "stage1", PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="77")
    assert done.returncode == left
    assert (tmp_path / "asked").exists() == requeued and (not requeued or (tmp_path / "asked").read_text() == "requeue 77\n")


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh"])
def test_an_unknown_experiment_is_told(script):
    done = run(script, "nope", "stage1")
    assert done.returncode == 2 and "experiment" in done.stderr


def test_every_experiment_has_stages_that_can_be_launched():
    assert {path.parent.name for path in STAGES} >= {"mini", "sd15_llava7b"}


@pytest.mark.timeout(600)
def test_the_torchrun_command_trains_on_two_processes(tmp_path):
    export(tmp_path / "data", train_count=16, val_count=8, samples_per_shard=4)
    shards = tmp_path / "data/shards"
    options = {"trainer.accelerator": "cpu", "trainer.strategy": "sharded", "trainer.max_steps": 2, "trainer.limit_val_batches": 1,
               "trainer.default_root_dir": tmp_path / "run", "model.init_args.decoder": "null", "model.init_args.stage2.context": "image_encoder",
               "data.init_args.config.train": f"{shards}/train-*.tar", "data.init_args.config.val": f"{shards}/val-*.tar",
               "data.init_args.config.batch_size": 2, "data.init_args.config.val_batches": 1}
    done = run("torchrun.sh", "mini", "stage2", *(word for name, value in options.items() for word in (f"--{name}", str(value))),
               PYTHON=sys.executable, GPUS="2", RESTARTS="0", WANDB_MODE="disabled", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/finished.json").read_text())["step"] == 2
