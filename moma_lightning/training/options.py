"""How a stage is trained, apart from what is trained: memory against time."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Checkpointing = Literal["none", "blocks", "all"]


@dataclass
class TrainingOptions:
    """Options of both stages.

    activation_checkpointing: what is computed again in the backward pass instead of being kept. "blocks": every transformer
        block of the UNet and of the language model; "all": the UNet's residual blocks too. Gradients are the same.
    compile: torch.compile stage 2's UNet (its two passes are one graph each). The first steps then take minutes.
    """

    activation_checkpointing: Checkpointing = "none"
    compile: bool = False


def checkpoint_activations(module: nn.Module, policy: Checkpointing) -> None:
    """Switch on the recomputation that diffusers' and transformers' models bring, by policy.

    Keys and values of MoMA's attention come in from outside, so computing a block twice reads the same ones twice.
    """
    if policy == "none":
        return
    for part in module.modules():
        if not hasattr(part, "gradient_checkpointing"):
            continue
        is_unet_block = type(part).__module__.startswith("diffusers") and type(part).__name__ != "Transformer2DModel"
        if policy == "all" or not is_unet_block:
            part.gradient_checkpointing = True
            part._gradient_checkpointing_func = _recompute


def _recompute(function, *args, **kwargs):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
