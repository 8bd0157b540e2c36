import pytest
import torch

from moma_lightning.models.adapter import MoMAAdapter, SubjectAttention, attention_layers, subject_keys
from moma_lightning.models.attention import Conditioning
from moma_lightning.models.masks import MaskPyramid
from tests.tiny import EMBED_DIM, TEXT_DIM, tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def test_layers_are_numbered_as_in_released_files(base):
    """Even = self-attention, odd = cross-attention, in the order of unet.attn_processors."""
    adapter = tiny_adapter(base)
    count = len(base.unet.attn_processors)
    assert sorted(map(int, adapter.subject)) == list(range(0, count, 2))
    assert sorted(map(int, adapter.context)) == list(range(1, count, 2))
    assert all(attention_layers(base.unet)[int(i)].is_cross_attention for i in adapter.context)


def test_image_projection_against_a_plain_formula(base):
    adapter, embeds = tiny_adapter(base), torch.randn(3, EMBED_DIM)
    tokens = embeds @ adapter.image_proj.proj.weight.T + adapter.image_proj.proj.bias
    tokens = tokens.view(3, 4, TEXT_DIM)
    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, unbiased=False, keepdim=True)
    expected = (tokens - mean) / (variance + 1e-5).sqrt() * adapter.image_proj.norm.weight + adapter.image_proj.norm.bias
    torch.testing.assert_close(adapter.image_proj(embeds), expected)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_keys_and_values_of_both_variants(base, variant):
    """paper: K' = W'_k h. released: K' = W'_k (W_k h). V' likewise, and kept as lambda V'. h: the self-attention layer's input at t = 0, caught by a hook."""
    adapter = tiny_adapter(base, variant)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 24, TEXT_DIM)
    inputs, hooks = {}, []
    for i, attn in attention_layers(base.unet).items():
        hooks.append(attn.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0])))
    base.unet(latents, 0, text)
    for hook in hooks:
        hook.remove()
    reference = adapter.reference_features(base.unet, latents, text)
    conditioning = adapter.subject_conditioning(reference, MaskPyramid(torch.ones(1, 1, 8, 8), (8, 8)))
    for i, layer in adapter.subject.items():
        attn, h = attention_layers(base.unet)[int(i)], inputs[int(i)]
        key = layer.to_k.weight @ (attn.to_k.weight if variant == "released" else torch.eye(h.shape[-1]))
        value = layer.to_v.weight @ (attn.to_v.weight if variant == "released" else torch.eye(h.shape[-1]))
        torch.testing.assert_close(conditioning.keys[int(i)][0], h @ key.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(conditioning.keys[int(i)][1], layer.lambda_ * (h @ value.T), atol=1e-5, rtol=1e-4)


def test_both_variants_start_as_the_frozen_layer(base):
    """Before training K' and V' are the frozen layer's own keys and values of the reference, whichever variant."""
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 24, TEXT_DIM)
    made = []
    for variant in ("paper", "released"):
        adapter = MoMAAdapter.for_unet(base.unet, EMBED_DIM, variant=variant).requires_grad_(False)
        for layer in adapter.subject.values():
            layer.lambda_.fill_(1)  # at its first value, 0, nothing of V' is left
        reference = adapter.reference_features(base.unet, latents, text)
        made.append(adapter.subject_conditioning(reference, MaskPyramid(torch.ones(1, 1, 8, 8), (8, 8))).keys)
    for layer in made[0]:
        torch.testing.assert_close(made[0][layer], made[1][layer])


def test_a_mask_that_keeps_nothing_silences_the_subject():
    layer = SubjectAttention(8).requires_grad_(False)
    layer.lambda_.fill_(1)
    features = torch.randn(1, 64, 8)
    nothing, everything = (subject_keys(layer, features, features, MaskPyramid(torch.full((1, 1, 8, 8), value), (8, 8))) for value in (0.0, 1.0))
    assert (nothing[1] == 0).all() and torch.equal(everything[1], features)
    assert nothing[2].isfinite().all(), "the softmax stays finite"


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_reference_pass_is_not_trained_through(variant):
    base = tiny_base()
    adapter = tiny_adapter(base, variant)
    base.unet.requires_grad_(True)
    reference = adapter.reference_features(base.unet, torch.randn(1, 4, 8, 8), torch.randn(1, 24, TEXT_DIM))
    assert reference and not any(tensor.requires_grad for pair in reference.values() for tensor in pair)


def test_the_context_starts_as_the_texts_attention(base):
    """IP-Adapter's recipe: to_k_ip and to_v_ip are copies of the frozen to_k and to_v."""
    adapter = MoMAAdapter.for_unet(base.unet, EMBED_DIM)
    for name, layer in adapter.context.items():
        frozen = attention_layers(base.unet)[int(name)]
        assert torch.equal(layer.to_k_ip.weight, frozen.to_k.weight) and torch.equal(layer.to_v_ip.weight, frozen.to_v.weight)


def test_gradient_checkpointing_gives_the_same_gradients(base):
    """Recomputation runs the processors twice; nothing may be doubled by it."""
    grads = []
    for checkpointing in (False, True):
        adapter = tiny_adapter(tiny_base())
        unet = tiny_base().unet.train()
        unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
        adapter.requires_grad_(True)
        generator = torch.Generator().manual_seed(5)
        latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, TEXT_DIM, generator=generator)
        mask = MaskPyramid((torch.rand(2, 1, 8, 8, generator=generator) > 0.5).float(), (8, 8))
        subject = adapter.subject_conditioning(adapter.reference_features(unet, latents, text), mask, mask)
        context = adapter.context_conditioning(torch.randn(2, EMBED_DIM, generator=generator))
        unet(latents, 500, text, cross_attention_kwargs={"conditioning": Conditioning(subject, context)}).sample.square().sum().backward()
        grads.append({n: p.grad for n, p in adapter.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-4, rtol=1e-4)
