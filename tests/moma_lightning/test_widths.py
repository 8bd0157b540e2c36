"""Image encoder, decoder and adapter that do not belong together are refused by name, before the MLLM is loaded."""

import warnings
from dataclasses import replace

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from moma_lightning.checkpoints import save_adapter
from moma_lightning.models.adapter import MoMAAdapter
from moma_lightning.models.image_feature_decoder import ImageFeatureDecoder
from moma_lightning.modules.stage2 import Stage2, Stage2Config
from moma_lightning.optim import OptimizerConfig
from moma_lightning.pipeline import load_pipeline
from tests.moma_lightning.conftest import EMBED, image_processor, vision_options
from tests.tiny import tiny_base


@pytest.fixture
def wider(foundation, tmp_path):
    """The foundation with an image encoder of 20 numbers."""
    folder = str(tmp_path / "encoder")
    for part in (image_processor(16), CLIPVisionModelWithProjection(CLIPVisionConfig(**vision_options() | {"projection_dim": 20}))):
        part.save_pretrained(folder)
    return replace(foundation, image_encoder=folder)


@pytest.fixture
def no_mllm(monkeypatch):
    monkeypatch.setattr(f"{ImageFeatureDecoder.__module__}.load_mllm", lambda *_: pytest.fail("gigabytes were loaded first"))


def adapter_folder(tmp_path, width: int) -> str:
    save_adapter(MoMAAdapter.for_unet(tiny_base().unet, width), tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_stage_2_names_image_encoder_and_decoder(wider, decoder_folder, no_mllm):
    with pytest.raises(ValueError, match=rf"the image encoder {wider.image_encoder} has .* of 20 numbers, the decoder {decoder_folder} of {EMBED}:"):
        Stage2(wider, Stage2Config(), OptimizerConfig(), decoder_folder)


def test_the_pipeline_names_image_encoder_and_decoder(wider, decoder_folder, no_mllm):
    with pytest.raises(ValueError, match=rf"the image encoder {wider.image_encoder} has .* of 20 numbers, the decoder {decoder_folder} of {EMBED}:"):
        load_pipeline(wider, decoder=decoder_folder)


def test_the_pipeline_names_the_adapter(wider, foundation, decoder_folder, tmp_path, no_mllm):
    folder = adapter_folder(tmp_path, 20)
    with pytest.raises(ValueError, match=rf"of {EMBED} numbers, the adapter {folder} of 20:"):
        load_pipeline(foundation, adapter=folder, decoder=decoder_folder)
    with pytest.raises(ValueError, match=rf"of 20 numbers, the decoder {decoder_folder} of {EMBED}:"):
        load_pipeline(wider, adapter=folder, decoder=decoder_folder)


def test_what_belongs_together_is_loaded(foundation, decoder_folder, tmp_path):
    pipe = load_pipeline(foundation, adapter=adapter_folder(tmp_path, EMBED), decoder=decoder_folder)
    assert pipe.decoder.embed_dim == pipe.clip.embed_dim == pipe.adapter.image_proj.proj.in_features == EMBED


def test_an_adapter_of_clips_embeddings_is_not_given_a_decoders_in_silence(foundation, decoder_folder, tmp_path):
    save_adapter(MoMAAdapter.for_unet(tiny_base().unet, EMBED), tmp_path / "adapter", {"context": "image_encoder"})
    with pytest.warns(UserWarning, match="trained on CLIP's embeddings"):
        load_pipeline(foundation, adapter=str(tmp_path / "adapter"), decoder=decoder_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_pipeline(foundation, adapter=str(tmp_path / "adapter"))


def test_a_decoder_that_is_not_there_is_named(foundation, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.config\.json is missing"):
        load_pipeline(foundation, decoder=str(tmp_path / "nowhere"))
