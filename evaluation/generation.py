"""Making the pictures: resumable, split by subject among processes that Lightning's Trainer runs."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.dreambooth import Subject
from evaluation.config import EvalConfig
from evaluation.methods import Method, Reference
from evaluation.plan import Evaluation, Planned
from evaluation.processes import Progress, run_processes
from evaluation.share import Share
from evaluation.stamps import git_revision, refuse_black
from evaluation.tasks import PictureTask
from evaluation.writer import BackgroundWriter


def generate(config: EvalConfig, methods: dict[str, Method] | None = None) -> None:
    """Make every missing picture of every method, the subjects shared out among the processes.

    Started by hand there are `config.num_processes` of them. Under torchrun (`torchrun --nproc_per_node 8 -m evaluation generate ...`) or
    srun there are those that it started, on any number of nodes that share `run`'s folder.

    methods: of a table beside the main evaluation, None for its own. Raises ValueError where one is called as one of its own and set otherwise.
    """
    methods = config.methods if methods is None else methods
    if not methods:
        raise ValueError("the config names no methods to evaluate")
    for name, method in methods.items():
        if config.methods.get(name, method) != method:
            raise ValueError(f"{name!r} is set otherwise in the main evaluation, whose pictures it would replace: rename one of the two")
    evaluation = Evaluation.open(config)
    for method in methods.values():
        method.require(evaluation.models)
    maker = PictureMaker(config, methods, digests_of(evaluation, methods))
    run_processes(maker, config.resolved_device(), config.processes(len(evaluation.subjects)))


def digests_of(evaluation: Evaluation, methods: dict[str, Method]) -> dict[str, str]:
    """Digests of the weights of all methods, on rank 0: large files are digested once, and the other processes are told."""
    if rank_zero_only.rank == 0:
        for method in methods.values():
            method.weights(evaluation.models)
    return evaluation.models.digests


class PictureMaker(Share):
    """Makes this process's share of the missing pictures, in batches; each method brings its own models."""

    def __init__(self, config: EvalConfig, methods: dict[str, Method], digests: dict[str, str]):
        super().__init__(config, methods, digests)
        self.method: Method | None = None
        self.at_once = config.batch_size

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.by_name = {subject.name: subject for subject in self.evaluation.subjects}
        protocol = self.evaluation.protocol
        self.writer = BackgroundWriter()
        self.provenance = {"protocol": protocol.name, "protocol_digest": protocol.digest, "git_revision": git_revision()}

    def predict_dataloader(self) -> DataLoader:
        """Batches, method by method."""
        self.work = []
        for name, method in self.methods.items():
            plans = [] if method.is_oracle else self.evaluation.planned(name, method, self.subjects())
            missing = [plan for plan in plans if not plan.is_done]
            self.work += [(name, batch) for batch in batches(shared(method, missing), self.config.batch_size)]
        self.progress = Progress(sum(len(same) for _, batch in self.work for same in batch), self.trainer.global_rank, self.trainer.world_size)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*|Total length of `DataLoader`.*")
        return self.positions()

    def predict_step(self, position: int, batch_idx: int) -> int:
        """Make a batch; it is written while the next one is drawn. Returns its number of pictures: Lightning warns of steps that return nothing."""
        try:
            self.end_if_told()
            return self.make(*self.work[position])
        except BaseException:
            self.writer.finish()  # what was drawn before counts
            raise

    def make(self, name: str, batch: list[list[Planned]]) -> int:
        method, first = self.ready(name), batch[0][0]
        images = self.drawn(name, method, self.by_name[first.task.subject], first.reference, [same[0].task for same in batch])
        for same, image in zip(batch, images, strict=True):
            for plan in same:
                self.writer.write(plan.path, image, plan.settings, self.provenance | {"name": name, "reference": str(plan.reference.path)})
        made = sum(map(len, batch))
        self.progress.add(name, made)
        return made

    def drawn(self, name: str, method: Method, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        """The tasks' pictures, `at_once` a call; where the device's memory does not hold them, half as many from then on for this method.

        Raises ValueError for a method that returns anything but as many pictures as it was given tasks, and for a picture that is all black.
        """
        images: list[Image.Image] = []
        while len(images) < len(tasks):
            part, fits = tasks[len(images) : len(images) + self.at_once], True
            try:
                made = method.generate(subject, reference, part)
            except ValueError as error:
                raise ValueError(f"{name}, with {reference.path}: {error}") from error
            except RuntimeError as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                fits = False
            if not fits:  # behind the clause, since the error holds on to all that the call had made
                self.at_once = len(part) // 2
                torch.cuda.empty_cache()
                told = f"{name}: the device's memory does not hold {len(part)} pictures at once, {self.at_once} are tried"
                warnings.warn(f"{told}; a lower batch_size spares the attempt", stacklevel=2)
                continue
            if not isinstance(made, list | tuple) or not all(isinstance(picture, Image.Image) for picture in made):
                raise ValueError(f"{name}: generate has to return a list of PIL pictures, one a task, not {made!r:.80}")
            if len(made) != len(part):
                raise ValueError(f"{name}: {len(made)} pictures of {subject.name} for {len(part)} tasks")
            refuse_black({f"{name}, {subject.name}, {task.prompt!r}": picture for task, picture in zip(part, made, strict=True)})
            images += made
        return images

    def on_predict_end(self) -> None:
        self.writer.finish()
        self.end_if_told()

    def ready(self, name: str) -> Method:
        """The method, set up; the one before it lets go of its models."""
        method = self.methods[name]
        if self.method is not method:
            if self.method is not None:
                self.method.teardown()
            self.method, method.folder, self.at_once = method, self.config.pictures / name, self.config.batch_size
            method.setup(self.evaluation.models, self.evaluation.protocol.sampler)
        return method

    def teardown(self, stage: str) -> None:
        if self.method is not None:
            self.method.teardown()
            self.method = None


def shared(method: Method, plans: list[Planned]) -> list[list[Planned]]:
    """The plans that one picture serves: a method that does not look at the reference draws the same for each."""
    if method.uses_reference:
        return [[plan] for plan in plans]
    by_task: dict[PictureTask, list[Planned]] = {}
    for plan in plans:
        by_task.setdefault(replace(plan.task, reference=0), []).append(plan)
    return list(by_task.values())


def batches(pictures: list[list[Planned]], size: int) -> Iterator[list[list[Planned]]]:
    """Pictures of one reference, at most `size` at a time, each with all plans that it serves."""
    for _, group in groupby(pictures, key=lambda same: same[0].reference):
        one_reference = list(group)
        for start in range(0, len(one_reference), size):
            yield one_reference[start : start + size]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of PyTorch's allocator, or of the driver, Triton, cuBLAS or cuDNN, where that has left them too little."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
