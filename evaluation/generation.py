"""Making the pictures: resumable, split by subject among processes that Lightning's Trainer runs."""

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from evaluation.config import EvalConfig
from evaluation.methods import Method
from evaluation.plan import Evaluation, Planned
from evaluation.stamps import git_revision, write_picture

logger = logging.getLogger(__name__)


def generate(config: EvalConfig, methods: dict[str, Method] | None = None) -> None:
    """Make every missing picture of every method, the subjects shared out among the processes.

    Started by hand there are `config.num_processes` of them. Under torchrun (`torchrun --nproc_per_node 8 -m evaluation generate ...`) or
    srun there are those that it started, on any number of nodes that share `run`'s folder.
    """
    methods = config.methods if methods is None else methods
    if not methods:
        raise ValueError("the config names no methods to evaluate")
    evaluation = Evaluation.open(config)
    if rank_zero_only.rank == 0:  # large files are digested once; the other processes are told
        for method in methods.values():
            method.weights(evaluation.models)
    maker = PictureMaker(config, methods, evaluation.models.digests)
    with lightning_quiet():
        trainer = build_trainer(config, len(evaluation.subjects))
        trainer.predict(maker, return_predictions=False)
        trainer.strategy.barrier("every process has made its share")


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


def build_trainer(config: EvalConfig, subjects: int) -> Trainer:
    """A Trainer that does nothing but run the processes."""
    nodes, devices, strategy = launch(min(config.num_processes, subjects))
    return Trainer(
        accelerator=config.resolved_device(), devices=devices, num_nodes=nodes, strategy=strategy, use_distributed_sampler=False,
        inference_mode=False,  # methods that are trained on a subject need gradients
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def launch(num_processes: int) -> tuple[int, int, Any]:
    """Nodes, processes a node and the strategy: as torchrun or srun started this process, else `num_processes` spawned here.

    A process that has made its share waits for the others however long they take, so collectives do not time out.
    """
    patient: dict[str, Any] = {"timeout": timedelta(days=30)}
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // local, local, DDPStrategy(**patient)
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return nodes, int(os.environ["SLURM_NTASKS"]) // nodes, DDPStrategy(**patient)
    return 1, max(1, num_processes), DDPStrategy(start_method="spawn", **patient) if num_processes > 1 else "auto"


class PictureMaker(LightningModule):
    """Makes this process's share of the missing pictures; it has no parameters, each method brings its own models.

    The share is a list of batches cut here, not a sampler's: DistributedSampler would pad it with pictures that others make.
    """

    def __init__(self, config: EvalConfig, methods: dict[str, Method], digests: dict[str, str]):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.told = config, methods, digests
        self.method: Method | None = None

    def setup(self, stage: str) -> None:
        """Rank 0's config, methods and digests count everywhere."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")  # a spawned process has no logging yet
        self.config, self.methods, digests = self.trainer.strategy.broadcast(self.told)
        self.evaluation = Evaluation.open(self.config, str(self.trainer.strategy.root_device))
        self.evaluation.models.digests.update(digests)
        self.by_name = {subject.name: subject for subject in self.evaluation.subjects}
        protocol = self.evaluation.protocol
        self.provenance = {"protocol": protocol.name, "protocol_digest": protocol.digest, "git_revision": git_revision()}

    def predict_dataloader(self) -> DataLoader:
        """Positions in `self.work`: every `world_size`-th subject, method by method."""
        subjects = self.evaluation.subjects[self.trainer.global_rank :: self.trainer.world_size]
        self.work = []
        for name, method in self.methods.items():
            plans = [] if method.is_oracle else self.evaluation.planned(name, method, subjects)
            missing = [plan for plan in plans if not plan.is_done]
            self.work += [(name, batch) for batch in batches(missing, self.config.batch_size)]
        self.progress = Progress(sum(len(batch) for _, batch in self.work), self.trainer.global_rank, self.trainer.world_size)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*|Total length of `DataLoader`.*")
        return DataLoader(range(len(self.work)), batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, position: int, batch_idx: int) -> int:
        """Make a batch and write it. Returns its number of pictures: Lightning warns of steps that return nothing."""
        if self.trainer.received_sigterm:  # another process has died, or the cluster wants its node back; the rest is for the next run
            raise SIGTERMException
        name, batch = self.work[position]
        method, reference = self.ready(name), batch[0].reference
        images = method.generate(self.by_name[batch[0].task.subject], reference, [plan.task for plan in batch])
        for plan, image in zip(batch, images, strict=True):
            write_picture(plan.path, image, plan.settings, self.provenance | {"name": name, "reference": str(reference.path)})
        self.progress.add(name, len(batch))
        return len(batch)

    def ready(self, name: str) -> Method:
        """The method, set up; the one before it lets go of its models."""
        method = self.methods[name]
        if self.method is not method:
            if self.method is not None:
                self.method.teardown()
            self.method, method.folder = method, self.config.pictures / name
            method.setup(self.evaluation.models, self.evaluation.protocol.sampler)
        return method

    def teardown(self, stage: str) -> None:
        if self.method is not None:
            self.method.teardown()
            self.method = None


def batches(plans: list[Planned], size: int) -> Iterator[list[Planned]]:
    """Pictures of one reference, at most `size` at a time."""
    for _, group in groupby(plans, key=lambda plan: plan.reference):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


class Progress:
    """One line every ten seconds and at the end: long runs are watched in logs, not in terminals."""

    def __init__(self, total: int, rank: int = 0, count: int = 1):
        self.total, self.made = total, 0
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
        return f"{self.process}{name}: {self.made}/{self.total} pictures, {rate:.1f} a second, {left} min left"
