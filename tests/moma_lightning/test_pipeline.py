import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from transformers import DynamicCache

from experiments.mini.models import MINI
from moma_lightning.batch import TripletBatch
from moma_lightning.modules.grid import GridConfig, redrawn
from moma_lightning.pipeline import MoMAPipeline
from moma_lightning.segmentation import SamMasker
from tests.tiny import EMBED_DIM, tiny_adapter, tiny_base

PROMPTS = ["a cat on the beach", "a cat in the snow"]


def picture(width=64, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def square_mask(width=64, height=64):
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    return mask


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def run(pipe, prompt=PROMPTS, **options):
    count = len(prompt) * options.get("num_images_per_prompt", 1)
    settings = dict(guidance_scale=3.0, num_inference_steps=3, generator=generators(count), output_type="np",
                    image_embeds=torch.full((1, EMBED_DIM), 0.5))
    return pipe(prompt, **(settings | options))


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def stock_pictures(base):
    """What diffusers' own pipeline draws with its own attention processors on the same weights."""
    other = tiny_base()
    other.unet.set_attn_processor(AttnProcessor2_0())
    stock = StableDiffusionPipeline(other.vae, other.text_encoder, other.tokenizer, other.unet, other.scheduler, None, None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock(PROMPTS, guidance_scale=3.0, num_inference_steps=3, generator=generators(2), output_type="np").images


def test_defaults_are_the_papers_first_row_and_the_released_codes_numbers():
    expected = {"beta": 1.0, "mask_strength": 1.0, "context_scale": 1.0, "guidance_scale": 7.5, "num_inference_steps": 50, "mask_threshold": 0.2,
                "guide_subject": False, "mask_layers": None}
    parameters = inspect.signature(MoMAPipeline.__call__).parameters
    assert {name: parameters[name].default for name in expected} == expected


def test_without_a_picture_it_is_stable_diffusion_bit_for_bit(base, stock_pictures):
    assert np.array_equal(run(MoMAPipeline.from_base(base), image_embeds=None).images, stock_pictures)


def test_lambda_zero_and_context_off_is_stable_diffusion_bit_for_bit(base, stock_pictures, monkeypatch):
    """To rounding where the label's map is read off the text's matrix."""
    pipe, given = MoMAPipeline.from_base(base, tiny_adapter(base, lambda_=0.0)), dict(image=picture(), mask=square_mask(), label="cat", context_scale=0.0)
    np.testing.assert_allclose(run(pipe, **given).images, stock_pictures, atol=1e-5)
    monkeypatch.setenv("MOMA_KERNELS", "0")
    assert np.array_equal(run(pipe, **given).images, stock_pictures)


@pytest.mark.parametrize("given", [{}, {"image": picture(), "mask": square_mask(), "label": "cat"}])
def test_a_texts_keys_are_made_once_for_all_steps(base, given):
    called, layers = [], {name: module for name, module in base.unet.named_modules() if name.endswith("attn2.to_k")}
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.append(name)) for name, layer in layers.items()]
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    if given:
        given = {"image": pipe.prepare_subject(*given.values(), 64 * 64)}  # whose reference pass reads a text of its own
        called.clear()
    run(pipe, **given)
    for hook in hooks:
        hook.remove()
    assert sorted(called) == sorted(layers)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_beta_and_context_each_change_the_picture(base, stock_pictures, variant, monkeypatch):
    monkeypatch.setenv("MOMA_KERNELS", "0")
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base, variant))
    subject = dict(image=picture(), mask=square_mask(), label="cat")
    drawn = [run(pipe, **subject, beta=beta, context_scale=scale).images for beta, scale in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 1))]
    assert np.array_equal(drawn[0], stock_pictures)
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert all(np.isfinite(d).all() for d in drawn)


