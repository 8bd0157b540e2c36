"""An SDXL community checkpoint in one file: the original layout, its second text encoder in open_clip's, written here name by name."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from experiments.mini.models import mini_foundation
from moma_lightning.foundation import load_base
from tests.moma_lightning.test_single_file import RESNET, level_names, renamed, same, small_vae, vae_names
from tests.tiny import POOLED_DIM, TEXT_DIM, TEXT_DIM_2, tiny_sdxl_base

OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
EMBEDDINGS = {"text_model.embeddings.token_embedding.weight": "token_embedding.weight", "text_projection.weight": "text_projection",
              "text_model.embeddings.position_embedding.weight": "positional_embedding", "text_model.final_layer_norm.weight": "ln_final.weight",
              "text_model.final_layer_norm.bias": "ln_final.bias"}


def small_unet() -> UNet2DConditionModel:
    """SDXL's topology: three levels, two layers each, the first without attention."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 2), layers_per_block=2,
        attention_head_dim=(2, 4, 8), cross_attention_dim=TEXT_DIM + TEXT_DIM_2, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=POOLED_DIM + 6 * 8,
    )


def unet_names() -> dict[str, str]:
    """diffusers' module -> the original's."""
    names = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    for level in range(3):
        names |= level_names(level)
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{3 * level + 2}.2.conv"
    return names


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries, keys and values lie in one matrix there, and the projection the other way round."""
    out = {theirs: state[ours].T if theirs == "text_projection" else state[ours] for ours, theirs in EMBEDDINGS.items()}
    layer = "text_model.encoder.layers."
    for name, value in state.items():
        if name.startswith(layer) and not any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            number, _, rest = name.removeprefix(layer).partition(".")
            module, _, kind = rest.rpartition(".")
            out[f"transformer.resblocks.{number}.{OPEN_CLIP[module]}.{kind}"] = value
        elif "q_proj" in name:
            number, kind = name.removeprefix(layer).split(".")[0], name.rpartition(".")[2]
            joined = torch.cat([state[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")])
            out[f"transformer.resblocks.{number}.attn.in_proj_{kind}"] = joined
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A diffusers folder, its configs alone, and the same weights as one file."""
    folder, base = tmp_path_factory.mktemp("sdxl"), tiny_sdxl_base()
    torch.manual_seed(0)
    unet, vae = small_unet(), small_vae()
    pipe = StableDiffusionXLPipeline(vae, base.text_encoder, base.text_encoder_2, base.tokenizer, base.tokenizer_2, unet, base.scheduler)
    pipe.save_pretrained(folder / "folder")
    shutil.copytree(folder / "folder", folder / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    state = {f"model.diffusion_model.{n}": v for n, v in renamed(unet.state_dict(), unet_names(), RESNET).items()}
    for name, value in renamed(vae.state_dict(), vae_names(), {"conv_shortcut": "nin_shortcut"}).items():
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if "attn_1" in name and value.ndim == 2 else value
    first = base.text_encoder.state_dict()
    state |= {f"conditioner.embedders.0.transformer.text_model.{n.removeprefix('text_model.')}": v for n, v in first.items()}
    state |= {f"conditioner.embedders.1.model.{n}": v for n, v in open_clip(base.text_encoder_2.state_dict()).items()}
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "community.safetensors")
    return folder


def test_one_file_is_the_folder_it_was_made_of(model):
    one = load_base(mini_foundation(base=str(model / "community.safetensors"), base_config=str(model / "configs")))
    folder = load_base(mini_foundation(base=str(model / "folder")))
    assert all(same(getattr(one, part), getattr(folder, part)) for part in ("unet", "vae", "text_encoder", "text_encoder_2"))
    assert one.tokenizer_2("a cat").input_ids == folder.tokenizer_2("a cat").input_ids and one.force_zeros_for_empty_prompt
    assert not any(p.requires_grad for p in one.text_encoder_2.parameters())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.label_emb.0.2", "conditioner.embedders.1.model.transformer.resblocks.1"])
def test_a_file_that_lacks_weights_is_refused(model, tmp_path, prefix):
    state = {name: value for name, value in load_file(model / "community.safetensors").items() if not name.startswith(prefix)}
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="less.safetensors (lacks|could not be read)"):
        load_base(mini_foundation(base=str(tmp_path / "less.safetensors"), base_config=str(model / "configs")))
