"""Captioners: pictures to raw captions. Any class with this call can take BLIP-2's place, by its class path."""

import importlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from datamodules.openimages.config import CaptionConfig
from moma_lightning.hub import loading, resolve
from moma_lightning.whole import load_whole


@runtime_checkable
class Captioner(Protocol):
    """Built once in each captioning process; called with up to `captions.batch_size` RGB pictures, gives as many captions."""

    def __call__(self, images: Sequence[Image.Image]) -> list[str]: ...


class Blip2Captioner:
    """BLIP-2 (the paper: OPT-6.7B) through transformers; greedy, without a text prompt unless one is given.

    model: folder or hub name (moma_lightning/hub.py), `@<revision>` pins one. dtype: None is bfloat16 on a GPU (16 GB of weights for 6.7B), float32 elsewhere.
    """

    def __init__(self, model: str = "Salesforce/blip2-opt-6.7b", prompt: str | None = None, max_new_tokens: int = 40, num_beams: int = 1,
                 device: str | None = None, dtype: str | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        with loading(model):
            self.processor = Blip2Processor.from_pretrained(**resolve(model))
        self.model = load_whole(Blip2ForConditionalGeneration, model, resolve(model), dtype=getattr(torch, chosen)).to(self.device).eval()
        self.processor.tokenizer.padding_side = "left"
        self.prompt, self.options = prompt, {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        text = [self.prompt] * len(images) if self.prompt else None
        inputs = self.processor(images=list(images), text=text, return_tensors="pt").to(self.device, self.model.dtype)
        ids = self.model.generate(**inputs, **self.options)
        if self.prompt:
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return [caption.strip() for caption in self.processor.batch_decode(ids, skip_special_tokens=True)]


def build_captioner(config: CaptionConfig) -> Captioner:
    """The class of `config.captioner` with `config.init_args`. Raises ValueError for a path that is none."""
    module, _, name = config.captioner.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"captions.captioner: no class {config.captioner!r} ({error})") from error
    return made(**config.init_args)
