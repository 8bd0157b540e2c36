"""The processes of an evaluation, run by Lightning's Trainer: started here, or as torchrun or srun started them."""

import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessExitedException

from moma_lightning.training.guards import Preempted

logger = logging.getLogger(__name__)

#: The exit code after a SIGTERM, which training has too.
TOLD_TO_END = 128 + signal.SIGTERM


def run_processes(module: LightningModule, device: str, num_processes: int) -> None:
    """`Trainer.predict` of `module` on every process; returns when all of them have done their share. Raises Preempted where one was told to end."""
    with lightning_quiet(), environment_kept():
        trainer = build_trainer(device, num_processes)
        if trainer.world_size < num_processes and trainer.is_global_zero:
            logger.warning("%d of the %d processes asked for: torchrun or the SLURM job (--ntasks) has no more", trainer.world_size, num_processes)
        try:
            trainer.predict(module, return_predictions=False)
        except ProcessExitedException as error:  # one of those started here
            if error.exit_code == TOLD_TO_END:
                raise Preempted(TOLD_TO_END) from None
            raise
        trainer.strategy.barrier("every process has made its share")


@contextmanager
def environment_kept() -> Iterator[None]:
    """The environment as it was: Lightning leaves the port in it that it found free, which may be taken when the next Trainer starts."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def lightning_quiet() -> Iterator[None]:
    """Only warnings from Lightning: what it tells of its Trainer says nothing about pictures."""
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def build_trainer(device: str, num_processes: int) -> Trainer:
    """A Trainer that does nothing but run the processes."""
    nodes, devices, strategy = launch(num_processes, device)
    return Trainer(
        accelerator=device, devices=devices, num_nodes=nodes, strategy=strategy, use_distributed_sampler=False,
        inference_mode=False,  # methods that are trained on a subject need gradients
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )


def launch(num_processes: int, device: str = "cpu") -> tuple[int, int, Any]:
    """Nodes, processes a node and the strategy: as torchrun or srun started this process, else `num_processes` started here.

    A process that has made its share waits for the others however long they take, so collectives do not time out.
    """
    patient: dict[str, Any] = {"timeout": timedelta(days=30)}
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // local, local, DDPStrategy(**patient)
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return nodes, int(os.environ["SLURM_NTASKS"]) // nodes, DDPStrategy(**patient)
    return 1, max(1, num_processes), DDPStrategy(start_method=start_method(device), **patient) if num_processes > 1 else "auto"


def start_method(device: str) -> Literal["spawn", "forkserver"]:
    """Forked off a server that has imported everything once; Lightning refuses that once CUDA is in use here, and it is after a scoring."""
    if device != "cpu":
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["evaluation.generation", "evaluation.shared_scoring"])
    return "forkserver"


def begin_process() -> None:
    """What a process started here lacks: logging, and an end when who started it is killed (PyTorch sees to that only where it is the OS's parent)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if parent := multiprocessing.parent_process():
        threading.Thread(target=end_after, args=(parent,), daemon=True).start()


def end_after(parent: Any) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    os._exit(1)  # it waits in a barrier of GPUs, where no handler runs


class Progress:
    """One line every ten seconds and at the end: long runs are watched in logs, not in terminals."""

    def __init__(self, total: int, rank: int = 0, count: int = 1, what: str = "pictures"):
        self.total, self.made, self.what = total, 0, what
        self.process = f"process {rank + 1} of {count}, " if count > 1 else ""
        self.started = self.told = time.monotonic()

    def add(self, name: str, count: int) -> None:
        self.made += count
        now = time.monotonic()
        if now - self.told > 10 or self.made == self.total:
            self.told = now
            logger.info("%s", self.line(name, now - self.started))

    def line(self, name: str, seconds: float) -> str:
        rate = self.made / max(seconds, 1e-6)
        left = math.ceil((self.total - self.made) / rate / 60) if self.made else 0
        return f"{self.process}{name}: {self.made}/{self.total} {self.what}, {rate:.1f} a second, {left} min left"
