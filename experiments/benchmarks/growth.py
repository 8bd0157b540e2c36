"""How a guided step grows with resolution, mask and batch, and an evaluation with its pictures: each ratio is of the larger over the smaller."""

from dataclasses import replace

import torch

from experiments.benchmarks.guided_step import Setting, Size
from experiments.benchmarks.timing import PRECISION, Case, Run
from experiments.benchmarks.whole_subject import ALL_PROMPTS, MINI_SETTING, mini_evaluation

QUARTER = 0.25


def larger_against_smaller(larger: tuple[int, float, int], smaller: tuple[int, float, int]):
    """Side of the latents, share of the mask and pictures at once, of each."""
    def prepare(device: torch.device) -> tuple[Run, Run]:
        unet = Size("", 0, QUARTER if device.type == "cpu" else 1.0).build(device)
        sizes = [(latents, share, device, pictures) for latents, share, pictures in (larger, smaller)]
        return tuple(Setting(unet, *size).moma for size in sizes)

    return prepare


def more_against_fewer_prompts(device: torch.device) -> tuple[Run, Run]:
    """In batches of one size, so that memory should not grow."""
    more, fewer = (mini_evaluation(device, replace(MINI_SETTING, prompts=ALL_PROMPTS[:count], batch=16)) for count in (16, 4))
    return more.batched, fewer.batched


def cases() -> list[Case]:
    shape = f"guided step, SD 1.5's UNet x0.25 (on a GPU x1), {PRECISION}"
    masked = f"{shape}, mask 25%"
    step = larger_against_smaller
    resolutions = [Case(f"growth: {8 * b} to {8 * a} pixels", "", masked, step((a, 0.25, 1), (b, 0.25, 1)), pairs=7) for a, b in ((64, 32), (128, 64))]
    masks = [Case(f"growth: mask {b:.0%} to {a:.0%}", "", f"{shape}, 64x64 latents", step((64, a, 1), (64, b, 1)), pairs=7)
             for a, b in ((0.25, 0.05), (1.0, 0.25))]
    batch = Case("growth: 1 to 4 pictures at once", "", f"{masked}, 32x32 latents", step((32, 0.25, 4), (32, 0.25, 1)))
    evaluation = f"mini MoMA, {MINI_SETTING.seeds} pictures of each, {MINI_SETTING.steps} steps, batches of 16"
    return [*resolutions, *masks, batch, Case("growth: 4 to 16 prompts of a subject", "", evaluation, more_against_fewer_prompts)]
