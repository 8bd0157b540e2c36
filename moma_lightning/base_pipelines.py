"""diffusers' pipelines of the two families of bases, Stable Diffusion and SDXL, behind the few methods in which they differ for MoMA."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from moma_lightning.foundation import Base
from moma_lightning.models.text import TextConditioning, read_twice, sized


class BasePipelineSD(StableDiffusionPipeline):
    """Of Stable Diffusion 1 and 2."""

    @classmethod
    def of(cls, base: Base) -> Any:
        return cls(base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler, safety_checker=None,
                   feature_extractor=None, requires_safety_checker=False)

    @property
    def tokenizers(self) -> list:
        return [self.tokenizer]

    @property
    def text_encoders(self) -> list:
        return [self.text_encoder]

    def encode_text(self, prompts: list[str], size: Sequence[int], repeats: int = 1, guided: bool = False,
                    negative: list[str] | None = None) -> TextConditioning:
        """diffusers' `encode_prompt`, each prompt `repeats` times, for pictures of `size`; where guided, the unconditional half comes first."""
        positive, unconditional = self.encode_prompt(prompts, self._execution_device, repeats, guided, negative)
        return TextConditioning(torch.cat([unconditional, positive]) if guided else positive)

    def vae_in_range(self) -> nullcontext:
        """Inside, the autoencoder has the type that its values need."""
        return nullcontext()


class BasePipelineSDXL(StableDiffusionXLPipeline):
    """Of SDXL: two text encoders, and every pass of the UNet is told the picture's size. No watermark is put on pictures."""

    @classmethod
    def of(cls, base: Base) -> Any:
        return cls(base.vae, base.text_encoder, base.text_encoder_2, base.tokenizer, base.tokenizer_2, base.unet, base.scheduler,
                   force_zeros_for_empty_prompt=base.force_zeros_for_empty_prompt, add_watermarker=False)

    @property
    def tokenizers(self) -> list:
        return [self.tokenizer, self.tokenizer_2]

    @property
    def text_encoders(self) -> list:
        return [self.text_encoder, self.text_encoder_2]

    def encode_text(self, prompts: list[str], size: Sequence[int], repeats: int = 1, guided: bool = False,
                    negative: list[str] | None = None) -> TextConditioning:
        """The same bits as `encode_prompt`, which cannot read with an encoder that FSDP has wrapped.

        Without a negative prompt the unconditional half is zeros where the base says `force_zeros_for_empty_prompt`.
        """
        read = self._read(prompts)
        halves = [read]
        if guided:
            zeros = negative is None and self.config.force_zeros_for_empty_prompt
            halves.insert(0, tuple(map(torch.zeros_like, read)) if zeros else self._read(negative or [""] * len(prompts)))
        hidden_states, pooled = (torch.cat([part.repeat_interleave(repeats, 0) for part in parts]) for parts in zip(*halves, strict=True))
        return sized(hidden_states, pooled, size)

    def _read(self, texts: list[str]) -> tuple[Tensor, ...]:
        """Hidden states and pooled embedding; a loaded textual inversion of several tokens is spelled out, as in `encode_prompt`."""
        texts = self.maybe_convert_prompt(texts, self.tokenizer)
        return read_twice(texts, self.tokenizers, self.text_encoders, self._execution_device)

    @contextmanager
    def vae_in_range(self) -> Iterator[None]:
        """SDXL's own autoencoder overflows in float16 and says so (`force_upcast`): inside it works in float32."""
        narrow = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        try:
            if narrow:
                self.vae.to(torch.float32)
            yield
        finally:
            if narrow:
                self.vae.to(torch.float16)
