"""What a call of `MoMAPipeline` is given: texts as lists, and what cannot be, whatever the models are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moma_lightning.subject import Subject


def as_lists(
    prompt: str | Sequence[str], mllm_prompt: str | Sequence[str] | None, negative_prompt: str | Sequence[str] | None
) -> tuple[list[str], list[str], list[str] | None]:
    """Prompts, what the decoder is asked for, and negative prompts. Raises ValueError where they are not as many."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    asked = prompts if mllm_prompt is None else [mllm_prompt] if isinstance(mllm_prompt, str) else list(mllm_prompt)
    negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt or []) or None
    if len(asked) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(asked)} mllm_prompts: must be as many")
    if negative and len(negative) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(negative)} negative prompts: must be as many, or one string for all")
    return prompts, asked, negative


def check_settings(prompts: int, num_images_per_prompt: int, num_inference_steps: int, guidance_scale: float) -> None:
    """Raises ValueError for counts below 1 and a guidance_scale below 0 or not a number."""
    if min(prompts, num_images_per_prompt, num_inference_steps) < 1:
        counts = f"{prompts} prompts, num_images_per_prompt {num_images_per_prompt}, num_inference_steps {num_inference_steps}"
        raise ValueError(f"{counts}: each has to be 1 at least")
    if not guidance_scale >= 0:
        raise ValueError(f"guidance_scale {guidance_scale}: 1 or less draws without guidance, more with it")


def check_conditions(prompts: int, image: Any, mask: Any, label: str | None, beta: Any, image_embeds: Tensor | None) -> None:
    """Raises ValueError for a mask or label without its picture or beside a Subject of others, and for betas or image_embeds that are neither one nor
    one a prompt.
    """
    if image is None and (mask is not None or label is not None):
        raise ValueError("mask and label are those of a picture: give it as image")
    if isinstance(image, Subject) and (mask is not None or label not in (None, image.label)):
        raise ValueError(f"the Subject was prepared with a mask and the label {image.label!r}: for others prepare the picture anew")
    betas = torch.as_tensor(beta)
    for name, given, dims in (("beta", betas if betas.dim() else None, 1), ("image_embeds", image_embeds, 2)):
        if given is not None and (given.dim() != dims or given.shape[0] not in (1, prompts)):
            raise ValueError(f"{name} of shape {tuple(given.shape)} for {prompts} prompts: give one, or one a prompt")


def check_latents(latents: Tensor | None, pictures: int, channels: int) -> None:
    """Raises ValueError for noise of another number of pictures or channels; as in diffusers it may be of another size than height and width say."""
    if latents is not None and (latents.dim() != 4 or latents.shape[:2] != (pictures, channels)):
        raise ValueError(f"latents of shape {tuple(latents.shape)}: {pictures} pictures begin from ({pictures}, {channels}, height, width)")
