"""A LoRA in the place of the base: the model it was made for, with each of its updates added to the layer that it names."""


from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from evaluation.methods import Models
from experiments.mini.models import mini_foundation
from moma_lightning.foundation import FoundationConfig, load_base, vae_name
from tests.tiny import tiny_base, tiny_sdxl_base

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
WORDS = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj"]
RANK = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tiny_base()
    path = tmp_path_factory.mktemp("base")
    pipe = StableDiffusionPipeline(base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def base_of(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(updates: dict[str, torch.Tensor], name: str = "lora.safetensors") -> FoundationConfig:
        save_file(updates, tmp_path / name)
        return mini_foundation(base=str(tmp_path / name), base_config=str(folder))
    return make


def low_rank(weight: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random down and up of a layer's shape."""
    rng = torch.Generator().manual_seed(seed)
    out, inner = weight.shape[:2]
    return torch.randn(RANK, inner, *weight.shape[2:], generator=rng) * 0.1, torch.randn(out, RANK, *[1] * (weight.ndim - 2), generator=rng) * 0.1


def added(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """W + scale B A, of a convolution over its kernel's every place."""
    return weight + scale * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(weight.shape)


def assert_only(changed: dict[str, torch.Tensor], made: torch.nn.Module, plain: torch.nn.Module) -> None:
    own, other = made.state_dict(), plain.state_dict()
    assert own.keys() == other.keys()
    for name in own:
        torch.testing.assert_close(own[name], changed.get(name, other[name]), atol=1e-6, rtol=1e-6)
        assert (name in changed) == (not torch.equal(own[name], other[name])), name


def test_updates_under_diffusers_names_are_added(folder, base_of):
    plain = load_base(mini_foundation(base=str(folder)))
    updates, changed = {}, {}
    for seed, layer in enumerate((QUERY, CONV)):
        weight = plain.unet.get_submodule(layer).weight
        down, up = low_rank(weight, seed)
        updates |= named(layer, down, up)
        changed[f"{layer}.weight"] = added(weight, down, up)
    config = base_of(updates)
    made = load_base(config)
    assert_only(changed, made.unet, plain.unet)
    assert_only({}, made.text_encoder, plain.text_encoder)
    assert not any(parameter.requires_grad for parameter in made.unet.parameters())
    assert vae_name(config) == f"{folder}/vae"


def test_updates_under_kohyas_names_are_added_at_their_scale(folder, base_of):
    plain = load_base(mini_foundation(base=str(folder)))
    updates, unet, text = {}, {}, {}
    layers = [("unet", QUERY, plain.unet, unet), *(("te_text_model", layer, plain.text_encoder, text) for layer in WORDS)]
    for seed, (short, layer, part, changed) in enumerate(layers):
        weight = part.get_submodule(layer).weight
        down, up = low_rank(weight, seed)
        name = f"lora_{short}_{layer.replace('.', '_')}"
        updates |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
        changed[f"{layer}.weight"] = added(weight, down, up, 1 / RANK)
    made = load_base(base_of(updates))
    assert_only(unet, made.unet, plain.unet)
    assert_only(text, made.text_encoder, plain.text_encoder)


def test_sdxls_second_text_encoder_takes_its_updates(base_of, tmp_path):
    base = tiny_sdxl_base()
    pipe = StableDiffusionXLPipeline(base.vae, base.text_encoder, base.text_encoder_2, base.tokenizer, base.tokenizer_2, base.unet, base.scheduler,
                                     add_watermarker=False)
    pipe.save_pretrained(tmp_path / "sdxl")
    plain = load_base(mini_foundation(base=str(tmp_path / "sdxl")))
    (layer, weight), (name, other) = next((n, m.weight) for n, m in plain.unet.named_modules() if n.endswith("attn1.to_q")), words_of(plain.text_encoder_2)
    unet, text = low_rank(weight, 0), low_rank(other, 1)
    updates = named(layer, *unet) | {key.replace("unet.", "text_encoder_2."): value for key, value in named(name, *text).items()}
    made = load_base(replace(base_of(updates), base_config=str(tmp_path / "sdxl")))
    assert_only({f"{layer}.weight": added(weight, *unet)}, made.unet, plain.unet)
    assert_only({f"{name}.weight": added(other, *text)}, made.text_encoder_2, plain.text_encoder_2)
    assert_only({}, made.text_encoder, plain.text_encoder)


def words_of(encoder: torch.nn.Module) -> tuple[str, torch.Tensor]:
    """A layer of a text encoder whose name every version of transformers ends alike."""
    return next((name, module.weight) for name, module in encoder.named_modules() if name.endswith("layers.0.self_attn.q_proj"))


def test_a_lora_of_another_model_is_refused(folder, base_of):
    weight = load_base(mini_foundation(base=str(folder))).unet.get_submodule(QUERY).weight
    good, elsewhere = (named(layer, *low_rank(weight, 0)) for layer in (QUERY, QUERY.replace("down_blocks.0", "down_blocks.7")))
    with pytest.raises(ValueError, match=r"lora\.safetensors holds 2 low-rank updates, of which 1 fit a layer of the model"):
        load_base(base_of(good | elsewhere))
    down, up = low_rank(weight, 0)
    with pytest.raises(ValueError, match=r"lora\.safetensors could not be read as a LoRA of StableDiffusionPipeline: .*size mismatch"):
        load_base(base_of(named(QUERY, down[:, :-1].contiguous(), up)))


def named(layer: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}


def test_an_alpha_in_the_files_header_counts(folder, tmp_path):
    """As diffusers' own training scripts write it."""
    plain, made = (load_base(mini_foundation(base=str(folder))) for _ in range(2))
    made.unet.add_adapter(LoraConfig(r=4, lora_alpha=1, target_modules=[QUERY], init_lora_weights=False))
    layer = made.unet.get_submodule(QUERY)
    down, up = (getattr(layer, name)["default"].weight.detach() for name in ("lora_A", "lora_B"))
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(made.unet), **_collate_lora_metadata({"unet": made.unet}))
    fused = load_base(mini_foundation(base=str(tmp_path / "pytorch_lora_weights.safetensors"), base_config=str(folder)))
    assert_only({f"{QUERY}.weight": added(plain.unet.get_submodule(QUERY).weight, down, up, 1 / 4)}, fused.unet, plain.unet)


def test_older_diffusers_names_are_read(folder, base_of):
    plain = load_base(mini_foundation(base=str(folder)))
    weight = plain.unet.get_submodule(QUERY).weight
    down, up = low_rank(weight, 0)
    name = f"unet.{QUERY.removesuffix('to_q')}processor.to_q_lora"
    made = load_base(base_of({f"{name}.down.weight": down, f"{name}.up.weight": up}))
    assert_only({f"{QUERY}.weight": added(weight, down, up)}, made.unet, plain.unet)


def test_what_cannot_be_added_is_refused(folder, base_of):
    config = base_of(named(QUERY, torch.zeros(2, 8), torch.zeros(8, 2)) | {f"unet.{QUERY}.dora_scale": torch.ones(8)})
    with pytest.raises(ValueError, match=r"lora\.safetensors is a DoRA"):
        load_base(config)
    with pytest.raises(ValueError, match=r"lora\.safetensors is a LoRA: it needs the whole model as a diffusers folder"):
        load_base(replace(config, base_config="community.safetensors"))
    one_file = Models(replace(config, base="community.safetensors"))
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(1)}, "community.safetensors")
    with pytest.raises(ValueError, match=r"lora\.safetensors is a LoRA, and community\.safetensors is one file"):
        one_file.on_base(config.base)
    assert Models(config).on_base(config.base).foundation.base_config == str(folder)


def test_a_file_cut_short_is_named(base_of):
    config = base_of(named(QUERY, torch.zeros(2, 8), torch.zeros(8, 2)))
    with open(config.base, "r+b") as file:
        file.truncate(20)
    with pytest.raises(ValueError, match=r"lora\.safetensors could not be read"):
        load_base(config)
