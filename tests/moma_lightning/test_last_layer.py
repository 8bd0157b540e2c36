"""The last layer's MLP runs only where its output is read, and what is read is as it was."""

import contextlib
import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlavaConfig

from experiments.mini.models import mini_foundation
from moma_lightning.foundation import load_image_encoder
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.models.last_layer import only_first_read
from moma_lightning.models.mllm import FAMILIES, unread_vision_layer
from moma_lightning.models.preprocess import preprocess, preprocess_square
from moma_lightning.training.options import checkpoint_activations
from tests import tiny_mllms

LABELS, PROMPTS = ["cat", "toy robot", "mug"], ["a cat", "a toy robot in front of a brick wall at sunset", "a mug in the snow"]


def without_hooks(module: nn.Module) -> nn.Module:
    """A copy whose language model computes all positions."""
    plain = copy.deepcopy(module)
    for part in plain.modules():
        part._forward_pre_hooks.clear()
        part._forward_pre_hooks_with_kwargs.clear()
    return plain


@contextlib.contextmanager
def seen_by(mlp: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Shapes that the MLP's first layer is given."""
    shapes: list[tuple[int, ...]] = []
    first = next(part for part in mlp.modules() if isinstance(part, nn.Linear))
    hook = first.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    yield shapes
    hook.remove()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def decoder(request, tiny_foundation, tmp_path_factory) -> ImageFeatureDecoder:
    foundation, side = tiny_foundation, None
    if request.param != "llava":
        folder, side = tmp_path_factory.mktemp(request.param), tiny_mllms.image_size(request.param)
        tiny_mllms.write(request.param, folder)
        foundation = replace(tiny_foundation, mllm=str(folder))
    torch.manual_seed(1)
    return ImageFeatureDecoder.from_foundation(foundation, DecoderConfig(image_size=side), 12)


def pictures_for(decoder: ImageFeatureDecoder, count: int = 3) -> Tensor:
    return torch.rand(count, 3, decoder.picture_side, decoder.picture_side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def gradients(decoder: ImageFeatureDecoder, losses: list[Tensor]) -> dict[str, Tensor]:
    decoder.zero_grad()
    torch.stack(losses).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in decoder.named_parameters() if parameter.grad is not None}


def test_the_decoders_output_and_gradients_are_those_of_all_positions(decoder):
    plain, pictures = without_hooks(decoder), pictures_for(decoder)
    with seen_by(decoder.mllm.get_decoder().layers[-1].mlp) as shapes:
        ours, theirs = (each(pictures, LABELS, PROMPTS) for each in (decoder, plain))
    assert shapes == [(3, 1, decoder.token.shape[0])]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    expected = gradients(plain, [theirs.square().sum()])
    found = gradients(decoder, [ours.square().sum()])
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_two_passes_before_a_backward_pass_recompute_each_its_own_places(decoder):
    """The second pass has other lengths: a place remembered from it would be wrong in the first one's recomputation."""
    module, pictures = copy.deepcopy(decoder).train(), pictures_for(decoder)

    def losses() -> list[Tensor]:
        return [module(pictures, labels, prompts).square().sum() for labels, prompts in ((LABELS, PROMPTS), (LABELS[::-1], PROMPTS[::-1]))]

    expected = gradients(module, losses())
    checkpoint_activations(module.mllm.get_decoder(), "blocks")
    with seen_by(module.mllm.get_decoder().layers[-1].mlp) as shapes:
        found = gradients(module, losses())
    assert shapes == [(3, 1, decoder.token.shape[0])] * 4, "two passes, and each once more"
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_copied_and_a_pickled_model_read_their_own_places(decoder):
    pictures = pictures_for(decoder)
    language_model = pickle.loads(pickle.dumps(decoder.mllm.get_decoder()))
    embeds, last = torch.randn(3, 9, decoder.token.shape[0]), torch.tensor([8, 3, 5])
    read = [model(inputs_embeds=embeds, read_at=last, use_cache=False).last_hidden_state for model in (decoder.mllm.get_decoder(), language_model)]
    assert torch.equal(*(each[torch.arange(3), last] for each in read))
    assert torch.equal(copy.deepcopy(decoder)(pictures, LABELS, PROMPTS), decoder(pictures, LABELS, PROMPTS))


def test_a_language_model_that_is_not_told_where_gives_all_positions(decoder):
    language_model, embeds = decoder.mllm.get_decoder(), torch.randn(2, 7, decoder.token.shape[0])
    language_model(inputs_embeds=embeds, read_at=torch.tensor([1, 2]), use_cache=False)
    whole = language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    torch.testing.assert_close(whole, without_hooks(language_model)(inputs_embeds=embeds, use_cache=False).last_hidden_state)


def test_a_pass_that_fails_leaves_no_hook_behind():
    layer = nn.ModuleDict({"mlp": nn.Linear(3, 3)})
    with pytest.raises(RuntimeError, match="shapes"), only_first_read(layer):
        layer.mlp(torch.zeros(2, 5, 4))
    assert layer.mlp(torch.zeros(2, 5, 3)).shape == (2, 5, 3)


@torch.no_grad()
def test_clips_embedding_is_that_of_the_whole_model():
    encoder = load_image_encoder(mini_foundation())
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    with seen_by(encoder.model.vision_model.encoder.layers[-1].mlp) as shapes:
        embeds = encoder(pictures)
        whole = encoder.model(preprocess(pictures, encoder.image_processor))
    torch.testing.assert_close(embeds, whole.image_embeds)
    assert [shape[:2] for shape in shapes] == [(2, 1), (2, whole.last_hidden_state.shape[1])]


@torch.no_grad()
def test_llavas_picture_is_that_of_the_layer_before_the_last(tiny_foundation):
    decoder = ImageFeatureDecoder.from_foundation(tiny_foundation, DecoderConfig(), 12)
    layer = unread_vision_layer(decoder.mllm)
    assert layer is decoder.mllm.vision_tower.encoder.layers[-1]
    pictures = pictures_for(decoder)
    pixels = preprocess_square(pictures, decoder.picture_side, decoder.image_processor)
    with seen_by(layer.mlp) as shapes:
        seen, whole = decoder.see(pictures).embeds, decoder.mllm.get_image_features(pixels, return_dict=True).pooler_output
    assert torch.equal(seen, torch.stack(whole)) and shapes[0][1] == 1 < shapes[1][1]


@pytest.mark.parametrize("read, tower", [(-1, "clip_vision_model"), ([-2], "clip_vision_model"), (-2, "dinov2"), (-2, "vit")])
def test_a_vision_layer_that_is_read_or_not_to_be_found_is_left_alone(read, tower):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    language = AutoConfig.for_model("llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64)
    config = LlavaConfig(vision_config=AutoConfig.for_model(tower, **sizes), text_config=language, vision_feature_layer=read)
    assert unread_vision_layer(AutoModel.from_config(config)) is None
