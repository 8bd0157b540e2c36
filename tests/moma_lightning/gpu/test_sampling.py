"""Attention kernels and pictures of a GPU against plain formulas and the CPU's pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.mini import world
from datamodules.mini.render import render
from moma_lightning.foundation import MINI, FoundationConfig
from moma_lightning.models.attention import (
    SubjectConditioning,
    SubjectKeys,
    add_subject_attention,
    label_key_value,
    label_map,
    split_heads,
)
from moma_lightning.models.masks import MaskPyramid, log_bias
from moma_lightning.pipeline import MoMAPipeline, load_pipeline

HEADS, POSITIONS, CHANNELS, SIDE = 8, 4096, 320, 64


def plain(query, key, value, bias):
    """softmax(Q K^T / sqrt(d) + bias) V in float64, a head at a time."""
    query, key, value = (split_heads(x.double(), HEADS) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias.double()
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kept", [0.0, 0.013, 0.25, 1.0])
def test_subject_attention_at_stable_diffusions_size(dtype, tolerance, kept):
    """Any number of kept keys and queries, multiples of 8 or not, of two subjects; soft masks. In the relative norm of the difference."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, POSITIONS, CHANNELS, device="cuda", dtype=dtype) for _ in range(3))
    weight = torch.rand(2, POSITIONS, device="cuda") * (torch.rand(2, POSITIONS, device="cuda") < kept)
    m_gen = torch.rand(2, 1, SIDE, SIDE, device="cuda") * (torch.rand(2, 1, SIDE, SIDE, device="cuda") < kept)
    index = (weight > 0).byte().argsort(dim=1, descending=True, stable=True)[:, : max(1, int((weight > 0).sum(1).max()))]
    bias, alive = log_bias(weight.gather(1, index))
    kept_key, kept_value = (x.gather(1, index[..., None].expand(-1, -1, CHANNELS)) for x in (key, value))
    keys = SubjectKeys(kept_key, 0.7 * alive * kept_value, bias)
    conditioning = SubjectConditioning({0: keys}, MaskPyramid(m_gen, (SIDE, SIDE)), 0.9)
    with torch.no_grad():
        result = add_subject_attention(torch.zeros_like(query), conditioning, query, *keys.split(HEADS, dtype))
    whole_bias, alive = log_bias(weight)
    expected = 0.7 * 0.9 * alive.double() * m_gen.flatten(1)[..., None].double() * plain(query, key, value, whole_bias)
    assert result.dtype == dtype and bool(expected.any()) == (kept > 0)
    assert (result.double() - expected).norm() <= tolerance * expected.norm()


def test_the_labels_map():
    torch.manual_seed(0)
    query, key = torch.randn(2, POSITIONS, CHANNELS, device="cuda"), torch.randn(2, 77, CHANNELS, device="cuda")
    tokens = torch.zeros(1, 77, device="cuda")
    tokens[:, 3:5] = 1
    found = label_map(split_heads(query, HEADS), *label_key_value(split_heads(key, HEADS), tokens))
    scores = split_heads(query[1:].double(), HEADS) @ split_heads(key[1:].double(), HEADS).transpose(-1, -2) / (CHANNELS // HEADS) ** 0.5
    torch.testing.assert_close(found.double(), scores.softmax(-1)[..., 3:5].sum(-1).mean(1), atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def drawn():
    """The shipped mini MoMA's pictures and masks of one held-out subject, by device and type."""
    picture = world.sample_picture(np.random.default_rng(0), world.identity("heldout", 3, "cat"))
    image = Image.fromarray(render([picture])[0][0])
    latents = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(device: str, dtype: str = "float32"):
        pipe: MoMAPipeline = load_pipeline(FoundationConfig(), f"{MINI}/moma/adapter", f"{MINI}/moma/image_feature_decoder", dtype).to(device)
        prompts = ["a cat on the beach", "a cat in the snow", "a cat in the jungle", "a cat in the city at night"]
        begun = latents.to(device, getattr(torch, dtype))  # seeds do not draw the same noise in every type with every version of PyTorch
        output = pipe(prompts, image, None, "cat", guidance_scale=3.0, num_inference_steps=12, latents=begun, output_type="np", return_masks=True)
        return torch.from_numpy(output.images), output.masks.float().cpu()

    return draw


def test_a_gpu_draws_the_cpus_pictures(drawn):
    (here, masks), (there, its) = drawn("cpu"), drawn("cuda")
    assert (here - there).abs().mean() < 1e-3 and (masks - its).abs().mean() < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_draw_nearly_the_same(drawn, dtype):
    (here, masks), (there, its) = drawn("cuda"), drawn("cuda", dtype)
    assert torch.isfinite(there).all() and (here - there).abs().mean() < 0.01 and (masks - its).abs().mean() < 0.01
