"""AdamW, its parameter groups and its learning-rate schedule, for both training stages."""

import math
import re
from collections.abc import Callable, Iterable
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
    multiplier's regex names no trained parameter, when a falling schedule meets a training without an end, and when a checkpoint of other groups is read.
    """
    optimizer = build(parameters, config)
    if config.schedule != "constant" and not math.isfinite(total_steps):
        raise ValueError(f"schedule {config.schedule!r} needs an end of training: set trainer.max_steps or max_epochs")
    optimizer.register_load_state_dict_pre_hook(require_same_groups)
    optimizer.register_state_dict_post_hook(without_names)
    scheduler = ConfiguredLR(optimizer, lambda step: schedule_factor(step, config, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ConfiguredLR(torch.optim.lr_scheduler.LambdaLR):
    """LambdaLR for a training that goes on by its config: learning rates, decay, betas and groups' names are not the checkpoint's, where they have changed.

    Lightning reads it after the optimizer, whose groups it puts right.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]):
        self.given = [{name: group[name] for name in ("lr", "betas", "weight_decay", "name")} for group in optimizer.param_groups]
        super().__init__(optimizer, factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"base_lrs": self.base_lrs, "given": self.given})
        for group, given, factor in zip(self.optimizer.param_groups, self.given, self.lr_lambdas, strict=True):
            group |= given | {"initial_lr": given["lr"], "lr": given["lr"] * factor(self.last_epoch)}


def require_same_groups(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    sizes = [[len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state_dict["param_groups"])]
    if sizes[0] != sizes[1]:
        raise ValueError("the checkpoint's optimizer has other groups of parameters: `optimizer.lr_multipliers` are not those that it was trained with "
                         "(or an older version wrote it, with a weight_decay of 0); give those, or train under another trainer.default_root_dir")


def without_names(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Names are for logs: a sharded checkpoint, read by what is held now, would have to have them."""
    return state_dict | {"param_groups": [{key: value for key, value in group.items() if key != "name"} for group in state_dict["param_groups"]]}


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
    """AdamW's groups, in a fixed order, and the names that logs know them by: matrices and the rest, of each multiplier and of what has none."""
    for pattern in config.lr_multipliers:
        if not any(re.search(pattern, name) for name, _ in trained):
            raise ValueError(f"lr_multipliers: {pattern!r} is found in no trained parameter's name")
    groups: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
    for name, parameter in trained:
        found = next((pattern for pattern in config.lr_multipliers if re.search(pattern, name)), None)
        groups.setdefault((found, len(whole_shape(parameter)) > 1), []).append(parameter)
    return [{"params": p, "lr": config.lr * (1.0 if found is None else config.lr_multipliers[found]), "weight_decay": config.weight_decay if is_matrix else 0.0,
             "name": ("" if found is None else f"{found}/") + ("matrices" if is_matrix else "vectors")}
            for (found, is_matrix), p in groups.items()]


def schedule_factor(step: int, config: OptimizerConfig, total_steps: float) -> float:
    """The learning rate at optimizer step `step` (from 0), as a part of its peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
