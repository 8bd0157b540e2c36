"""LoRA on the MLLM's language model in stage 1."""

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file

from moma_lightning.__main__ import main
from moma_lightning.models.blocks import blocks_of
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.models.lora import LoraOptions
from moma_lightning.modules.stage1 import Stage1
from moma_lightning.optim import OptimizerConfig
from moma_lightning.plan.stages import read_experiment
from tests import tiny_mllms
from tests.moma_lightning.test_stage1 import batch, loader

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
EMBED, HIDDEN, MLP, LAYERS, RANK = 12, 24, 32, 2, 4
LORA = LoraOptions(rank=RANK, alpha=8)
INPUTS = ["cat", "mug"], ["a cat on a lake", "a mug"]


def build(foundation, lora: LoraOptions | None = LORA, moved: bool = False, **options) -> ImageFeatureDecoder:
    """`moved`: adapters that change the output, as after training."""
    torch.manual_seed(1)
    decoder = ImageFeatureDecoder.from_foundation(foundation, DecoderConfig(lora=lora, **options), EMBED).eval()
    if moved:
        for name, parameter in decoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return decoder


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_counts_of_trained_parameters(tiny_foundation):
    decoder = build(tiny_foundation)
    trained = {name: p.numel() for name, p in decoder.named_parameters() if p.requires_grad}
    adapters = LAYERS * RANK * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + MLP))
    assert sum(n for name, n in trained.items() if "lora_" in name) == adapters
    connector = sum(p.numel() for p in decoder.mllm.multi_modal_projector.parameters())
    assert sum(trained.values()) == adapters + connector + HIDDEN + (HIDDEN * EMBED * 2 + EMBED * EMBED)
    assert set(decoder.own_parameters()) == set(trained)


@torch.no_grad()
def test_the_adapters_are_alpha_over_rank_b_a(tiny_foundation, pictures):
    decoder, plain = build(tiny_foundation, moved=True), build(tiny_foundation, lora=None)
    output = decoder(pictures, *INPUTS)
    plain.mapping.load_state_dict(decoder.mapping.state_dict())
    plain.token.copy_(decoder.token)
    assert (plain(pictures, *INPUTS) - output).abs().max() > 1e-3
    for name, module in plain.mllm.language_model.named_modules():
        if name.endswith("_proj"):
            adapter = decoder.mllm.language_model.get_submodule(name)
            module.weight.add_(LORA.alpha / LORA.rank * adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight)
    torch.testing.assert_close(output, plain(pictures, *INPUTS), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_new_decoder_says_what_one_without_adapters_says(tiny_foundation, pictures):
    decoder, plain = build(tiny_foundation), build(tiny_foundation, lora=None)
    plain.mapping.load_state_dict(decoder.mapping.state_dict())
    plain.token.copy_(decoder.token)
    torch.testing.assert_close(decoder(pictures, *INPUTS), plain(pictures, *INPUTS), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_saves_the_adapters_alone_and_loads_them(tiny_foundation, pictures, tmp_path):
    decoder = build(tiny_foundation, moved=True)
    decoder.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(decoder.own_parameters()) and any("layers.1.mlp.down_proj.lora_A" in name for name in names)
    assert not any("base_layer" in name or "vision_tower" in name or "embed_tokens" in name for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["decoder"]["lora"] == {"rank": 4, "alpha": 8, "dropout": 0.0, "target": LORA.target}
    assert "LoRA of rank 4" in (tmp_path / "README.md").read_text()
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)
    assert loaded.config == decoder.config
    assert torch.equal(loaded(pictures, *INPUTS), decoder(pictures, *INPUTS))


@torch.no_grad()
def test_a_merged_decoder_is_a_plain_one_with_the_same_outputs(tiny_foundation, pictures, tmp_path):
    decoder = build(tiny_foundation, moved=True)
    before = decoder(pictures, *INPUTS)
    decoder.merge_lora().save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(build(tiny_foundation, lora=None).own_parameters())
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)
    torch.testing.assert_close(loaded(pictures, *INPUTS), before, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no LoRA adapters to merge"):
        loaded.merge_lora()


@torch.no_grad()
def test_a_merged_decoder_keeps_what_was_trained_beside_the_adapters(tiny_foundation, pictures, tmp_path):
    decoder = build(tiny_foundation, moved=True, trainable=["vision_tower", "^mapping", "^token$"])
    for parameter in decoder.vision_parameters().values():
        parameter.mul_(1.2)
    before = decoder(pictures, *INPUTS)
    decoder.merge_lora().save_pretrained(tmp_path)
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)
    torch.testing.assert_close(loaded(pictures, *INPUTS), before, atol=1e-5, rtol=1e-4)
    assert any("vision_tower" in name for name in loaded.own_parameters())


@torch.no_grad()
def test_the_command_merges_a_folder(tiny_foundation, pictures, tmp_path, capsys):
    decoder, yml = build(tiny_foundation, moved=True), tmp_path / "foundation.yaml"
    decoder.save_pretrained(tmp_path / "adapters")
    yml.write_text(yaml.safe_dump(asdict(tiny_foundation)))
    arguments = ["convert", "--from", str(tmp_path / "adapters"), "--to", str(tmp_path / "merged"), "--merge-lora", str(yml)]
    main(arguments)
    assert "the adapters merged into the language model" in capsys.readouterr().out
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path / "merged", tiny_foundation)
    assert loaded.config.lora is None
    torch.testing.assert_close(loaded(pictures, *INPUTS), decoder(pictures, *INPUTS), atol=1e-5, rtol=1e-4)
    with pytest.raises(SystemExit, match="no LoRA adapters to merge"):
        main([*arguments[:2], str(tmp_path / "merged"), *arguments[3:4], str(tmp_path / "again"), *arguments[5:]])
    with pytest.raises(SystemExit, match="is the source"):
        main([*arguments[:4], str(tmp_path / "adapters"), *arguments[5:]])


