"""Adapter and decoder to the hub and back, through huggingface_hub's mixin and a hub on the loopback interface."""

import json

import pytest
import torch
from huggingface_hub import ModelCard, constants

from moma_lightning.models.adapter import MoMAAdapter
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from tests.fake_hub import fake_hub
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture
def hub(tmp_path):
    with fake_hub(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def decoder(tiny_foundation) -> ImageFeatureDecoder:
    torch.manual_seed(0)
    decoder = ImageFeatureDecoder.from_foundation(tiny_foundation, DecoderConfig(), 12).eval()
    with torch.no_grad():
        for parameter in decoder.own_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_an_adapter_is_pushed_and_loaded_again_offline_too(hub, variant, monkeypatch):
    base = tiny_base()
    adapter = tiny_adapter(base, variant)
    adapter.push_to_hub("tester/adapter")
    assert set(hub.repositories["tester/adapter"]) == {"moma.safetensors", "card.json", "README.md"}
    loaded = MoMAAdapter.from_pretrained("tester/adapter@main", base.unet)
    assert loaded.variant == variant and same(loaded, adapter) and not any(p.requires_grad for p in loaded.parameters())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(MoMAAdapter.from_pretrained(f"tester/adapter@{hub.commit('tester/adapter')}", base.unet), adapter)


def test_a_decoder_is_pushed_without_the_mllm_and_loaded_again(hub, decoder, tiny_foundation):
    decoder.push_to_hub("tester/decoder")
    assert set(hub.repositories["tester/decoder"]) == {"model.safetensors", "config.json", "README.md"}
    own = sum(p.numel() * p.element_size() for p in decoder.own_parameters().values())
    assert own < len(hub.repositories["tester/decoder"]["model.safetensors"]) < own + 10_000
    assert same(ImageFeatureDecoder.from_pretrained("tester/decoder@main", tiny_foundation), decoder)


def test_folders_hold_the_same_and_cards_say_what_is_in_them(decoder, tiny_foundation, tmp_path):
    base = tiny_base()
    adapter = tiny_adapter(base, "paper")
    adapter.save_pretrained(tmp_path / "adapter")
    decoder.save_pretrained(tmp_path / "decoder")
    assert same(MoMAAdapter.from_pretrained(tmp_path / "adapter", base.unet), adapter)
    assert same(ImageFeatureDecoder.from_pretrained(tmp_path / "decoder", tiny_foundation), decoder)
    for name, words in {"adapter": ["variant `paper`", "4 tokens"], "decoder": ["12 numbers", "width 24", "template `paper`, one learnable token"]}.items():
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.library_name == "moma_lightning" and "moma" in card.data.tags
        assert all(word in card.text for word in [*words, "2404.05674", "from_pretrained"]) and "{{" not in card.text


def test_a_card_that_was_written_by_hand_stays(tmp_path):
    adapter = tiny_adapter(tiny_base())
    (tmp_path / "README.md").write_text("mine")
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and json.loads((tmp_path / "card.json").read_text())["variant"] == "released"


def test_a_repository_that_is_not_there_is_named(hub, tiny_foundation):
    with pytest.raises(FileNotFoundError, match=r"tester/none@main could not be loaded .*Repository Not Found"):
        MoMAAdapter.from_pretrained("tester/none@main", tiny_base().unet)
    with pytest.raises(FileNotFoundError, match=r"(?s)tester/none@main could not be loaded .*moma_lightning fetch --models tester/none@main"):
        ImageFeatureDecoder.from_pretrained("tester/none@main", tiny_foundation)
