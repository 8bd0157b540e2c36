"""Scoring shared out: every process scores its subjects, which fills the caches that the one table is then made from.

What costs time in scoring is encoders and SAM. Their answers are cached by the pictures' pixels, so the processes need to hand over
nothing else, and a killed run goes on from what it had written.
"""

from torch.utils.data import DataLoader

from datamodules.dreambooth import Subject
from evaluation.config import EvalConfig
from evaluation.extra_scores import Judges
from evaluation.generation import digests_of
from evaluation.methods import Method
from evaluation.plan import Evaluation
from evaluation.processes import Progress, launch, run_processes
from evaluation.scoring import open_judges, subject_rows
from evaluation.share import Share


def fill_caches(config: EvalConfig, methods: dict[str, Method]) -> None:
    """Let all processes see the pictures that are there; with one process there is nothing to share."""
    evaluation = Evaluation.open(config)
    count = config.processes(len(evaluation.subjects))
    nodes, devices, _ = launch(count)
    if nodes * devices > 1:
        run_processes(CacheFiller(config, methods, digests_of(evaluation, methods)), config.resolved_device(), count)


class CacheFiller(Share):
    """Scores this process's share of the subjects and keeps what encoders and SAM said, in cache files of its own."""

    judges: Judges

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.judges = open_judges(self.evaluation, part=self.trainer.global_rank)

    def predict_dataloader(self) -> DataLoader:
        """A subject each, real pictures first."""
        names = sorted(self.methods, key=lambda name: not self.methods[name].is_oracle)
        self.work = [(name, subject) for name in names for subject in self.subjects() if self.is_complete(name, subject)]
        self.progress = Progress(len(self.work), self.trainer.global_rank, self.trainer.world_size, "subjects scored")
        return self.positions()

    def is_complete(self, name: str, subject: Subject) -> bool:
        """Missing pictures are `score`'s to complain of."""
        method = self.methods[name]
        return method.is_oracle or all(plan.is_done for plan in self.evaluation.planned(name, method, [subject]))

    def predict_step(self, position: int, batch_idx: int) -> int:
        if self.trainer.received_sigterm:
            self.judges.save()
        self.end_if_told()
        name, subject = self.work[position]
        rows = subject_rows(self.evaluation, name, self.methods[name], subject, self.judges)
        self.judges.save_when_due()
        self.progress.add(name, 1)
        return len(rows)

    def on_predict_end(self) -> None:
        self.judges.save()
        self.end_if_told()
