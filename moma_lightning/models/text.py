"""What the UNet reads of a text: hidden states, and for SDXL a pooled embedding and the picture's size besides."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moma_lightning.models.blocks import blocks_of


class TextConditioning(NamedTuple):
    """Arguments of the UNet. added_cond_kwargs: None for Stable Diffusion 1 and 2; for SDXL `text_embeds` [batch, dim] and `time_ids` [batch, 6]."""

    encoder_hidden_states: Float[Tensor, "batch text dim"]
    added_cond_kwargs: dict[str, Tensor] | None = None

    def repeated(self, times: int) -> "TextConditioning":
        """Each text so many times side by side."""
        added = self.added_cond_kwargs
        if added is not None:
            added = {name: value.repeat_interleave(times, 0) for name, value in added.items()}
        return TextConditioning(self.encoder_hidden_states.repeat_interleave(times, 0), added)


def sized(hidden_states: Float[Tensor, "batch text dim"], pooled: Float[Tensor, "batch pooled"], size: Sequence[int]) -> TextConditioning:
    """SDXL's conditioning (Podell et al., 2023, section 2.2) for a whole picture of `size`, (height, width) in pixels.

    It is told that the picture was always of that size and is not cropped, as StableDiffusionXLPipeline says by default.
    """
    height, width = size
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=hidden_states.dtype).to(hidden_states.device)
    return TextConditioning(hidden_states, {"text_embeds": pooled, "time_ids": time_ids.repeat(len(pooled), 1)})


def read_twice(
    texts: list[str], tokenizers: Sequence[Any], text_encoders: Sequence[Any], device: torch.device
) -> tuple[Float[Tensor, "batch text dim"], Float[Tensor, "batch pooled"]]:
    """SDXL's reading: the two encoders' penultimate hidden states side by side, and the second one's pooled embedding."""
    read = [penultimate(encoder, token_ids(tokenizer, texts).to(device)) for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True)]
    return torch.cat([hidden_states for hidden_states, _ in read], -1), read[-1][1].text_embeds


def penultimate(encoder: Any, ids: Int[Tensor, "batch text"]) -> tuple[Float[Tensor, "batch text dim"], Any]:
    """What the last layer but one makes, and the encoder's own output.

    By a hook: `output_hidden_states` is looked up by the model's class, which FSDP changes, and then gives nothing.
    """
    kept: list[Tensor] = []
    hook = blocks_of(encoder)[-2].register_forward_hook(lambda layer, args, output: kept.append(output[0] if isinstance(output, tuple) else output))
    try:
        output = encoder(ids)
    finally:
        hook.remove()
    return kept[0], output


def token_ids(tokenizer: Any, texts: list[str]) -> Int[Tensor, "batch text"]:
    return tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
