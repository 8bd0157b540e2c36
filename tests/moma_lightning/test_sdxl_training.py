"""Stage 2 on a tiny SDXL, from the folder of its models to pictures of what was trained; and its checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image

from moma_lightning.checkpoints import CheckpointError, load_adapter, save_adapter
from moma_lightning.foundation import load_base
from moma_lightning.modules.stage2 import GridConfig, Stage2, Stage2Config
from moma_lightning.optim import OptimizerConfig
from moma_lightning.pipeline import MoMAPipelineSDXL, load_pipeline
from tests.moma_lightning.test_stage2 import batch, loader, trainer
from tests.tiny import tiny_adapter, tiny_base, tiny_sdxl_base


@pytest.fixture
def build(sdxl_foundation, decoder_folder):
    def make(grid: int = 0, **options) -> Stage2:
        seed_everything(0, verbose=False)
        optimizer = OptimizerConfig(lr=1e-2, lr_multipliers={"lambda_": 10.0})
        return Stage2(sdxl_foundation, Stage2Config(**options), optimizer, decoder_folder, GridConfig(grid, num_inference_steps=2))

    return make


def test_the_folder_is_loaded_as_it_was_saved(sdxl_foundation, tmp_path):
    base, made = load_base(sdxl_foundation), tiny_sdxl_base()
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        loaded, saved = getattr(base, part).state_dict(), getattr(made, part).state_dict()
        assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved), part
        assert not any(p.requires_grad for p in getattr(base, part).parameters())
    assert base.tokenizer_2.pad_token == "!" and base.force_zeros_for_empty_prompt
    index = Path(sdxl_foundation.base) / "model_index.json"
    told = json.loads(index.read_text())
    try:
        index.write_text(json.dumps(told | {"force_zeros_for_empty_prompt": False}))
        assert not load_base(sdxl_foundation).force_zeros_for_empty_prompt
    finally:
        index.write_text(json.dumps(told))


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_trained_adapter_is_all_that_changed_and_draws(build, sdxl_foundation, decoder_folder, tmp_path, variant):
    module = build(grid=1, variant=variant, text_dropout=0.5)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    trainer(tmp_path, 2, limit_val_batches=1).fit(module, loader(0, 1), loader(2))
    assert {n for n, v in module.state_dict().items() if not torch.equal(v, before[n])} == {n for n, _ in module.adapter.named_parameters(prefix="adapter")}
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["step-000002.png"]
    pipe = load_pipeline(sdxl_foundation, str(tmp_path / "adapter"), decoder_folder)
    assert isinstance(pipe, MoMAPipelineSDXL)
    assert all(torch.equal(a, b) for a, b in zip(pipe.adapter.state_dict().values(), module.adapter.state_dict().values(), strict=True))
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:40, 16:40] = 1
    drawn = [pipe("a cat on the beach", Image.new("RGB", (64, 64), "red"), mask, "cat", beta=beta, num_inference_steps=3, output_type="np",
                  generator=torch.Generator().manual_seed(0)).images for beta in (0.0, 1.0)]
    assert np.isfinite(drawn).all() and not np.array_equal(*drawn)


@pytest.mark.parametrize("shape", [(32, 64), (40, 24)])
def test_shapes_other_than_squares_train(build, shape):
    values, _ = (module := build()).sample_losses(batch(0, height=shape[0], width=shape[1], empty=True), drop=True)
    values.mean().backward()
    assert torch.isfinite(values).all() and all(torch.isfinite(p.grad).all() for p in module.adapter.parameters())


def test_several_draws_of_noise_share_their_samples_texts(build):
    """Pooled embeddings and sizes too: losses are those of one draw each."""
    module, one = build(), replace(batch(0), caption=["a cat on a lake", "a cat", "a cat in the snow"])
    latents, noise = torch.linspace(-1, 1, 192).view(3, 4, 4, 4), torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    timesteps, module.latents = torch.tensor([10, 900, 300, 500, 700, 20]), lambda *_: (latents, latents)

    def losses(rows: slice, draws: int) -> torch.Tensor:
        module.random_draws = lambda *_: (noise[rows], timesteps[rows], None)
        return module.sample_losses(one, drop=False, draws=draws)[0]

    apart = torch.stack([losses(slice(draw, None, 2), 1) for draw in (0, 1)], 1).flatten()
    torch.testing.assert_close(losses(slice(None), 2), apart, rtol=1e-4, atol=1e-6)


def test_every_text_encoder_is_a_unit_of_sharding(build):
    module = build()
    units = {id(unit) for unit in module.units()}
    assert {id(module.text_encoder), id(module.text_encoder_2)} <= units
    held = {id(p) for unit in module.units() for p in unit.parameters()}
    assert held >= {id(p) for part in (module.unet, module.vae.encoder, module.text_encoder, module.text_encoder_2) for p in part.parameters()}


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_checkpoints_keep_every_bit(tmp_path, variant):
    base = tiny_sdxl_base()
    adapter = tiny_adapter(base, variant)
    save_adapter(adapter, tmp_path)
    loaded = load_adapter(tmp_path, base.unet)
    assert loaded.variant == variant
    assert all(torch.equal(a, b) for a, b in zip(adapter.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_an_adapter_of_stable_diffusion_is_refused_on_sdxl_and_the_other_way_round(tmp_path):
    sd, sdxl = tiny_base(), tiny_sdxl_base()
    save_adapter(tiny_adapter(sd), tmp_path / "sd")
    save_adapter(tiny_adapter(sdxl), tmp_path / "sdxl")
    with pytest.raises(CheckpointError) as error:
        load_adapter(tmp_path / "sd", sdxl.unet)
    for part in (f"{tmp_path}/sd does not fit", "image_proj.proj.weight: shape [128, 24], expected [112, 24]", "Use the base model that the adapter was"):
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match=r"ip_adapter.1.to_k_ip.weight: shape \[16, 56\], expected \[16, 32\]"):
        load_adapter(tmp_path / "sdxl", sd.unet)
