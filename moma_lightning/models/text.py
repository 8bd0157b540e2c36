"""What the UNet reads of a text: hidden states, and for SDXL a pooled embedding and the picture's size besides."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class TextConditioning(NamedTuple):
    """Arguments of the UNet. added_cond_kwargs: None for Stable Diffusion 1 and 2; for SDXL `text_embeds` [batch, dim] and `time_ids` [batch, 6]."""

    encoder_hidden_states: Float[Tensor, "batch text dim"]
    added_cond_kwargs: dict[str, Tensor] | None = None


def sized(hidden_states: Float[Tensor, "batch text dim"], pooled: Float[Tensor, "batch pooled"], size: Sequence[int]) -> TextConditioning:
    """SDXL's conditioning (Podell et al., 2023, section 2.2) for a whole picture of `size`, (height, width) in pixels.

    It is told that the picture was always of that size and is not cropped, as StableDiffusionXLPipeline says by default.
    """
    height, width = size
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=hidden_states.dtype).to(hidden_states.device)
    return TextConditioning(hidden_states, {"text_embeds": pooled, "time_ids": time_ids.repeat(len(pooled), 1)})


def encode_text(
    texts: list[str], tokenizers: Sequence[Any], text_encoders: Sequence[Any], size: Sequence[int], device: torch.device, zeros_for_empty: bool
) -> TextConditioning:
    """What `encode_prompt` of diffusers' two pipelines makes of texts, for training; `MoMAPipeline` itself uses theirs.

    One encoder gives its last hidden states. SDXL's two give their penultimate ones side by side, and the second one its pooled
    embedding; with `zeros_for_empty` an empty text is zeros there, which is what its unconditional half was trained with.
    """
    ids = [_ids(tokenizer, texts).to(device) for tokenizer in tokenizers]
    if len(text_encoders) == 1:
        return TextConditioning(text_encoders[0](ids[0]).last_hidden_state)
    outputs = [encoder(each, output_hidden_states=True) for encoder, each in zip(text_encoders, ids, strict=True)]
    hidden_states, pooled = torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[-1].text_embeds
    if zeros_for_empty:
        said = torch.tensor([[float(text != "")] for text in texts], device=device, dtype=pooled.dtype)
        hidden_states, pooled = hidden_states * said[..., None], pooled * said
    return sized(hidden_states, pooled, size)


def _ids(tokenizer: Any, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
