"""The exported context side in diffusers' own pipeline: `load_ip_adapter` and `ip_adapter_image_embeds`, against ours with beta 0."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from moma_lightning.__main__ import main
from moma_lightning.checkpoints import save_adapter
from moma_lightning.pipeline import MoMAPipeline
from tests.moma_lightning.test_pipeline import generators, picture, square_mask
from tests.tiny import EMBED_DIM, tiny_adapter, tiny_base

SETTINGS = dict(guidance_scale=3.0, num_inference_steps=4, num_images_per_prompt=2, output_type="np")
EMBEDS = torch.randn(1, EMBED_DIM, generator=torch.Generator().manual_seed(5))


def stock_pictures(folder, name: str, scale: float = 1.0) -> np.ndarray:
    base = tiny_base()
    base.unet.set_attn_processor(AttnProcessor2_0())
    pipe = StableDiffusionPipeline(base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    embeds = torch.stack([torch.zeros_like(EMBEDS), EMBEDS])  # unconditional, conditional
    return pipe(["a cat on the beach"], generator=generators(2), ip_adapter_image_embeds=[embeds], **SETTINGS).images


def our_pictures(variant: str, **options) -> np.ndarray:
    base = tiny_base()
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base, variant))
    return pipe(["a cat on the beach"], generator=generators(2), image_embeds=EMBEDS, **SETTINGS, **options).images


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for variant in ("paper", "released"):
        save_adapter(tiny_adapter(tiny_base(), variant), folder / variant)
        for suffix in ("bin", "safetensors"):
            assert main(["convert", "--from", str(folder / variant), "--to", str(folder / f"{variant}.{suffix}")]) == 0
    return folder


@pytest.mark.parametrize("name", ["paper.bin", "paper.safetensors", "released.safetensors", "released/moma.safetensors"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_ours_with_the_context_alone_is_stock_ip_adapter_bit_for_bit(exported, name, scale):
    ours = our_pictures("paper" if name.startswith("paper") else "released", context_scale=scale)
    assert np.array_equal(ours, stock_pictures(exported, name, scale))
    assert not np.array_equal(ours, our_pictures("paper", context_scale=0.3))


@pytest.mark.parametrize("variant, options", [("paper", {}), ("released", {"mask_strength": 0.0})])
def test_so_is_ours_with_a_reference_and_beta_0(exported, variant, options, monkeypatch):
    """The released variant masks the context attention with M_gen; with masking off, as in the paper's variant, nothing is left of the reference.

    To rounding where the label's map and the image tokens are read off the text's matrix.
    """
    subject = dict(image=picture(), mask=square_mask(), label="cat", beta=0.0)
    stock = stock_pictures(exported, f"{variant}.safetensors")
    np.testing.assert_allclose(our_pictures(variant, **subject, **options), stock, atol=1e-5)
    monkeypatch.setenv("MOMA_KERNELS", "0")
    assert np.array_equal(our_pictures(variant, **subject, **options), stock)
    if variant == "released":
        assert not np.array_equal(our_pictures(variant, **subject), stock)