def test_mask_strength_changes_the_picture_and_masks_are_returned(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    outputs = [run(pipe, image=picture(), mask=square_mask(), label="cat", mask_strength=s, return_masks=True) for s in (1.0, 0.5, 0.0)]
    assert not np.array_equal(outputs[0].images, outputs[1].images) and not np.array_equal(outputs[1].images, outputs[2].images)
    assert outputs[0].masks.shape == (3, 2, 1, 8, 8)
    assert outputs[0].masks.amin() == 0 and outputs[0].masks.amax() == 1


def test_a_higher_threshold_takes_the_weaker_part_of_m_gen_away(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    low, high = (run(pipe, image=picture(), mask=square_mask(), label="cat", mask_threshold=t, return_masks=True).masks[0] for t in (0.2, 0.6))
    torch.testing.assert_close(high, low * (low > 0.6))
    assert not torch.equal(low, high)


def test_mask_layers_choose_the_maps(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    subject = dict(image=picture(), mask=square_mask(), label="cat", return_masks=True)
    cross = sorted(int(i) for i in pipe.adapter.context)
    every, named, one = (run(pipe, **subject, mask_layers=layers) for layers in (None, cross, cross[:1]))
    torch.testing.assert_close(every.masks, named.masks)
    assert not torch.allclose(every.masks, one.masks, atol=1e-2)
    with pytest.raises(ValueError, match=r"mask_layers \[2\] are no cross-attention layers: choose among \[1, 3"):
        run(pipe, **subject, mask_layers=[1, 2])


def test_a_guided_subject_is_extrapolated_like_the_text(base):
    """With guidance g, noise = u + g (c - u): u without the subject attention, c with it."""
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base, "paper"))
    subject = dict(image=picture(), mask=square_mask(), label="cat", prompt=PROMPTS[:1], num_inference_steps=1, context_scale=0.0, output_type="latent")
    draw = lambda **options: run(pipe, **{**subject, "generator": generators(1), **options}).images  # noqa: E731
    with_subject, without = draw(guidance_scale=1.0), draw(guidance_scale=1.0, beta=0.0)
    both, one = draw(guidance_scale=3.0), draw(guidance_scale=3.0, guide_subject=True)
    text = draw(guidance_scale=3.0, beta=0.0)
    # One DDIM step is affine in the noise, so the pictures obey the formula too: 3 (c - c0) on top of the text-only picture.
    torch.testing.assert_close(one - text, 3 * (with_subject - without), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(both, one, atol=1e-3)


def test_each_prompt_may_have_a_beta_of_its_own(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    subject = dict(image=picture(), mask=square_mask(), label="cat", num_images_per_prompt=2)
    mixed, none, full = (run(pipe, **subject, beta=beta).images for beta in ([0.0, 1.0], 0, 1))
    np.testing.assert_allclose(mixed, np.concatenate([none[:2], full[2:]]), atol=2e-5)


def test_batched_prompts_equal_single_prompts(base):
    """K' and V' are shared by a call's prompts: what one prompt gets must not depend on the others."""
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    subject = dict(image=picture(), mask=square_mask(), label="cat")
    together = run(pipe, **subject).images
    alone = [run(pipe, prompt=[p], generator=[torch.Generator().manual_seed(i)], **subject).images[0] for i, p in enumerate(PROMPTS)]
    np.testing.assert_allclose(together, np.stack(alone), atol=2e-5)


def test_non_square_pictures_and_references(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    output = run(pipe, image=picture(96, 48), mask=square_mask(96, 48), label="cat", height=48, width=96, return_masks=True)
    assert output.images.shape == (2, 48, 96, 3) and output.masks.shape[-2:] == (6, 12)
    assert np.isfinite(output.images).all()


def test_each_picture_has_its_prompts_context_at_the_scale_given_and_the_unconditional_half_none(base, monkeypatch):
    pipe, embeds, given = MoMAPipeline.from_base(base, tiny_adapter(base)), torch.randn(2, EMBED_DIM), []
    made = pipe.adapter.context_conditioning
    monkeypatch.setattr(pipe.adapter, "context_conditioning", lambda *inputs: given.extend(inputs) or made(*inputs))
    run(pipe, image_embeds=embeds, num_images_per_prompt=2, context_scale=0.3)
    torch.testing.assert_close(given[0], torch.cat([torch.zeros(4, EMBED_DIM), embeds[[0, 0, 1, 1]]]))
    assert given[1] == 0.3


def test_pictures_per_prompt_are_prompt_major(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    subject = dict(image=picture(), mask=square_mask(), label="cat")
    output = run(pipe, **subject, num_images_per_prompt=2)
    repeated = run(pipe, prompt=[PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], **subject)
    assert np.array_equal(output.images, repeated.images)


def test_without_a_decoder_clip_of_the_whole_reference_is_the_context(base):
    def clip(pixels):
        return pixels.mean((1, 2, 3))[:, None].expand(-1, EMBED_DIM)

    subject = dict(image=picture(), mask=square_mask(), label="cat")
    pixels = torch.from_numpy(np.asarray(picture(), np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    given = run(pipe, **subject, image_embeds=clip(pixels)).images
    pipe.clip = clip
    assert np.array_equal(run(pipe, **subject, image_embeds=None).images, given)


class FakeDecoder:
    """Stands for the image-feature decoder and writes down what it is asked."""

    def __init__(self):
        self.pictures, self.asked = [], []

    def read_picture(self, white):
        self.pictures.append(white)
        return DynamicCache()

    def predict(self, picture, label, prompts):
        self.asked.append((label, prompts))
        return torch.stack([torch.full((EMBED_DIM,), float(len(prompt))) for prompt in prompts])


def test_a_prepared_subject_serves_many_calls_with_the_same_pictures(base, monkeypatch):
    """Mask, autoencoder, reference pass and the MLLM's reading of the picture are done once; a prompt under two seeds is read once."""
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    pipe.decoder = FakeDecoder()
    at_once = run(pipe, [*PROMPTS, PROMPTS[0]], image=picture(), mask=square_mask(), label="cat", image_embeds=None).images
    assert pipe.decoder.asked == [("cat", PROMPTS)]
    subject = pipe.prepare_subject(picture(), square_mask(), "cat", 64 * 64)
    monkeypatch.setattr(pipe, "prepare_subject", lambda *_: pytest.fail("prepared again"))
    first, second = (run(pipe, [prompt], image=subject, generator=[torch.Generator().manual_seed(i)], image_embeds=None).images[0]
                     for i, prompt in enumerate(PROMPTS))
    np.testing.assert_allclose(np.stack([first, second]), at_once[:2], atol=2e-5)
    assert len(pipe.decoder.pictures) == 2


def test_the_mllm_is_asked_for_its_own_prompt_and_sees_the_whole_subject(base):
    """The decoder is given the whole picture, which it puts on a white square, and the label's map is read off the UNet's prompt."""
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    pipe.decoder = FakeDecoder()
    subject = dict(image=picture(96, 48), mask=torch.ones(1, 48, 96), label="cat", image_embeds=None)
    run(pipe, ["photo of a cat. it swims", "photo of a cat. it flies"], **subject, mllm_prompt=["it swims", "it flies"])
    ((white,), asked) = pipe.decoder.pictures, pipe.decoder.asked
    assert asked == [("cat", ["it swims", "it flies"])]
    assert white.shape == (1, 3, 48, 96) and (white < 1).any(1).all()
    with pytest.raises(ValueError, match="2 prompts and 1 mllm_prompts"):
        run(pipe, **subject, mllm_prompt="it swims")


def test_a_negative_prompt_is_stable_diffusions(base):
    other = tiny_base()
    other.unet.set_attn_processor(AttnProcessor2_0())
    stock = StableDiffusionPipeline(other.vae, other.text_encoder, other.tokenizer, other.unet, other.scheduler, None, None, requires_safety_checker=False)
    options = dict(guidance_scale=3.0, num_inference_steps=3, output_type="np")
    pipe = MoMAPipeline.from_base(base)
    expected = stock(PROMPTS, negative_prompt=["a dog"] * 2, generator=generators(2), **options).images
    assert np.array_equal(run(pipe, image_embeds=None, negative_prompt="a dog").images, expected)
    expected = stock(PROMPTS, negative_prompt=["a dog", "snow"], generator=generators(2), **options).images
    assert np.array_equal(run(pipe, image_embeds=None, negative_prompt=["a dog", "snow"]).images, expected)
    with pytest.raises(ValueError, match="2 prompts and 1 negative prompts"):
        run(pipe, image_embeds=None, negative_prompt=["a dog"])


@pytest.mark.parametrize("given", [{"mask": square_mask()}, {"mask": None}])
def test_weights_of_16_bits_draw_what_those_of_32_do(given):
    """SAM, which stays in float32, and embeddings of float32 among them. The two differ by rounding; the noise is given."""
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    masker, shown = SamMasker.from_pretrained(f"{MINI}/sam"), Image.new("RGB", (64, 64), "white")
    shown.paste("red", (20, 20, 44, 44))
    drawn = {}
    for dtype in (torch.float32, torch.bfloat16):
        own = tiny_base()
        pipe = MoMAPipeline.from_base(own, tiny_adapter(own, lambda_=0.5), masker=masker).to("cpu", dtype)
        assert next(pipe.masker.parameters()).dtype == torch.float32 and pipe.unet.dtype == dtype
        drawn[dtype] = run(pipe, image=shown, label="cat", latents=latents.to(dtype), **given).images
    assert np.abs(drawn[torch.bfloat16] - drawn[torch.float32]).mean() < 0.02


def compiled_draws_the_same() -> None:
    """In a graph for the first step, which knows no M_gen yet, and one for the others; reference passes and validation's pictures need none."""
    base, pixels = tiny_base(), torch.zeros(1, 3, 64, 64)
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))

    def drawn() -> np.ndarray:
        return run(pipe, image=picture(), mask=square_mask(), label="cat").images

    plain = drawn()
    pipe.unet.compile(backend="eager", fullgraph=True)
    np.testing.assert_allclose(drawn(), plain, atol=1e-5)
    batch = TripletBatch(pixels, square_mask()[None], PROMPTS[:1], ["cat"], ["0"])
    assert len(redrawn(pipe, batch, pixels, torch.zeros(1, EMBED_DIM), 1.0, GridConfig(1, 1))) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_compiled_unet_draws_the_same():
    """In a process of its own: the type checks of the tests' import hook cannot be traced. There too the plain UNet is to pick queries out."""
    few = "from moma_lightning.models import attention\nattention.FEW_QUERIES = 0"
    code = f"from {__name__} import compiled_draws_the_same\n{few}\ncompiled_draws_the_same()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
