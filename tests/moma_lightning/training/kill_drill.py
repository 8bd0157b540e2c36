"""Kill a training at random moments and restart it with the same command: it must end where an undisturbed one does.

    python -m tests.moma_lightning.training.kill_drill --folder runs/drill --kills 20 --processes 1

A tiny stage 2 with its real datamodule (shards, two workers), validation, EMA and random noise. Every third kill waits for a
checkpoint being written, the others for a random moment; requests to end (SIGTERM) come on top of them. With --folders each rank writes its part of a
checkpoint. What is compared: trained weights, average and optimizer state bit for
bit, and the samples of every step on every rank; and that every pass over the data, the readers of all ranks together, brings each sample once.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from datamodules.mini.export import export
from moma_lightning.modules.stage2 import Stage2
from moma_lightning.training import checkpoint_folder, checkpoint_io
from tests.forked import Forked
from tests.moma_lightning.conftest import write_base, write_mllm_and_clip

EVERY, TRAIN_COUNT, STEPS_PER_EPOCH, WORKERS = 5, 48, 7, 2
#: Seconds between a request to end and the end: what torchrun allows.
IN_TIME = 30


class Drilled(Stage2):
    """Writes down the samples of every step. Where the drill wants to hit a checkpoint, writing one takes half a second."""

    def setup(self, stage):
        if "DRILL_SLOW_SAVE" in os.environ:
            checkpoint_io.torch = checkpoint_folder.torch = SlowTorch

    def training_step(self, batch, batch_idx):
        with (Path(self.trainer.default_root_dir) / f"seen-{self.global_rank}.txt").open("a") as file:
            file.write(f"{self.global_step} {' '.join(batch.key)}\n")
        return super().training_step(batch, batch_idx)


class SlowTorch:
    """In torch's place: `save` writes the first half of the file, waits, and writes the rest."""

    load = staticmethod(torch.load)

    @staticmethod
    def save(checkpoint, path: Path) -> None:
        whole = io.BytesIO()
        torch.save(checkpoint, whole)
        half = len(whole.getvalue()) // 2
        path.write_bytes(whole.getvalue()[:half])
        time.sleep(0.5)
        with path.open("ab") as file:
            file.write(whole.getvalue()[half:])


def prepare(folder: Path) -> None:
    """Tiny models and shards, once for both runs."""
    if not (folder / "ready").exists():
        write_mllm_and_clip(folder / "models")
        write_base(folder / "models/base")
        export(folder / "data", train_count=TRAIN_COUNT, val_count=8, samples_per_shard=6)
        (folder / "ready").touch()


def config(folder: Path, run: str, steps: int, processes: int, folders: bool, gpu: bool) -> Path:
    path, models, shards = folder / f"{run}.yaml", folder / "models", folder / "data/shards"
    strategy = {"class_path": "moma_lightning.training.strategy.ShardedStrategy", "init_args": {"save_distributed_checkpoint": folders}}
    sharded = {"strategy": strategy, "devices": processes} if processes > 1 or folders else {"devices": 1}
    device = {"accelerator": "gpu", "deterministic": True} if gpu else {"accelerator": "cpu"}
    path.write_text(yaml.safe_dump({
        "trainer": {"default_root_dir": str(folder / run), "max_steps": steps, "log_every_n_steps": 10, "num_sanity_val_steps": 0,
                    "enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": 1.0, "limit_val_batches": 1,
                    "callbacks": [{"class_path": "moma_lightning.training.ema.EMA", "init_args": {"decay": 0.9}}]} | sharded | device,
        "checkpoint": {"every_n_train_steps": EVERY},
        "model": {"class_path": "tests.moma_lightning.training.kill_drill.Drilled", "init_args": {
            "foundation": {"base": str(models / "base"), "image_encoder": str(models / "image_encoder"), "mllm": str(models / "llava"), "ip_adapter": None},
            "stage2": {"context": "image_encoder", "context_dropout": 0.3},
            "grid": {"pictures": 0}, "optimizer": {"lr": 1e-3, "schedule": "cosine"}}},
        "data": {"class_path": "datamodules.triplets.TripletDataModule", "init_args": {"config": {
            "train": f"{shards}/train-*.tar", "val": f"{shards}/val-*.tar", "image_size": 32, "batch_size": 2, "steps_per_epoch": STEPS_PER_EPOCH,
            "val_batches": 1, "num_workers": WORKERS}}},
    }))
    return path


def start(path: Path, slow_save: bool = False) -> "Forked | subprocess.Popen[bytes]":
    environment = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"} | ({"DRILL_SLOW_SAVE": "1"} if slow_save else {})
    command, log = ("moma_lightning", "fit", "--config", str(path)), path.with_suffix(".log")
    if not torch.cuda.is_available():
        return Forked(*command, log=log, **environment)
    with log.open("a") as file:  # CUDA cannot be used in a process that was forked
        return subprocess.Popen([sys.executable, "-m", *command], env=os.environ | environment, stdout=file, stderr=file, start_new_session=True)


