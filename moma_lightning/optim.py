"""AdamW, its parameter groups and its learning-rate schedule, for both training stages."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from moma_lightning.quantization import require_bitsandbytes
from moma_lightning.training.sharding import is_sharded, whole_shape


@dataclass
class OptimizerConfig:
    """AdamW's options. Warm-up is linear over `warmup_steps`; cosine and linear schedules then fall to 0 at the last step.

    kind: `adamw8bit` is bitsandbytes', with moments of 8 bits; it needs a CUDA GPU and does not know sharded parameters.
    lr_multipliers: regex of parameter names -> factor on `lr`; the first regex that is found in a name counts.
    Vectors and scalars (norms, biases, tokens, lambda) are never decayed.
    """

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    lr_multipliers: dict[str, float] = field(default_factory=dict)


def configure(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, total_steps: float
) -> dict[str, Any]:
    """What `LightningModule.configure_optimizers` returns, for named parameters; frozen ones are passed over.

    `total_steps` is the trainer's `estimated_stepping_batches`. Raises ValueError when nothing is trained, when a
    multiplier's regex names no trained parameter, or when a falling schedule meets a training without an end.
    """
    optimizer = build(parameters, config)
    if config.schedule != "constant" and not math.isfinite(total_steps):
        raise ValueError(f"schedule {config.schedule!r} needs an end of training: set trainer.max_steps or max_epochs")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(step, config, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer alone. Raises ValueError as `configure`, and for `adamw8bit` what `require_bitsandbytes` raises."""
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter is trained: every one is frozen")
    make = adamw8bit(trained) if config.kind == "adamw8bit" else torch.optim.AdamW
    return make(parameter_groups(trained, config), lr=config.lr, betas=config.betas)


def adamw8bit(trained: list[tuple[str, nn.Parameter]]) -> type[torch.optim.Optimizer]:
    require_bitsandbytes("optimizer.kind adamw8bit")
    if any(is_sharded(parameter) for _, parameter in trained):
        raise ValueError("optimizer.kind adamw8bit does not know sharded parameters: train with --trainer.strategy ddp, or with kind adamw")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def parameter_groups(trained: list[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW's groups: one for each learning rate and decay that occurs, in a fixed order."""
    for pattern in config.lr_multipliers:
        if not any(re.search(pattern, name) for name, _ in trained):
            raise ValueError(f"lr_multipliers: {pattern!r} is found in no trained parameter's name")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained:
        factor = next((f for pattern, f in config.lr_multipliers.items() if re.search(pattern, name)), 1.0)
        decay = config.weight_decay if len(whole_shape(parameter)) > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return [{"params": p, "lr": config.lr * factor, "weight_decay": decay} for (factor, decay), p in groups.items()]


def schedule_factor(step: int, config: OptimizerConfig, total_steps: float) -> float:
    """The learning rate at optimizer step `step` (from 0), as a part of its peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
