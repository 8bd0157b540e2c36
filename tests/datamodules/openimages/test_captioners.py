"""BLIP-2 as the factory calls it, at a tiny size with random weights, and captioners of one's own."""

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from datamodules.openimages.captioners import Blip2Captioner, Captioner, build_captioner
from datamodules.openimages.config import CaptionConfig
from tests.datamodules.openimages.tiny_blip2 import save

IMAGES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (20 + i, 30, 3), np.uint8)) for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save(tmp_path_factory.mktemp("blip2")))


class Measured:
    """A captioner of one's own."""

    def __init__(self, unit: str = "pixels"):
        self.unit = unit

    def __call__(self, images):
        return [f"{image.width} {self.unit}" for image in images]


def test_a_batch_gives_what_its_pictures_give_alone(folder):
    captioner = Blip2Captioner(folder, max_new_tokens=6)
    together = captioner(IMAGES)
    assert together == [captioner([image])[0] for image in IMAGES] and all(together)
    assert all(text == text.strip() and "<" not in text for text in together)


def test_16_bits_on_a_cpu(folder):
    captioner = Blip2Captioner(folder, max_new_tokens=6, dtype="bfloat16")
    assert {p.dtype for p in captioner.model.parameters()} == {torch.bfloat16} and all(captioner(IMAGES))
    assert {p.dtype for p in Blip2Captioner(folder, device="cpu").model.parameters()} == {torch.float32}


def test_a_prompt_is_read_and_not_part_of_the_caption(folder):
    words = "a photo of the"
    prompted, plain = Blip2Captioner(folder, prompt=words, max_new_tokens=6), Blip2Captioner(folder, max_new_tokens=6)
    given = []
    generate = prompted.model.generate
    prompted.model.generate = lambda **inputs: given.append(inputs["input_ids"]) or generate(**inputs)
    captions = prompted(IMAGES)
    assert prompted.processor.batch_decode(given[0], skip_special_tokens=True) == [words] * 3
    assert captions != plain(IMAGES) and all(0 < len(text.split()) <= 6 for text in captions)


def test_a_captioner_of_ones_own_is_built_by_its_class_path():
    captioner = build_captioner(CaptionConfig(captioner=f"{__name__}.Measured", init_args={"unit": "px"}))
    assert isinstance(captioner, Captioner) and captioner(IMAGES) == ["30 px"] * 3


def test_the_captioner_is_the_papers_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="^Salesforce/blip2-opt-6.7b could not be loaded"):
        build_captioner(CaptionConfig())


@pytest.mark.parametrize("path", ["nothing", "nothing.Here", "datamodules.openimages.captioners.Nothing", ".Blip2Captioner"])
def test_a_path_that_is_no_class_is_named(path):
    with pytest.raises(ValueError, match=f"captions.captioner: no class '{path}'"):
        build_captioner(CaptionConfig(captioner=path))