@torch.no_grad()
def test_a_picture_read_once_gives_what_forward_gives(tiny_foundation, pictures):
    decoder = build(tiny_foundation, moved=True)
    whole = decoder(pictures[:1].expand(2, -1, -1, -1), ["cat", "cat"], INPUTS[1])
    torch.testing.assert_close(decoder.predict(decoder.read_picture(pictures[:1]), "cat", INPUTS[1]), whole, atol=1e-5, rtol=1e-4)


def test_a_frozen_base_in_half_precision_keeps_the_adapters_in_float32(tiny_foundation, pictures):
    torch.manual_seed(1)
    decoder = ImageFeatureDecoder.from_foundation(tiny_foundation, DecoderConfig(lora=LORA), EMBED, torch.bfloat16)
    types = {name: p.dtype for name, p in decoder.named_parameters()}
    assert {types[name] for name in types if "lora_" in name} == {torch.float32}
    assert {types[name] for name in types if "base_layer" in name} == {torch.bfloat16}
    assert decoder(pictures, *INPUTS).isfinite().all()


def stage(foundation, **lora) -> Stage1:
    seed_everything(0, verbose=False)
    options = LoraOptions(**{"rank": RANK, "alpha": 8} | lora)
    return Stage1(foundation, DecoderConfig(lora=options), OptimizerConfig(lr=1e-2, lr_multipliers={r"decoder\.mllm\.": 0.5}))


def trainer(folder, steps: int) -> Trainer:
    return Trainer(max_steps=steps, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                   num_sanity_val_steps=0, enable_checkpointing=False)


def test_two_steps_train_adapters_connector_token_and_mapping(tiny_foundation, tmp_path):
    """Two, as A has no gradient while B is 0."""
    module = stage(tiny_foundation, dropout=0.1)
    before = copy.deepcopy(module.state_dict())
    run = trainer(tmp_path, 2)
    run.fit(module, loader(0, 1))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])} - {"target_sum", "target_count"}
    assert changed == {f"decoder.{name}" for name in module.decoder.own_parameters()}
    run.save_checkpoint(tmp_path / "two.ckpt")
    assert set(torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]) == changed | {"target_sum", "target_count"}
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path / "image_feature_decoder", tiny_foundation)
    inputs = batch(5).pixel_values, batch(5).label, batch(5).caption
    assert torch.equal(loaded(*inputs), module.decoder.eval()(*inputs))


@pytest.mark.parametrize(("now", "message"), [
    ({"alpha": 16}, r"decoder\.lora: .*'alpha': 8.* in the checkpoint, .*'alpha': 16.* now"),
    ({"rank": 2}, r"decoder\.lora: .*'rank': 4.*'rank': 2"),
])
def test_refuses_to_resume_with_other_adapters(tiny_foundation, tmp_path, now, message):
    run = trainer(tmp_path, 1)
    run.fit(stage(tiny_foundation), loader(0))
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 2).fit(stage(tiny_foundation, **now), loader(0), ckpt_path=tmp_path / "one.ckpt")
    trainer(tmp_path, 2).fit(stage(tiny_foundation), loader(0, 1), ckpt_path=tmp_path / "one.ckpt")


def test_a_folder_whose_config_lacks_the_adapters_is_refused_by_name(tiny_foundation, tmp_path):
    build(tiny_foundation).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["decoder"]["lora"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight: not expected|layers\.0\.self_attn\.q_proj\.weight: missing"):
        ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)


def test_refuses_a_target_that_names_no_layer(tiny_foundation):
    with pytest.raises(ValueError, match=r"(?s)lora.target 'layers.0.attention': .*not found.*mlp.down_proj.*self_attn.q_proj"):
        build(tiny_foundation, LoraOptions(target="layers.0.attention"))
    with pytest.raises(ValueError, match="rank 0"):
        build(tiny_foundation, LoraOptions(rank=0))


def test_says_how_to_get_peft(tiny_foundation, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'moma-lightning\[lora\]'"):
        build(tiny_foundation)


def test_blocks_to_shard_are_the_layers_with_their_adapters(tiny_foundation):
    plain, adapted = blocks_of(build(tiny_foundation, lora=None)), blocks_of(build(tiny_foundation))
    assert [type(block) for block in adapted] == [type(block) for block in plain]
    inside = [name for block in adapted for name, _ in block.named_parameters() if "lora_A" in name]
    assert len(inside) == LAYERS * 7, "all of them lie in a block"


def test_a_yaml_names_the_adapters(tmp_path):
    given = yaml.safe_load((EXPERIMENTS / "mini/stage1.yaml").read_text())
    given["model"]["init_args"] |= {"decoder": {"lora": {"rank": 4, "alpha": 8}}, "foundation": str(EXPERIMENTS / "mini/foundation.yaml")}
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(given))
    assert DecoderConfig.from_dict(read_experiment(tmp_path / "stage1.yaml").model["decoder"]) == DecoderConfig(lora=LORA)


@pytest.mark.parametrize("family", tiny_mllms.MLLMS)
def test_every_family_takes_adapters(family):
    model, processor = tiny_mllms.MLLMS[family]()
    decoder = ImageFeatureDecoder(model, processor, EMBED, DecoderConfig(lora=LORA, image_size=tiny_mllms.image_size(family)))
    language = {name for name, p in decoder.language_parameters().items() if p.requires_grad}
    assert len(language) == 2 * 7 * 3 and all("lora_" in name for name in language)
    assert not any(name in decoder.vision_parameters() for name in decoder.own_parameters())
