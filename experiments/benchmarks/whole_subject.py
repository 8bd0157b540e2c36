"""A subject's evaluation: prepared once and batched over prompts and seeds, against one call a picture."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from segment_anything import sam_model_registry
from torch import Tensor

from datamodules.dreambooth import fill
from datamodules.mini import world
from datamodules.mini.prompts import live_prompts
from datamodules.mini.render import render
from experiments.benchmarks.discs import disc
from experiments.benchmarks.explicit import written_out
from experiments.benchmarks.guided_step import COMPILE
from experiments.benchmarks.timing import PRECISION, Case, Run, dtype_of
from experiments.benchmarks.true_models import LABEL, PLACES, SD15, random_stage
from experiments.mini.models import MINI, mini_foundation
from moma_lightning.modules.stage2 import Stage2
from moma_lightning.pipeline import MoMAPipeline, load_pipeline
from moma_lightning.plan.stages import read_experiment
from moma_lightning.segmentation import NothingFoundError, SamMasker

FEW_PROMPTS = [f"a {LABEL} {place}" for place in PLACES]
ALL_PROMPTS = [fill(prompt, LABEL) for prompt in live_prompts()]
#: In a process of `on_two_cores`, what it draws with.
OF_WORKER: list["Evaluation"] = []


@dataclass
class Setting:
    """steps: of the sampler. seeds: pictures of each prompt. batch: pictures at once."""

    prompts: list[str]
    steps: int
    seeds: int
    batch: int
    guidance: float

    @property
    def shape(self) -> str:
        return f"{len(self.prompts)} prompts x {self.seeds} seeds, {self.steps} steps, batches of {self.batch}"


MINI_SETTING = Setting(ALL_PROMPTS, 12, 4, 34, 3.0)
TRUE_SETTING = Setting(FEW_PROMPTS, 25, 2, 8, 7.5)


class Evaluation:
    """A pipeline with a reference picture; SAM finds its mask."""

    def __init__(self, pipe: MoMAPipeline, image: Image.Image, setting: Setting):
        self.pipe, self.image, self.setting = pipe, image, setting
        self.tasks = [(prompt, seed) for prompt in setting.prompts for seed in range(setting.seeds)]

    def draw(self, tasks: list[tuple[str, int]], **reference) -> np.ndarray:
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in tasks]
        settings = dict(generator=generators, guidance_scale=self.setting.guidance, num_inference_steps=self.setting.steps, output_type="np")
        return self.pipe([prompt for prompt, _ in tasks], **reference, **settings).images

    def batched(self) -> np.ndarray:
        """As the project evaluates: everything that the subject alone decides is made once."""
        area, size = self.pipe.default_size() ** 2, self.setting.batch
        subject = self.pipe.prepare_subject(self.image, None, LABEL, area)
        return np.concatenate([self.draw(self.tasks[i : i + size], image=subject) for i in range(0, len(self.tasks), size)])

    def one_by_one(self) -> np.ndarray:
        """SAM, autoencoder, reference pass and MLLM anew for every picture, and a batch of one."""
        return np.concatenate([self.draw([task], image=self.image, label=LABEL) for task in self.tasks])

    def as_released(self) -> np.ndarray:
        """The released code's loop: one by one, its attention with it."""
        with written_out():
            return self.one_by_one()


def mini_evaluation(device: torch.device, setting: Setting = MINI_SETTING, dtype: str = "float32") -> Evaluation:
    """The shipped mini MoMA on a held-out subject."""
    pipe = load_pipeline(mini_foundation(), f"{MINI}/moma/adapter", f"{MINI}/moma/image_feature_decoder", dtype).to(str(device))
    picture = world.sample_picture(np.random.default_rng(0), world.identity("heldout", 3, LABEL))
    return Evaluation(pipe, Image.fromarray(render([picture])[0][0]), setting)


class BlindSam(SamMasker):
    """SAM with random weights finds anything or nothing: it is run, and a disc over a quarter of the picture is its answer."""

    def forward(self, image: Image.Image) -> Tensor:
        try:
            return disc(0.25, image.width)[0].to(super().forward(image).device)
        except NothingFoundError:
            return disc(0.25, image.width)[0]


