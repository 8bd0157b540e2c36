"""How a guided step grows with resolution and mask: each ratio is of a larger step over a smaller one."""

from collections.abc import Callable

import torch

from experiments.benchmarks.guided_step import Setting, Size
from experiments.benchmarks.timing import PRECISION, Case

QUARTER = 0.25


def larger_against_smaller(larger: tuple[int, float], smaller: tuple[int, float]):
    """Side of the latents and share of the mask, of each."""
    def prepare(device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
        unet = Size("", 0, QUARTER if device.type == "cpu" else 1.0).build(device)
        return tuple(Setting(unet, *setting, device).moma for setting in (larger, smaller))  # type: ignore[return-value]

    return prepare


def cases() -> list[Case]:
    shape = f"guided step, SD 1.5's UNet x0.25 (on a GPU x1), {PRECISION}"
    masked = f"{shape}, mask 25%"
    resolutions = [Case(f"growth: {8 * b} to {8 * a} pixels", "", masked, larger_against_smaller((a, 0.25), (b, 0.25)), 3) for a, b in ((64, 32), (128, 64))]
    masks = [Case(f"growth: mask {b:.0%} to {a:.0%}", "", f"{shape}, 64x64 latents", larger_against_smaller((64, a), (64, b)), pairs=3)
             for a, b in ((0.25, 0.05), (1.0, 0.25))]  # fmt: skip
    return resolutions + masks
