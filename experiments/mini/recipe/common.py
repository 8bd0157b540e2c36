"""What the mini foundation recipes share: rendered pictures, a resumable loop, saving beside and renaming."""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from datamodules.mini import world
from datamodules.mini.render import render
from moma_lightning.files import write_beside

WORK = Path(os.environ.get("MINI_WORK", "runs/mini-foundation"))
FOUNDATION = Path(os.environ.get("MINI_FOUNDATION", Path(__file__).parents[1] / "foundation"))


def sample_world(start: int, count: int, *, material_rate: float = 0.12, accessory_rate: float = 0.2) -> list[world.Picture]:
    """Pictures `start .. start + count` of the base models' training world: train identities only, one view each."""
    pictures = []
    for index in range(start, start + count):
        rng = np.random.default_rng([7, index])
        subject = world.identity("train", index)
        pictures.append(world.sample_picture(rng, subject, material_rate=material_rate, accessory_rate=accessory_rate))
    return pictures


def rendered(count: int) -> tuple[np.ndarray, np.ndarray, list[world.Picture]]:
    """`count` pictures, masks and descriptions, drawn once and kept in WORK."""
    pictures = sample_world(0, count)
    path = WORK / f"pictures-{count}.npz"
    if not path.exists():
        chunks = [render(pictures[i : i + 256]) for i in range(0, count, 256)]
        write_beside(path, lambda p: np.savez(p, images=np.concatenate([c[0] for c in chunks]), masks=np.concatenate([c[1] for c in chunks])))
    with np.load(path) as file:
        return file["images"], file["masks"], pictures


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [batch, height, width, 3] to float [batch, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, flat to the half, then linear decay to 2 % of the peak."""
    decay = 1 - 0.98 * max(0.0, (step - steps / 2) / (steps / 2))
    return peak * min(1.0, (step + 1) / warmup) * decay


def training_steps(name: str, steps: int, modules: dict, optimizer: torch.optim.Optimizer, peak: float,
                   every: int = 500, save: bool = True) -> Iterator[int]:
    """Yield step numbers, with the schedule set; resumes from and saves to WORK/<name>.ckpt every `every` steps."""
    path, first, started = WORK / f"{name}.ckpt", 0, time.time()
    if path.exists():
        state = torch.load(path, weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for key, module in modules.items():
            module.load_state_dict(state[key])
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak) * group.get("lr_scale", 1.0)
        yield step
        if save and ((step + 1) % every == 0 or step + 1 == steps):
            state = {"step": step + 1, "optimizer": optimizer.state_dict()} | {k: m.state_dict() for k, m in modules.items()}
            write_beside(path, lambda p: torch.save(state, p))
            left = (time.time() - started) / (step + 1 - first) * (steps - step - 1)
            print(f"{name}: step {step + 1}/{steps}, {left / 60:.1f} min left", flush=True)


def optimize(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step with the gradient's norm clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean PSNR in dB of pictures in [-1, 1]."""
    error = (a - b).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean()) if math.isfinite(float(error.sum())) else float("nan")
