"""One process of several that make pictures or scores: its share is every `world_size`-th subject."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from datamodules.dreambooth import Subject
from evaluation.config import EvalConfig
from evaluation.methods import Method
from evaluation.plan import Evaluation
from evaluation.processes import TOLD_TO_END, Progress, begin_process
from moma_lightning.training.guards import Preempted, only_note_sigterm

logger = logging.getLogger(__name__)


class Share(LightningModule):
    """What `Trainer.predict` runs in every process: `predict_step` is given positions in `self.work`. It has no parameters.

    The share is a list cut here, not a sampler's: DistributedSampler would pad it with what others make.
    """

    progress: Progress

    def __init__(self, config: EvalConfig, methods: Mapping[str, Method], digests: dict[str, str]):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.told = config, methods, digests
        self.work: list[Any] = []

    def setup(self, stage: str) -> None:
        """Rank 0's config, methods and digests count everywhere."""
        begin_process()
        self.config, self.methods, digests = self.trainer.strategy.broadcast(self.told)
        self.evaluation = Evaluation.open(self.config, str(self.trainer.strategy.root_device))
        self.evaluation.models.digests.update(digests)

    def on_predict_start(self) -> None:
        only_note_sigterm(self.trainer)

    def end_if_told(self) -> None:
        """Raises Preempted after a SIGTERM: the cluster wants its node back, or another process has died."""
        if self.trainer.received_sigterm:
            logger.info("%stold to end: what is made is kept, and the same command goes on from there", self.progress.process)
            raise Preempted(TOLD_TO_END)

    def subjects(self) -> list[Subject]:
        return self.evaluation.subjects[self.trainer.global_rank :: self.trainer.world_size]

    def positions(self) -> DataLoader:
        """In `self.work`."""
        return DataLoader(range(len(self.work)), batch_size=None)