def true_evaluation(device: torch.device) -> Evaluation:
    """The paper's models with random weights, on noise."""
    module = random_stage(read_experiment(SD15 / "stage2.yaml"), device)
    assert isinstance(module, Stage2)
    with device:
        masker = BlindSam(sam_model_registry["vit_h"]())
    pipe = MoMAPipeline.from_base(module.base, module.adapter, module.decoder, masker=masker).to(device, dtype_of(device))
    pixels = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    return Evaluation(pipe, Image.fromarray(pixels), TRUE_SETTING)


def against_batched(build: Callable[[torch.device], Evaluation], released: bool) -> Callable[[torch.device], tuple[Run, Run]]:
    """One by one, as the released code has it or with the project's own attention, against a prepared subject in batches."""
    def prepare(device: torch.device) -> tuple[Run, Run]:
        evaluation = build(device)
        return evaluation.as_released if released else evaluation.one_by_one, evaluation.batched

    return prepare


def against_16_bits(device: torch.device, setting: Setting = MINI_SETTING) -> tuple[Run, Run]:
    """The loop in float32, which is faster in it on a CPU, against a subject at once as `--dtype bfloat16` draws it."""
    return mini_evaluation(device, setting).as_released, mini_evaluation(device, setting, "bfloat16").batched


def on_two_cores(_: torch.device, setting: Setting = MINI_SETTING) -> tuple[Run, Run]:
    """Two subjects' pictures, each way on two cores: the loop on PyTorch's threads, and a process of one thread a subject, as the project evaluates.

    The processes end with the second of the two; their memory is not in its peak.
    """
    evaluation = mini_evaluation(torch.device("cpu"), setting)
    workers = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_worker, (setting,)) for _ in range(2)]

    def as_released() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        for _ in range(2):
            evaluation.as_released()
        torch.set_num_threads(threads)

    return as_released, lambda: [drawing.result() for drawing in [worker.submit(draw_in_worker) for worker in workers]]


def begin_worker(setting: Setting) -> None:
    torch.set_num_threads(1)
    OF_WORKER.append(mini_evaluation(torch.device("cpu"), setting))


def draw_in_worker() -> int:
    """The pictures stay there; returns their number."""
    return len(OF_WORKER[0].batched())


def eager_against_compiled(device: torch.device) -> tuple[Run, Run]:
    """The UNet as it is and compiled, in the same pipeline."""
    evaluation = true_evaluation(device)
    evaluation.pipe.unet.compile(mode=COMPILE)
    return torch.compiler.set_stance("force_eager")(evaluation.batched), evaluation.batched


def cases(full: bool, compiled: bool = False) -> list[Case]:
    shape = f"SD 1.5, LLaVA-1.5-7B and SAM ViT-H, random weights, 512 px, {TRUE_SETTING.shape}, {PRECISION}"
    sizes = [("mini", f"mini MoMA, {MINI_SETTING.shape}", mini_evaluation, 7), *([("sd15", shape, true_evaluation, 3)] if full else [])]
    listed = []
    for name, told, build, pairs in sizes:
        listed.append(Case(f"released code's loop / a subject at once, {name}", ">= 4.0", told, against_batched(build, released=True), pairs))
        listed.append(Case(f"one by one / a subject at once, {name}", "", told, against_batched(build, released=False), pairs))
    listed.append(Case("released code's loop / a subject at once in bfloat16, mini", ">= 4.0",
                       f"mini MoMA, {MINI_SETTING.shape}, a CPU with instructions for bfloat16", against_16_bits, 7))
    listed.append(Case("released code's loop / at once, on two cores, mini", ">= 4.0", f"mini MoMA on CPUs, two subjects of {MINI_SETTING.shape}",
                       on_two_cores, 7, by_the_clock=True))
    if compiled:
        listed.append(Case("a subject at once, as it is / compiled, sd15", "", f"{shape}, {COMPILE}", eager_against_compiled))
    return listed
