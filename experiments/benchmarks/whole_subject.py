"""A subject's evaluation at mini size: prepared once and batched over prompts and seeds, against one call a picture."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from datamodules.mini import world
from datamodules.mini.render import render
from experiments.benchmarks.timing import Case
from moma_lightning.foundation import MINI, FoundationConfig
from moma_lightning.pipeline import MoMAPipeline, load_pipeline

LABEL, STEPS, SEEDS, BATCH = "cat", 12, 4, 16
PLACES = ["on the beach", "in the snow", "in the jungle", "in the city at night"]
PROMPTS = [f"a {LABEL} {place}" for place in PLACES]


class Evaluation:
    """The shipped mini MoMA on a held-out subject; SAM finds its mask."""

    def __init__(self, pipe: MoMAPipeline):
        picture = world.sample_picture(np.random.default_rng(0), world.identity("heldout", 3, LABEL))
        self.pipe, self.image = pipe, Image.fromarray(render([picture])[0][0])
        self.tasks = [(prompt, seed) for prompt in PROMPTS for seed in range(SEEDS)]

    def draw(self, tasks: list[tuple[str, int]], **reference) -> np.ndarray:
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in tasks]
        settings = dict(generator=generators, guidance_scale=3.0, num_inference_steps=STEPS, output_type="np")
        return self.pipe([prompt for prompt, _ in tasks], **reference, **settings).images

    def batched(self) -> np.ndarray:
        """As the project evaluates: everything that the subject alone decides is made once."""
        area = self.pipe.default_size() ** 2
        subject = self.pipe.prepare_subject(self.image, None, LABEL, area)
        return np.concatenate([self.draw(self.tasks[i : i + BATCH], image=subject) for i in range(0, len(self.tasks), BATCH)])

    def one_by_one(self) -> np.ndarray:
        """The released code's loop: SAM, autoencoder, reference pass and MLLM anew for every picture, and a batch of one."""
        return np.concatenate([self.draw([task], image=self.image, label=LABEL) for task in self.tasks])


def prepare(device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    pipe = load_pipeline(FoundationConfig(), f"{MINI}/moma/adapter", f"{MINI}/moma/image_feature_decoder").to(str(device))
    evaluation = Evaluation(pipe)
    return evaluation.one_by_one, evaluation.batched


def cases() -> list[Case]:
    shape = f"mini MoMA, {len(PROMPTS)} prompts x {SEEDS} seeds, {STEPS} steps, batches of {BATCH}"
    return [Case("one by one / a subject at once, mini", ">= 4.0", shape, prepare)]
