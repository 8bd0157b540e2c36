"""A community checkpoint in one file: Stable Diffusion's original layout, written here name by name from a small model."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from experiments.mini.models import mini_foundation
from moma_lightning.fetch import fetch_model
from moma_lightning.foundation import FoundationConfig, load_base
from tests.fake_hub import fake_hub
from tests.tiny import TEXT_DIM, tiny_base

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection"}
#: SD 1.5's topology (four levels, two layers each, none of attention at the last) at 32 to 64 channels.
LEVELS = (32, 32, 64, 64)


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=8, block_out_channels=LEVELS, layers_per_block=2, cross_attention_dim=TEXT_DIM, attention_head_dim=4)


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 8, 8),
                         layers_per_block=2, latent_channels=4, norm_num_groups=4, sample_size=64)


def level_names(level: int) -> dict[str, str]:
    """A level's layers: diffusers' module -> the original's; its upsampler's place depends on the attention before it."""
    names = {f"down_blocks.{level}.downsamplers.0.conv": f"input_blocks.{3 + 3 * level}.0.op"}
    for layer in range(3):
        for side, first, count in (("down", "input_blocks", 2), ("up", "output_blocks", 3)):
            block = f"{first}.{3 * level + layer + (side == 'down')}"
            parts = {f"{side}_blocks.{level}.resnets.{layer}": f"{block}.0", f"{side}_blocks.{level}.attentions.{layer}": f"{block}.1"}
            names |= parts if layer < count else {}
    return names


def unet_names() -> dict[str, str]:
    """diffusers' module -> the original's."""
    names = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}
    for level in range(4):
        names |= level_names(level)
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.conv"
    return names


def vae_names() -> dict[str, str]:
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_norm_out": f"{side}.norm_out", f"{side}.conv_out": f"{side}.conv_out"}
        names |= {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in range(2)}
        attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        names |= {f"{side}.mid_block.attentions.0.{a}": f"{side}.mid.attn_1.{b}" for a, b in attention.items()}
    for level in range(4):
        names |= {f"encoder.down_blocks.{level}.resnets.{i}": f"encoder.down.{level}.block.{i}" for i in range(2)}
        names |= {f"decoder.up_blocks.{level}.resnets.{i}": f"decoder.up.{3 - level}.block.{i}" for i in range(3)}
        names[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        names[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{3 - level}.upsample.conv"
    return names


def renamed(state: dict, names: dict[str, str], inner: dict[str, str]) -> dict:
    out = {}
    for name, value in state.items():
        module = max((m for m in names if name.startswith(m + ".")), key=len)
        rest = name.removeprefix(module + ".")
        part = next((p for p in inner if rest.startswith(p + ".")), None)
        out[f"{names[module]}.{rest if part is None or '.resnets.' not in name else inner[part] + rest[len(part):]}"] = value
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A diffusers folder, and the same weights as one fp16 file."""
    folder = tmp_path_factory.mktemp("sd")
    base = tiny_base()
    torch.manual_seed(0)
    unet, vae = small_unet(), small_vae()
    pipe = StableDiffusionPipeline(vae, base.text_encoder, base.tokenizer, unet, base.scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder / "folder")
    state = {f"model.diffusion_model.{n}": v for n, v in renamed(unet.state_dict(), unet_names(), RESNET).items()}
    original_vae = renamed(vae.state_dict(), vae_names(), {"conv_shortcut": "nin_shortcut"})
    for name, value in original_vae.items():
        is_projection = "attn_1" in name and value.ndim == 2
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if is_projection else value
    state |= {f"cond_stage_model.transformer.text_model.{n.removeprefix('text_model.')}": v for n, v in base.text_encoder.state_dict().items()}
    state["alphas_cumprod"] = torch.zeros(1000)
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "community.safetensors")
    return folder


@pytest.fixture
def configs(model, tmp_path):
    """The folder without any weights: configs and tokenizer."""
    for path in (model / "folder").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            target = tmp_path / "configs" / path.relative_to(model / "folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "configs"


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def config(model, configs):
    return mini_foundation(base=str(model / "community.safetensors"), base_config=str(configs))


def test_one_file_is_the_folder_it_was_made_of(model, config):
    one, folder = load_base(config), load_base(mini_foundation(base=str(model / "folder")))
    assert same(one.unet, folder.unet) and same(one.vae, folder.vae) and same(one.text_encoder, folder.text_encoder)
    assert one.tokenizer("a cat").input_ids == folder.tokenizer("a cat").input_ids
    assert one.scheduler.config.prediction_type == "epsilon" and not one.scheduler.config.clip_sample
    assert not any(p.requires_grad for p in one.unet.parameters())


def test_file_and_configs_may_come_from_the_hub(model, configs, tmp_path):
    with fake_hub(tmp_path / "cache") as hub:
        hub.repositories["o/community"] = {"v1.safetensors": (model / "community.safetensors").read_bytes()}
        hub.add_folder("o/sd", model / "folder")
        one = load_base(mini_foundation(base="o/community@main/v1.safetensors", base_config="o/sd@main"))
        assert not any(path.endswith(".safetensors") and "o/sd" in path for _, path in hub.requests), "weights of the config's model were fetched"
    assert same(one.unet, load_base(mini_foundation(base=str(model / "folder"))).unet)


def test_configs_that_were_fetched_are_enough_offline(model, tmp_path, monkeypatch):
    with fake_hub(tmp_path / "cache") as hub:
        hub.add_folder("o/sd", model / "folder")
        hub.repositories["o/sd"]["safety_checker/config.json"] = b"{}"
        fetch_model("o/sd@main")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        one = load_base(mini_foundation(base=str(model / "community.safetensors"), base_config="o/sd@main"))
    assert same(one.unet, load_base(mini_foundation(base=str(model / "folder"))).unet)


def test_a_file_without_configs_says_what_is_missing(config):
    with pytest.raises(ValueError, match="set foundation.base_config to a diffusers folder"):
        load_base(replace(config, base_config=None))


def without(config, tmp_path, prefix: str) -> FoundationConfig:
    state = {name: value for name, value in load_file(config.base).items() if not name.startswith(prefix)}
    save_file(state, tmp_path / "less.safetensors")
    return replace(config, base=str(tmp_path / "less.safetensors"))


def test_a_file_without_a_vae_takes_the_foundations(model, config, tmp_path):
    less = without(config, tmp_path, "first_stage_model.")
    with pytest.raises(ValueError, match="less.safetensors could not be read .*AutoencoderKL.*needs foundation.vae"):
        load_base(less)
    assert same(load_base(replace(less, vae=str(model / "folder/vae"))).vae, load_base(config).vae)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.output_blocks.3.0.emb_layers", "cond_stage_model.transformer.text_model.encoder.layers.1"])
def test_a_file_that_lacks_weights_is_refused(config, tmp_path, prefix):
    with pytest.raises(ValueError, match="less.safetensors (lacks|could not be read)"):
        load_base(without(config, tmp_path, prefix))


def test_a_file_of_another_architecture_is_refused(config, configs):
    unet = json.loads((configs / "unet/config.json").read_text())
    (configs / "unet/config.json").write_text(json.dumps(unet | {"block_out_channels": [32, 32, 32, 64]}))
    with pytest.raises(ValueError, match="community.safetensors could not be read as a Stable Diffusion checkpoint"):
        load_base(config)
