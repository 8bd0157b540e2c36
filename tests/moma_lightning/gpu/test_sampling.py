"""Attention kernels and pictures of a GPU against plain formulas and the CPU's pictures."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image

from datamodules.mini import world
from datamodules.mini.render import render
from experiments.benchmarks.guided_step import SIZES, Setting
from experiments.mini.models import MINI, mini_foundation
from moma_lightning.models import kernels
from moma_lightning.models.attention import (
    Conditioning,
    ContextConditioning,
    MoMAAttnProcessor,
    Recorder,
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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("heads, positions", [(8, 4096), (8, 64), (5, 1024), (20, 256)])
def test_layers_by_kernel(dtype, tolerance, heads, positions):
    """Self- and cross-attention as sampling has them, in 16 bits by the kernels and in float32 without; SD 1.5's and SDXL's numbers of heads."""
    torch.manual_seed(0)
    side, dim = int(positions**0.5), 64 if heads != 8 else 40 if positions == 4096 else 160
    channels, asked = heads * dim, positions // 5
    masks = (torch.rand(4, 1, side, side, device="cuda") * (torch.rand(4, 1, side, side, device="cuda") < 0.4)).unbind()
    x, text, image = (torch.randn(2, n, c, device="cuda") for n, c in ((positions, channels), (77, 768), (4, channels)))
    weight = torch.rand(1, asked, device="cuda") + 0.1
    keys = SubjectKeys(*torch.randn(2, 1, asked, channels, device="cuda"), log_bias(weight)[0])
    labels = torch.zeros(1, 77, device="cuda")
    labels[:, 3:5] = 1
    layers = [Attention(channels, cross, heads=heads, dim_head=dim, processor=MoMAAttnProcessor(i)).cuda() for i, cross in enumerate((None, 768))]

    @torch.no_grad()
    def computed(dtype):
        generated = MaskPyramid(torch.stack(masks[:2]), (side, side))
        recorder = Recorder(label_tokens=labels)
        given = Conditioning(SubjectConditioning({0: keys}, generated, 0.9), ContextConditioning({1: (image, image)}, 0.7, generated), recorder)
        outputs = [layer.to(dtype)(x.to(dtype), other, conditioning=given) for layer, other in zip(layers, (None, text.to(dtype)), strict=True)]
        label_map = recorder.label_maps[1]
        return [*outputs, label_map.mean(1) if label_map.dim() == 3 else label_map]

    expected = computed(torch.float32)
    for result, plain_result in zip(computed(dtype), expected, strict=True):
        assert (result.float() - plain_result).norm() <= tolerance * plain_result.norm()


def test_a_step_does_not_wait_for_the_gpu(monkeypatch):
    """And it is the kernels that computed it."""
    setting, launched = Setting(SIZES[0].build(torch.device("cuda")), 8, 0.25, torch.device("cuda")), []
    for name in ("cross_attention", "add_subject_attention_"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, function=function: launched.append(name) or function(*args))
    setting.moma()
    assert launched == ["add_subject_attention_", "cross_attention"] * 7
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        setting.moma()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def mini_pipeline(device: str, dtype: str) -> MoMAPipeline:
    return load_pipeline(mini_foundation(), f"{MINI}/moma/adapter", f"{MINI}/moma/image_feature_decoder", dtype).to(device)


def drawn_with(pipe: MoMAPipeline):
    """Pictures and masks of one held-out subject."""
    picture = world.sample_picture(np.random.default_rng(0), world.identity("heldout", 3, "cat"))
    image = Image.fromarray(render([picture])[0][0])
    latents = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat on the beach", "a cat in the snow", "a cat in the jungle", "a cat in the city at night"]
    begun = latents.to(pipe.device, pipe.unet.dtype)  # seeds do not draw the same noise in every type with every version of PyTorch
    output = pipe(prompts, image, None, "cat", guidance_scale=3.0, num_inference_steps=12, latents=begun, output_type="np", return_masks=True)
    return torch.from_numpy(output.images), output.masks.float().cpu()


def compiled_draws_the_same() -> None:
    pipe = mini_pipeline("cuda", "bfloat16")
    here, masks = drawn_with(pipe)
    pipe.unet.compile(mode="reduce-overhead")
    for _ in range(2):
        there, its = drawn_with(pipe)
        assert (here - there).abs().mean() < 0.01 and (masks - its).abs().mean() < 0.01, ((here - there).abs().mean(), (masks - its).abs().mean())


@pytest.mark.timeout(400)
def test_a_compiled_unet_draws_nearly_the_same():
    """In a process of its own: the type checks of these tests cannot be compiled."""
    code = f"from {__name__} import compiled_draws_the_same\ncompiled_draws_the_same()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=350)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def drawn():
    """The shipped mini MoMA's pictures and masks of one held-out subject, by device and type."""
    def draw(device: str, dtype: str = "float32"):
        return drawn_with(mini_pipeline(device, dtype))

    return draw


def test_a_gpu_draws_the_cpus_pictures(drawn):
    (here, masks), (there, its) = drawn("cpu"), drawn("cuda")
    assert (here - there).abs().mean() < 1e-3 and (masks - its).abs().mean() < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_draw_nearly_the_same(drawn, dtype):
    (here, masks), (there, its) = drawn("cuda"), drawn("cuda", dtype)
    assert torch.isfinite(there).all() and (here - there).abs().mean() < 0.01 and (masks - its).abs().mean() < 0.01
