"""Scoring shared out: every process scores its subjects, which fills the caches that the one table is then made from.

What costs time in scoring is encoders and SAM. Their answers are cached by the pictures' pixels, so the processes need to hand over
nothing else, and a killed run goes on from what it had written.
"""


from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from evaluation.config import EvalConfig
from evaluation.extra_scores import Judges
from evaluation.generation import digests_of
from evaluation.methods import Method
from evaluation.plan import Evaluation
from evaluation.processes import Progress, begin_process, launch, run_processes
from evaluation.scoring import open_judges, subject_rows


def fill_caches(config: EvalConfig, methods: dict[str, Method]) -> None:
    """Let all processes see the pictures that are there; with one process there is nothing to share."""
    evaluation = Evaluation.open(config)
    count = config.processes(len(evaluation.subjects))
    nodes, devices, _ = launch(count)
    if nodes * devices > 1:
        run_processes(CacheFiller(config, methods, digests_of(evaluation, methods)), config.resolved_device(), count)


class CacheFiller(LightningModule):
    """Scores this process's share of the subjects and keeps what encoders and SAM said, in cache files of its own."""

    judges: Judges

    def __init__(self, config: EvalConfig, methods: dict[str, Method], digests: dict[str, str]):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.told = config, methods, digests

    def setup(self, stage: str) -> None:
        """Rank 0's config, methods and digests count everywhere."""
        begin_process()
        self.config, self.methods, digests = self.trainer.strategy.broadcast(self.told)
        self.evaluation = Evaluation.open(self.config, str(self.trainer.strategy.root_device))
        self.evaluation.models.digests.update(digests)
        self.judges = open_judges(self.evaluation, part=self.trainer.global_rank)

    def predict_dataloader(self) -> DataLoader:
        """Positions in `self.work`: every `world_size`-th subject, real pictures first."""
        own = self.evaluation.subjects[self.trainer.global_rank :: self.trainer.world_size]
        names = sorted(self.methods, key=lambda name: not self.methods[name].is_oracle)
        self.work = [(name, subject) for name in names for subject in own if self.is_complete(name, subject)]
        self.progress = Progress(len(self.work), self.trainer.global_rank, self.trainer.world_size, "subjects scored")
        return DataLoader(range(len(self.work)), batch_size=None)  # type: ignore[arg-type]

    def is_complete(self, name: str, subject) -> bool:
        """Missing pictures are `score`'s to complain of."""
        method = self.methods[name]
        return method.is_oracle or all(plan.is_done for plan in self.evaluation.planned(name, method, [subject]))

    def predict_step(self, position: int, batch_idx: int) -> int:
        if self.trainer.received_sigterm:
            self.judges.save()
            raise SIGTERMException
        name, subject = self.work[position]
        rows = subject_rows(self.evaluation, name, self.methods[name], subject, self.judges)
        self.judges.save_when_due()
        self.progress.add(name, 1)
        return len(rows)

    def on_predict_end(self) -> None:
        self.judges.save()
