"""DreamBooth with LoRA: low-rank changes of the UNet's attention, learned from the subject's picture (Ruiz et al., arXiv 2208.12242)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from evaluation.methods.tuned import TunedMethod, Weights, reworded
from evaluation.tasks import PictureTask
from moma_lightning.models.trained_weights import check_fit


@dataclass
class DreamBoothLora(TunedMethod):
    """Learns LoRA matrices on the attention projections; prompts say "a <token> <label> ...".

    Defaults are those of diffusers' train_dreambooth_lora example (rank 4, batch 1, 1e-4, 500 steps, "a photo of sks dog", no
    prior preservation), for a Stable Diffusion 1.5 base; not measured there, for want of its weights. Needs the `baselines` extra.

    token: a rare word that names the subject. rank: of the LoRA matrices, with alpha = rank.
    """

    token: str = "sks"
    rank: int = 4

    @contextmanager
    def tuned(self, label: str, weights: Weights | None = None) -> Iterator[dict[str, nn.Parameter]]:
        unet = self.pipeline.unet
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                unet.add_adapter(lora_config(self.rank))
            parameters = {name: parameter for name, parameter in unet.named_parameters() if ".lora_" in name}
            if weights is not None:
                load(parameters, weights)
            yield parameters
        finally:
            unet.unload_lora()

    def captions(self, label: str, random: np.random.Generator) -> list[str]:
        return [f"a photo of {self.token} {label}"] * self.batch_size

    def worded(self, task: PictureTask) -> PictureTask:
        return reworded(task, f"{self.token} {task.label}")


def lora_config(rank: int):
    """LoRA on every attention projection, as the example has it. Raises ImportError that says what to install."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("DreamBoothLora needs peft: pip install 'moma-lightning[baselines]'") from error
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"])


@torch.no_grad()
def load(parameters: dict[str, nn.Parameter], weights: Weights) -> None:
    check_fit("the trained LoRA", weights, parameters)
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
