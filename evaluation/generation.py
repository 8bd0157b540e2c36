"""Making the pictures: resumable, split by subject among worker processes."""

import logging
import time
from collections.abc import Iterator
from itertools import groupby

import torch
import torch.multiprocessing as mp

from evaluation.config import EvalConfig
from evaluation.methods import Method
from evaluation.plan import Evaluation, Planned
from evaluation.stamps import git_revision, write_picture

logger = logging.getLogger(__name__)


def generate(config: EvalConfig, methods: dict[str, Method] | None = None) -> None:
    """Make every missing picture of every method, with `config.num_processes` workers that share out the subjects."""
    methods = config.methods if methods is None else methods
    if not methods:
        raise ValueError("the config names no methods to evaluate")
    evaluation = Evaluation.open(config)
    for method in methods.values():
        method.weights(evaluation.models)  # large files are digested once, here; workers inherit the digests
    count = min(config.num_processes, len(evaluation.subjects))
    if count <= 1:
        work(0, 1, config, methods, evaluation.models.digests)
    else:
        mp.spawn(work, args=(count, config, methods, evaluation.models.digests), nprocs=count)


def work(rank: int, count: int, config: EvalConfig, methods: dict[str, Method], digests: dict[str, str]) -> None:
    """One worker: its share of the subjects, method by method."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = config.resolved_device()
    if device == "cuda":
        device = f"cuda:{rank % torch.cuda.device_count()}"
    elif count > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    evaluation = Evaluation.open(config, device)
    evaluation.models.digests.update(digests)
    evaluation.subjects = evaluation.subjects[rank::count]
    for name, method in methods.items():
        if not method.is_oracle:
            run_method(name, method, evaluation)


def run_method(name: str, method: Method, evaluation: Evaluation) -> None:
    """Make one method's missing pictures; its weights are loaded only when something is missing."""
    missing = [plan for plan in evaluation.planned(name, method) if not plan.is_done]
    if not missing:
        return
    protocol, by_name = evaluation.protocol, {subject.name: subject for subject in evaluation.subjects}
    provenance = {"name": name, "protocol": protocol.name, "protocol_digest": protocol.digest, "git_revision": git_revision()}
    method.setup(evaluation.models, protocol.sampler)
    progress = Progress(name, len(missing))
    for batch in batches(missing, evaluation.config.batch_size):
        reference = batch[0].reference
        images = method.generate(by_name[batch[0].task.subject], reference, [plan.task for plan in batch])
        for plan, image in zip(batch, images, strict=True):
            write_picture(plan.path, image, plan.settings, provenance | {"reference": str(reference.path)})
        progress.add(len(batch))


def batches(plans: list[Planned], size: int) -> Iterator[list[Planned]]:
    """Pictures of one reference, at most `size` at a time."""
    for _, group in groupby(plans, key=lambda plan: plan.reference):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


class Progress:
    """One line every ten seconds and at the end: long runs are watched in logs, not in terminals."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.made = name, total, 0
        self.started = self.told = time.monotonic()

    def add(self, count: int) -> None:
        self.made += count
        now = time.monotonic()
        if now - self.told > 10 or self.made == self.total:
            self.told = now
            logger.info(
                "%s: %d/%d pictures, %.1f a second", self.name, self.made, self.total, self.made / max(now - self.started, 1e-6)
            )
