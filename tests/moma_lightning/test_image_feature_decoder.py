import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from experiments.mini.models import mini_foundation
from moma_lightning.foundation import load_mllm
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder, append_token
from moma_lightning.models.instruction import instruction

EMBED = 12
LABELS = ["cat", "toy robot", "mug"]
PROMPTS = ["a cat", "a toy robot in front of a brick wall at sunset", "a mug in the snow"]


@pytest.fixture(scope="module")
def mllm(tiny_foundation):
    return load_mllm(tiny_foundation)


def build(mllm, **options) -> ImageFeatureDecoder:
    torch.manual_seed(1)
    return ImageFeatureDecoder(copy.deepcopy(mllm[0]), mllm[1], EMBED, DecoderConfig(**options)).eval()


@pytest.fixture
def decoder(mllm):
    return build(mllm)


@pytest.fixture
def pictures():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3))).permute(0, 3, 1, 2).float() / 127.5 - 1


def mapped(decoder, hidden):
    gate, up, down = (decoder.mapping.get_parameter(f"{n}_proj.weight") for n in ("gate", "up", "down"))
    return (F.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T


def test_templates_word_for_word():
    assert instruction("paper", "cat", "a cat on the beach") == "<image>\nAn image of cat. Describe a cat on the beach"
    assert instruction("released", "cat", "a cat on the beach") == (
        "USER: <image>\n A photo of a cat. Describe a new image of the same cat in: a cat on the beach. ASSISTANT: *"
    )


@pytest.mark.parametrize("template", ["paper", "released"])
def test_articles_and_periods_are_not_doubled(template):
    plain = instruction(template, "cat", "a cat on the beach")
    assert instruction(template, " a cat", "a cat on the beach. ") == plain
    assert instruction(template, "The cat", "a cat on the beach .") == plain
    assert "apple" in instruction(template, "apple", "x")


@torch.no_grad()
@pytest.mark.parametrize("learnable_token", [True, False])
@pytest.mark.parametrize("template", ["paper", "released"])
def test_a_batch_equals_its_rows(mllm, pictures, template, learnable_token):
    decoder = build(mllm, template=template, learnable_token=learnable_token)
    together = decoder(pictures, LABELS, PROMPTS)
    alone = torch.cat([decoder(pictures[i : i + 1], LABELS[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert together.shape == (3, EMBED)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("learnable_token", [True, False])
@pytest.mark.parametrize("template", ["paper", "released"])
def test_a_picture_read_once_gives_what_reading_it_with_each_prompt_gives(mllm, pictures, template, learnable_token):
    """Prompts of unequal length, twice from one reading: the first use must not change it."""
    decoder = build(mllm, template=template, learnable_token=learnable_token)
    whole = decoder(pictures[:1].expand(3, -1, -1, -1), ["cat"] * 3, PROMPTS)
    read = decoder.read_picture(pictures[:1])
    for _ in range(2):
        torch.testing.assert_close(decoder.predict(read, "cat", PROMPTS), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoder.predict(read, "toy robot", PROMPTS[:1]), decoder(pictures[:1], ["toy robot"], PROMPTS[:1]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_released_reads_the_inner_models_last_state_at_the_star(mllm, pictures):
    """Against LlavaProcessor and LlavaModel run whole, one row at a time."""
    decoder = build(mllm, template="released")
    output = decoder(pictures, LABELS, PROMPTS)
    for i, image in enumerate(((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        label, prompt = LABELS[i], PROMPTS[i]
        text = f"USER: <image>\n A photo of a {label}. Describe a new image of the same {label} in: {prompt}. ASSISTANT: *"
        inputs = mllm[1](images=[Image.fromarray(image)], text=[text], return_tensors="pt")
        assert mllm[1].tokenizer.decode(inputs.input_ids[0, -1]).strip() == "*"
        hidden = mllm[0].model(**inputs).last_hidden_state[0, -1]
        torch.testing.assert_close(output[i], mapped(decoder, hidden), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_paper_reads_at_the_token_after_the_instruction(mllm, decoder, pictures):
    """Against the language model run on embeddings put together by hand."""
    output = decoder(pictures, LABELS, PROMPTS)
    tokenizer, model = mllm[1].tokenizer, mllm[0].model
    for i in range(3):
        after = tokenizer(f"\nAn image of {LABELS[i]}. Describe {PROMPTS[i]}", add_special_tokens=False).input_ids
        words = model.get_input_embeddings()(torch.tensor([[tokenizer.bos_token_id, *after]]))
        image = decoder.see(pictures[i : i + 1]).embeds
        sequence = torch.cat([words[:, :1], image, words[:, 1:], decoder.token[None, None]], dim=1)
        hidden = model.language_model(inputs_embeds=sequence).last_hidden_state[0, -1]
        torch.testing.assert_close(output[i], mapped(decoder, hidden), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_picture_label_prompt_and_token_each_change_the_output(decoder, pictures):
    def difference(*inputs):
        return (decoder(*inputs) - output)[0].abs().max().item()

    row = pictures[:1]
    output = decoder(row, ["cat"], ["a cat in the snow"])
    assert difference(pictures[1:2], ["cat"], ["a cat in the snow"]) > 1e-4
    assert difference(row, ["duck"], ["a cat in the snow"]) > 1e-4
    assert difference(row, ["cat"], ["a cat on a lake"]) > 1e-4
    decoder.token.add_(1)
    assert difference(row, ["cat"], ["a cat in the snow"]) > 1e-4


def test_append_token_puts_it_after_the_last_real_token():
    embeds, mask = torch.zeros(2, 3, 2), torch.tensor([[True, True, True], [True, False, False]])
    embeds, mask = append_token(embeds, mask, torch.tensor([1.0, 2.0]))
    assert embeds[:, :, 1].tolist() == [[0, 0, 0, 2], [0, 2, 0, 0]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_gradient_reaches_the_token_and_not_the_vision_tower(decoder, pictures):
    decoder.train()(pictures, LABELS, PROMPTS).square().sum().backward()
    for name, parameter in decoder.named_parameters():
        if "vision_tower" in name:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert not decoder.mllm.vision_tower.training and decoder.mllm.language_model.training


def test_a_trained_vision_tower_leaves_out_what_nothing_is_read_of(mllm, pictures):
    """LLaVA's last layer and normalisation: without gradients, they would stop DDP."""
    decoder = build(mllm, trainable=["."])
    decoder(pictures, LABELS, PROMPTS).square().sum().backward()
    assert not [name for name, p in decoder.named_parameters() if p.requires_grad and p.grad is None]
    fixed = {".".join(name.split(".")[2:4]) for name, p in decoder.named_parameters() if not p.requires_grad}
    assert any(p.requires_grad for p in decoder.vision_parameters().values()) and fixed == {"post_layernorm.weight", "post_layernorm.bias", "encoder.layers"}


def test_what_nothing_is_read_of_may_lie_in_a_decoders_file(mllm, tiny_foundation, tmp_path):
    """As it did in those whose vision tower was trained before it was left out."""
    decoder = build(mllm, trainable=["vision_tower", r"^mapping\.", r"^token$"])
    decoder.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    unread = next(name for name, _ in decoder.named_parameters() if "post_layernorm" in name)
    save_file(tensors | {unread: torch.ones(16)}, tmp_path / "model.safetensors")
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)
    assert torch.equal(loaded.token, decoder.token)
    save_file(tensors | {"another": torch.ones(16)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="another: not expected"):
        ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)


def test_counts_of_trained_and_frozen_parameters(mllm, decoder):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    frozen = sum(p.numel() for p in decoder.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    inner = mllm[0].model
    assert frozen == count(inner.vision_tower)
    assert trained == count(inner.language_model) + count(inner.multi_modal_projector) + 24 + (24 * 12 * 2 + 12 * 12)


def test_trained_parts_are_chosen_in_the_options(mllm):
    decoder = build(mllm, trainable=[r"^token$", r"^mapping\.", r"language_model\.layers\.1\.self_attn"])
    names = {name for name, p in decoder.named_parameters() if p.requires_grad}
    attention = {f"mllm.language_model.layers.1.self_attn.{p}_proj.weight" for p in "qkvo"}
    assert names == attention | {"token"} | {f"mapping.{p}_proj.weight" for p in ("gate", "up", "down")}


def test_refuses_a_trainable_that_names_nothing(mllm):
    with pytest.raises(ValueError, match="lora"):
        build(mllm, trainable=["lora"])


def test_released_has_no_token_of_its_own(mllm):
    assert build(mllm, template="released").token is None
    assert build(mllm).token.shape == (24,)


def test_makes_no_vocabulary_logits(mllm, pictures):
    model = copy.deepcopy(mllm[0])
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the language-model head was called"))
    decoder = ImageFeatureDecoder(model, mllm[1], EMBED, DecoderConfig())
    decoder(pictures, LABELS, PROMPTS)
    assert not any("lm_head" in name for name, _ in decoder.named_modules())
    shapes = []
    for module in decoder.modules():
        module.register_forward_hook(lambda m, i, o: shapes.append(o.shape[-1]) if isinstance(o, torch.Tensor) else None)
    decoder(pictures, LABELS, PROMPTS)
    assert shapes and len(mllm[1].tokenizer) not in shapes


@torch.no_grad()
def test_bf16_autocast_is_close(decoder, pictures):
    exact = decoder(pictures, LABELS, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        rough = decoder(pictures, LABELS, PROMPTS)
    assert F.cosine_similarity(exact, rough.float()).min() > 0.99


@pytest.mark.parametrize("inputs", [(LABELS[:2], PROMPTS), (LABELS, PROMPTS[:1])])
def test_refuses_unequal_counts(decoder, pictures, inputs):
    with pytest.raises(ValueError, match="must be as many"):
        decoder(pictures, *inputs)


def test_refuses_a_prompt_with_an_image_token(decoder, pictures):
    with pytest.raises(ValueError, match="must not contain <image>"):
        decoder(pictures[:1], ["cat"], ["<image> of a cat"])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"template": "released"}, {"trainable": [r"language_model\.layers\.0"]}])
def test_save_and_load_give_the_same_output(mllm, tiny_foundation, pictures, tmp_path, options):
    decoder = build(mllm, **options)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    decoder.save_pretrained(tmp_path)
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert loaded.config == decoder.config and not loaded.training
    assert torch.equal(loaded(pictures, LABELS, PROMPTS), decoder(pictures, LABELS, PROMPTS))


@pytest.mark.parametrize("trainable", [[r"^mapping\."], [r"^mllm\.multi_modal_projector\."]])
def test_saves_what_is_trained_and_what_the_mllm_does_not_hold(mllm, tmp_path, trainable):
    decoder = build(mllm, trainable=trainable)
    decoder.save_pretrained(tmp_path)
    new = {"token", "mapping.gate_proj.weight", "mapping.up_proj.weight", "mapping.down_proj.weight"}
    assert set(load_file(tmp_path / "model.safetensors")) == new | {n for n, p in decoder.named_parameters() if p.requires_grad}


def break_file(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_refuses_a_wrong_shape_with_file_key_and_shapes(decoder, tiny_foundation, tmp_path):
    decoder.save_pretrained(tmp_path)
    break_file(tmp_path / "model.safetensors", lambda t: t.update({"mapping.up_proj.weight": torch.zeros(12, 32)}))
    expected = r"model\.safetensors.*\n.*mapping\.up_proj\.weight: shape \[12, 32\], expected \[12, 24\]"
    with pytest.raises(ValueError, match=expected):
        ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)


def test_refuses_missing_and_unexpected_keys(decoder, tiny_foundation, tmp_path):
    decoder.save_pretrained(tmp_path)
    break_file(tmp_path / "model.safetensors", lambda t: t.update({"other": t.pop("token")}))
    with pytest.raises(ValueError, match=r"(?s)token: missing.*other: not expected"):
        ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)


def test_refuses_a_cut_file(decoder, tiny_foundation, tmp_path):
    decoder.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole"):
        ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)


def test_refuses_an_mllm_of_another_width_before_loading_it(decoder, tiny_foundation, tmp_path, monkeypatch):
    decoder.save_pretrained(tmp_path)
    monkeypatch.setattr(f"{ImageFeatureDecoder.__module__}.load_mllm", lambda *_: pytest.fail("gigabytes were loaded first"))
    with pytest.raises(ValueError, match=r"its mapping reads hidden states of 24, the MLLM .* has 128: set foundation.mllm"):
        ImageFeatureDecoder.from_pretrained(tmp_path, replace(tiny_foundation, mllm=mini_foundation().mllm))


def test_a_frozen_mllm_may_be_in_half_precision(decoder, tiny_foundation, pictures, tmp_path):
    decoder.save_pretrained(tmp_path)
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path, replace(tiny_foundation, mllm_dtype="bfloat16"))
    assert next(loaded.mllm.parameters()).dtype == torch.bfloat16 and loaded.mapping.up_proj.weight.dtype == torch.float32
    with torch.no_grad():
        assert F.cosine_similarity(loaded(pictures, LABELS, PROMPTS), decoder(pictures, LABELS, PROMPTS)).min() > 0.99


def test_names_a_missing_file(tiny_foundation, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        ImageFeatureDecoder.from_pretrained(tmp_path, tiny_foundation)


def test_a_missing_mllm_is_named(tiny_foundation):
    with pytest.raises(FileNotFoundError, match="no/such/llava"):
        ImageFeatureDecoder.from_foundation(replace(tiny_foundation, mllm="no/such/llava"), DecoderConfig(), EMBED)
