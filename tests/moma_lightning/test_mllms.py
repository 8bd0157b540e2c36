"""Every family of multimodal LLMs through the one decoder, against its own processor and its inner model run whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from moma_lightning.batch import TripletBatch
from moma_lightning.foundation import FoundationConfig, load_mllm, mllm_width
from moma_lightning.models.blocks import blocks_of
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.models.instruction import PICTURE, instruction
from moma_lightning.models.mllm import FAMILIES
from moma_lightning.modules.stage1 import Stage1
from moma_lightning.optim import OptimizerConfig
from tests import tiny_mllms

EMBED = 12
LABELS = ["cat", "toy robot", "mug"]
PROMPTS = ["a cat", "a toy robot in front of a brick wall at sunset", "a mug in the snow"]


@pytest.fixture(scope="module", params=tiny_mllms.MLLMS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def mllm_foundation(family, tiny_foundation, tmp_path_factory) -> FoundationConfig:
    folder = tmp_path_factory.mktemp(family)
    tiny_mllms.write(family, folder)
    return replace(tiny_foundation, mllm=str(folder))


def build(family: str, foundation: FoundationConfig, **options) -> ImageFeatureDecoder:
    torch.manual_seed(1)
    return ImageFeatureDecoder.from_foundation(foundation, DecoderConfig(image_size=tiny_mllms.image_size(family), **options), EMBED).eval()


@pytest.fixture(scope="module")
def pictures(family) -> torch.Tensor:
    side = tiny_mllms.image_size(family) or tiny_mllms.SIDE
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, side, side, 3))).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_the_tested_families_are_the_known_ones():
    assert {"llava", *tiny_mllms.MLLMS} == set(FAMILIES)


def test_whatever_is_trained_gets_gradients(family, mllm_foundation, pictures):
    """Even where all is asked for: DDP stops at a parameter without, and a sharded checkpoint has no state for it."""
    decoder = build(family, mllm_foundation, trainable=["."])
    decoder(pictures, LABELS, PROMPTS).square().sum().backward()
    assert not [name for name, p in decoder.named_parameters() if p.requires_grad and p.grad is None]
    assert any(p.requires_grad for p in decoder.vision_parameters().values())


def theirs(family: str, foundation: FoundationConfig, pictures: torch.Tensor, texts: list[str]) -> list[torch.Tensor]:
    """The inner model's last hidden state at each text's last token, by the family's own processor, one row at a time."""
    model, processor = load_mllm(foundation)
    images = [Image.fromarray(image) for image in ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    states = []
    for image, text in zip(images, texts, strict=True):
        if family == "llava_onevision":  # without tiles it takes several pictures only: the second one's text is of no interest
            inputs = processor(images=[[image, image]], text=[text + "<image>"], return_tensors="pt")
            end = int(inputs.input_ids[0].tolist().index(processor.image_token_id, -17 + inputs.input_ids.shape[1])) - 1
        else:
            if family.startswith("qwen"):
                text = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
            # SmolVLM enlarges a picture four times before it cuts tiles, and without tiles shrinks it again; here that is left out.
            split = {"do_image_splitting": False, "do_resize": False} if family in ("idefics3", "smolvlm") else {}
            inputs, end = processor(images=[[image]], text=[text], return_tensors="pt", **split), -1
        states.append(model.model(**inputs).last_hidden_state[0, end])
    return states


@torch.no_grad()
def test_equals_the_familys_own_processor_and_model(family, mllm_foundation, pictures):
    decoder = build(family, mllm_foundation, template="released")
    texts = [f"USER: <image>\n A photo of a {a}. Describe a new image of the same {a} in: {p}. ASSISTANT: *" for a, p in zip(LABELS, PROMPTS, strict=True)]
    gate, up, down = (decoder.mapping.get_parameter(f"{n}_proj.weight") for n in ("gate", "up", "down"))
    output = decoder(pictures, LABELS, PROMPTS)
    for row, hidden in zip(output, theirs(family, mllm_foundation, pictures, texts), strict=True):
        torch.testing.assert_close(row, (F.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("template", ["paper", "released"])
def test_tokens_are_those_of_the_text_with_all_places_in_it(family, mllm_foundation, template):
    decoder = build(family, mllm_foundation, template=template)
    places = decoder.family.before + decoder.image_token * 5 + decoder.family.after
    texts = [instruction(template, label, prompt).replace(PICTURE, places) for label, prompt in zip(LABELS, PROMPTS, strict=True)]
    whole = decoder.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = decoder.tokenize(LABELS, PROMPTS, 5)
    assert torch.equal(ids, whole.input_ids) and torch.equal(mask, whole.attention_mask.bool())
    assert (ids == decoder.mllm.config.image_token_id).sum(1).tolist() == [5, 5, 5] and not mask.all()


@torch.no_grad()
@pytest.mark.parametrize("template", ["paper", "released"])
def test_rows_and_a_picture_read_once_give_what_a_batch_gives(family, mllm_foundation, pictures, template):
    decoder = build(family, mllm_foundation, template=template)
    together = decoder(pictures, LABELS, PROMPTS)
    assert together.shape == (3, EMBED) and (together[0] - together[1]).abs().max() > 1e-3
    for i in range(3):
        alone = decoder(pictures[i : i + 1], LABELS[i : i + 1], PROMPTS[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-3)
    read = decoder.read_picture(pictures[:1])
    whole = decoder(pictures[:1].expand(3, -1, -1, -1), ["cat"] * 3, PROMPTS)
    for _ in range(2):
        torch.testing.assert_close(decoder.predict(read, "cat", PROMPTS), whole, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_picture_prompt_and_token_each_change_the_output(family, mllm_foundation, pictures):
    decoder = build(family, mllm_foundation)
    output = decoder(pictures[:1], ["cat"], ["a cat in the snow"])
    assert (decoder(pictures[1:2], ["cat"], ["a cat in the snow"]) - output).abs().max() > 1e-3
    assert (decoder(pictures[:1], ["cat"], ["a cat on a lake"]) - output).abs().max() > 1e-3
    decoder.token.add_(1)
    assert (decoder(pictures[:1], ["cat"], ["a cat in the snow"]) - output).abs().max() > 1e-3


@torch.no_grad()
def test_a_wide_picture_is_seen_whole_on_white(family, mllm_foundation, pictures):
    decoder = build(family, mllm_foundation)
    wide = pictures[:1, :, 4:-4]
    square = F.pad(wide, (0, 0, 4, 4), value=1.0)
    assert torch.equal(decoder(wide, ["cat"], ["a cat"]), decoder(square, ["cat"], ["a cat"]))


@torch.no_grad()
def test_save_and_load_give_the_same_output(family, mllm_foundation, pictures, tmp_path):
    decoder = build(family, mllm_foundation)
    for parameter in decoder.own_parameters().values():
        parameter.add_(0.01 * torch.randn_like(parameter))
    decoder.save_pretrained(tmp_path)
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path, mllm_foundation)
    assert loaded.config == decoder.config and mllm_width(mllm_foundation) == tiny_mllms.HIDDEN
    assert torch.equal(loaded(pictures, LABELS, PROMPTS), decoder(pictures, LABELS, PROMPTS))


def one_batch(side: int) -> TripletBatch:
    rng = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 1, side, side)
    mask[..., side // 4 :, : side // 2] = 1
    return TripletBatch(torch.rand(2, 3, side, side, generator=rng) * 2 - 1, mask, ["a cat on a lake", "a mug"], ["cat", "mug"], ["0", "1"])


def test_a_stage_1_step_trains_all_but_the_vision_tower(family, mllm_foundation, tmp_path):
    seed_everything(0, verbose=False)
    module = Stage1(mllm_foundation, DecoderConfig(image_size=tiny_mllms.image_size(family)), OptimizerConfig(lr=1e-2))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                      enable_checkpointing=False)
    trainer.fit(module, DataLoader([one_batch(20)], batch_size=None))
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    inner = module.decoder.mllm
    tower, language = inner.get_encoder("image"), inner.get_decoder()
    connector = {"qwen2_5_vl": ["merger"], "qwen3_vl": ["merger", "deepstack_merger_list"]}.get(family, [])
    vision = {p for name, p in tower.named_parameters() if name.split(".")[0] not in connector}
    names = {id(p): name for name, p in module.named_parameters()}
    fixed = {names[id(p)] for p in vision} | {name for name in before if name.startswith("image_encoder.")}
    assert vision and changed == set(before) - fixed
    assert {names[id(p)] for p in language.parameters()} < changed and not tower.training and language.training
    assert len(blocks_of(inner)) == len(language.layers) + sum(1 for name, _ in tower.named_modules() if name.split(".")[-2:-1] in (["layers"], ["blocks"]))


def test_a_family_that_was_never_run_is_refused(tiny_foundation):
    model, processor = tiny_mllms.idefics3()
    model.config.model_type = "aya_vision"
    with pytest.raises(ValueError, match=r"family 'aya_vision' are not known, only llava, .*add its Family"):
        ImageFeatureDecoder(model, processor, EMBED, DecoderConfig())


@pytest.mark.parametrize(("name", "size", "message"), [
    ("idefics3", 24, r"image_size 24: the MLLM \(idefics3\) takes pictures of 16 pixels only"),
    ("qwen2_5_vl", 20, r"image_size 20 is no multiple of 8, which the MLLM \(qwen2_5_vl\) needs"),
])
def test_refuses_a_picture_size_that_the_model_cannot_take(name, size, message):
    model, processor = tiny_mllms.MLLMS[name]()
    with pytest.raises(ValueError, match=message):
        ImageFeatureDecoder(model, processor, EMBED, DecoderConfig(image_size=size))