def interrupt(process: "Forked | subprocess.Popen[bytes]", run: Path, number: int, rng: random.Random) -> str:
    """Wait for the moment, then end the process and all its children; returns what was done. Every seventh is asked to end, not killed."""
    before, kind = progress(run), signal.SIGTERM if is_asked(number) else signal.SIGKILL
    # A request to end is made in the first step: a short training would soon be over, and its handlers gone.
    steps = rng.randrange(1, 3 * EVERY) if kind == signal.SIGKILL and not hits_a_save(number) else 1
    wait(process, lambda: progress(run) >= before + steps)
    moment = "at a random moment"
    if hits_a_save(number):
        moment = "while a checkpoint was being written"
        wait(process, lambda: is_saving(run / "checkpoints"))
    elif kind == signal.SIGKILL:
        time.sleep(rng.random() * 0.3)
    assert process.poll() in (None, 0), f"the training failed by itself: see {run.with_suffix('.log')}"
    begun = time.monotonic()
    if kind == signal.SIGTERM:
        os.kill(process.pid, kind)
        try:
            assert process.wait(IN_TIME) in (143, 0), f"exit code {process.returncode} after SIGTERM: see {run.with_suffix('.log')}"
        except (TimeoutError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            raise
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        process.wait(60)
    return f"{kind.name} {moment}, over in {time.monotonic() - begun:.1f} s"


def is_asked(number: int) -> bool:
    return number % 7 == 1


def hits_a_save(number: int) -> bool:
    return number % 3 == 0 and not is_asked(number)


def is_saving(checkpoints: Path) -> bool:
    """Whether a checkpoint is there that has not taken its place yet. A folder's place is a link to it."""
    last = checkpoints / "last.ckpt"
    placed = os.readlink(last) if last.is_symlink() else None
    return any(path.name != placed for path in checkpoints.glob(".last.*"))


def wait(process: "Forked | subprocess.Popen[bytes]", ready, every: float = 0.05, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and not ready():
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError("the training did not come on")
        time.sleep(every)


def progress(run: Path) -> int:
    """How many lines rank 0 has written: any new one tells that training runs."""
    seen = run / "seen-0.txt"
    return len(seen.read_text().splitlines()) if seen.exists() else 0


def undisturbed(folder: Path, **options) -> Path:
    process = start(config(folder, "whole", **options))
    assert process.wait(3000) == 0, (folder / "whole.log").read_text()[-3000:]
    return folder / "whole"


def disturbed(folder: Path, kills: int, seed: int, **options) -> Path:
    rng, run = random.Random(seed), folder / "killed"
    path = config(folder, "killed", **options)
    killed = 0
    for number in itertools.count():
        if killed == kills:
            break
        process = start(path, slow_save=hits_a_save(number))
        how = interrupt(process, run, number, rng)
        if (run / "finished.json").exists():
            print("finished before all kills were dealt out: give it more --steps")
            break
        killed += not is_asked(number)
        print(f"{number + 1}: {how}, {last_step(run)} steps saved", flush=True)
    process = start(path)
    assert process.wait(3000) == 0, path.with_suffix(".log").read_text()[-3000:]
    return run


def last_step(run: Path) -> int:
    checkpoint = run / "checkpoints/last.ckpt"
    small = checkpoint / checkpoint_folder.REST if checkpoint.is_dir() else checkpoint
    return torch.load(small, weights_only=True)["global_step"] if small.exists() else 0


def samples(run: Path, rank: int) -> dict[int, list[str]]:
    """The keys of every step; of a step that was done again after a kill, the later line counts."""
    lines = (run / f"seen-{rank}.txt").read_text().splitlines()
    return {int(line.split()[0]): line.split()[1:] for line in lines}


def differences(whole: Path, killed: Path, processes: int) -> list[str]:
    """Names of what is not equal in every bit."""
    one, two = (tensors_of(run) for run in (whole, killed))
    tensors = [flatten({key: checkpoint[key] for key in ("state_dict", "ema", "optimizer_states")}) for checkpoint in (one, two)]
    wrong = [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1].get(name, torch.zeros(0)))]
    return wrong + [f"samples of rank {rank}" for rank in range(processes) if samples(whole, rank) != samples(killed, rank)]


def tensors_of(run: Path) -> dict:
    """The last checkpoint's content, out of its file or folder."""
    path = run / "checkpoints/last.ckpt"
    if path.is_dir():
        dcp_to_torch_save(path, run / "whole.pt")
        path = run / "whole.pt"
    return torch.load(path, weights_only=True)


def uneven(run: Path, processes: int) -> list[str]:
    """Passes over the data in which a sample is missing or comes twice. A pass is every reader's own: the readers of all ranks share the samples."""
    streams: dict[tuple[int, int], list[str]] = {}
    for rank in range(processes):
        for step, keys in sorted(samples(run, rank).items()):
            streams.setdefault((rank, step % STEPS_PER_EPOCH % WORKERS), []).extend(keys)
    share = TRAIN_COUNT // len(streams)
    passes = [[key for keys in streams.values() for key in keys[i * share : (i + 1) * share]] for i in range(min(map(len, streams.values())) // share)]
    return [f"pass {i}: {len(set(keys))} samples in {len(keys)}" for i, keys in enumerate(passes) if not len(set(keys)) == len(keys) == TRAIN_COUNT]


def flatten(tree, name="") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {key: value for k, branch in items for key, value in flatten(branch, f"{name}.{k}").items()}


def drill(folder: Path, kills: int, processes: int = 1, folders: bool = False, steps: int = 60, seed: int = 0, gpu: bool = False) -> list[str]:
    """Everything; returns what differs. gpu: with deterministic algorithms, since those that add in any order are not equal to the bit twice."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    options = dict(steps=steps, processes=processes, folders=folders, gpu=gpu)
    whole = undisturbed(folder, **options)
    killed = disturbed(folder, kills, seed, **options)
    return differences(whole, killed, processes) + uneven(killed, processes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folders", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    wrong = drill(**options)
    print(json.dumps({"kills": options["kills"], "processes": options["processes"], "folders": options["folders"], "differences": wrong}))
    sys.exit(bool(wrong))
