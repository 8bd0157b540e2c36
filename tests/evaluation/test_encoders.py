import json
import shutil
import sys
import types
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipImageProcessor, SiglipModel
from transformers import SiglipConfig as SiglipModelConfig

from evaluation.metrics import (
    CachedEncoder,
    ClipConfig,
    ClipEncoder,
    DinoConfig,
    DinoEncoder,
    DreamsimConfig,
    DreamsimEncoder,
    SiglipConfig,
    SiglipEncoder,
)
from evaluation.metrics.cache import fingerprint, pixel_digest
from evaluation.metrics.configs import hub_names, source_of
from evaluation.metrics.encoders import load_dino, timm_name
from experiments.mini.recipe.captions import MAX_TOKENS, build_tokenizer
from tests.evaluation.fakes import ColorEncoder, random_picture

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def dino() -> DinoEncoder:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0, depth=2)
    return DinoEncoder(DinoConfig(), model)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("clip"), build_tokenizer()
    torch.manual_seed(0)
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS, eos_token_id=tokenizer.eos_token_id)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=[0.5] * 3, image_std=[0.4] * 3).save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("pooling, read", [("cls", 1), ("mean", 197)])
def test_dinos_last_mlp_reads_all_tokens_only_where_they_are_pooled(pooling, read):
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0, depth=2)
    encoder, picture, shapes = DinoEncoder(DinoConfig(pooling=pooling), model), random_picture(0), []
    model.blocks[-1].mlp.fc1.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[1]))
    embeds, tokens = encoder.encode_images([picture]), model.forward_features(encoder.preprocess([picture]))
    expected = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
    torch.testing.assert_close(embeds, torch.nn.functional.normalize(expected, dim=-1))
    assert shapes == [read, 197]


@torch.no_grad()
def test_an_architecture_that_reads_its_patches_once_more_is_run_whole():
    model = timm.create_model("cait_xxs24_224", pretrained=False, num_classes=0, depth=2)
    for name, parameter in model.named_parameters():
        if "gamma" in name:  # of 1e-5, which would hide the difference
            parameter.fill_(1.0)
    encoder, picture = DinoEncoder(DinoConfig(), model), random_picture(0)
    expected = model.forward_features(encoder.preprocess([picture]))[:, 0]
    torch.testing.assert_close(encoder.encode_images([picture]), torch.nn.functional.normalize(expected, dim=-1))


def test_dino_preprocessing_is_dreambooths(dino):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 417, 3), dtype=np.uint8))
    expected = transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(*IMAGENET),
    ])(picture)
    torch.testing.assert_close(dino.preprocess([picture])[0], expected, rtol=0, atol=1e-6)


def test_dino_preprocessing_is_not_timms_own(dino):
    """timm's config for this model says crop_pct 0.9: a resize to 248."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    timms = timm.data.create_transform(**timm.data.resolve_data_config({}, model=dino.model))
    assert (dino.preprocess([picture])[0] - timms(picture)).abs().max() > 0.1


def test_dinos_interpolation_is_the_configs(dino):
    picture = random_picture(0, (50, 60))
    found = [DinoEncoder(DinoConfig(interpolation=kind), dino.model).preprocess([picture]) for kind in ("bicubic", "bilinear")]
    assert not torch.equal(*found)


def test_dino_embedding_is_the_unit_cls_token(dino):
    pictures = [random_picture(i, (300, 260)) for i in range(2)]
    tokens = dino.model.forward_features(dino.preprocess(pictures))
    expected = tokens[:, 0] / tokens[:, 0].square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(dino.encode_images(pictures), expected)


def test_dino_end_to_end_by_hand(dino):
    """Pillow's own resize and crop, then the ViT block by block: nothing shared with the encoder but the weights."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (320, 512, 3), dtype=np.uint8))
    resized = picture.resize((int(512 * 256 / 320), 256), Image.Resampling.BICUBIC)  # the long side is truncated, not rounded
    left, top = round((resized.width - 224) / 2), (256 - 224) // 2
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float32) / 255
    pixels = torch.from_numpy((pixels - np.float32(IMAGENET[0])) / np.float32(IMAGENET[1])).permute(2, 0, 1)[None]
    model = dino.model
    patches = torch.nn.functional.conv2d(pixels, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=16).flatten(2).mT
    tokens = torch.cat([model.cls_token, patches], 1) + model.pos_embed
    for block in model.blocks:
        tokens = block(tokens)
    cls = torch.nn.functional.layer_norm(tokens, (384,), model.norm.weight, model.norm.bias, 1e-6)[0, 0]
    torch.testing.assert_close(dino.encode_images([picture])[0], cls / cls.norm(), rtol=1e-4, atol=1e-5)


def test_mean_pooling_is_over_patches(dino):
    picture = random_picture(4, (256, 256))
    patches = dino.model.forward_features(dino.preprocess([picture]))[0, 1:]
    expected = patches.sum(0) / patches.sum(0).norm()
    torch.testing.assert_close(DinoEncoder(DinoConfig(pooling="mean"), dino.model).encode_images([picture])[0], expected)


def test_dinov2_takes_the_crop_with_its_position_embedding_resampled():
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=False, num_classes=0, depth=1)
    torch.nn.init.normal_(model.pos_embed)
    grid = model.pos_embed[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)  # 518 / 14
    small = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic", antialias=True).flatten(2).mT
    expected = torch.cat([model.pos_embed[:, :1], small], 1)
    encoder = DinoEncoder(DinoConfig("vit_small_patch14_dinov2.lvd142m"), model)
    torch.testing.assert_close(encoder.model.pos_embed, expected, rtol=1e-4, atol=1e-4)
    embeds = encoder.encode_images([random_picture(5, (300, 260))])
    assert embeds.shape == (1, 384) and float(embeds.norm()) == pytest.approx(1, abs=1e-5)


def test_dinov3_is_its_class_token_not_its_registers():
    torch.manual_seed(0)
    model, own = (timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, depth=1, **more)
                  for more in ({}, {"global_pool": "token"}))
    own.load_state_dict(model.state_dict())
    encoder, picture = DinoEncoder(DinoConfig("vit_small_patch16_dinov3"), model), random_picture(6, (300, 260))
    expected = own.eval()(encoder.preprocess([picture]))
    torch.testing.assert_close(encoder.encode_images([picture]), expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_mean_pooling_leaves_registers_out():
    torch.manual_seed(0)
    model, picture = timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, depth=1), random_picture(6, (300, 260))
    encoder = DinoEncoder(DinoConfig("vit_small_patch16_dinov3", pooling="mean"), model)
    patches = encoder.model.forward_features(encoder.preprocess([picture]))[:, 5:]  # after the class token and four registers
    assert patches.shape[1] == 14 * 14
    torch.testing.assert_close(encoder.encode_images([picture]), torch.nn.functional.normalize(patches.mean(1), dim=-1))


def test_dino_from_a_local_folder(tmp_path):
    options = dict(img_size=64, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=0, global_pool="token")
    model = timm.create_model("vit_small_patch16_224", **options)
    timm.models.save_for_hf(model, tmp_path, model_args=options)
    config = DinoConfig(str(tmp_path), resize=64, crop=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    picture = random_picture(3, (64, 64))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()[None] / 127.5 - 1
    expected = torch.nn.functional.normalize(model.eval()(pixels), dim=-1)
    torch.testing.assert_close(DinoEncoder(config).encode_images([picture]), expected, rtol=1e-5, atol=1e-6)


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no/such/dino"):
        load_dino(DinoConfig("no/such/dino"))
    model = timm.create_model("resnet10t", num_classes=0)
    timm.models.save_for_hf(model, tmp_path, model_args={"num_classes": 0})
    with pytest.raises(ValueError, match="CLS token"):
        load_dino(DinoConfig(str(tmp_path)))


def test_clip_embeddings_are_the_projected_ones(clip_folder):
    encoder = ClipEncoder(ClipConfig(str(clip_folder)))
    picture, texts = random_picture(1, (50, 40)), ["a cat in the snow", "a mug"]
    resized = picture.resize((40, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32))
    pixels = (torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()[None] / 255 - 0.5) / 0.4
    image = encoder.model.visual_projection(encoder.model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(encoder.encode_images([picture]), image / image.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    for text, embed in zip(texts, encoder.encode_texts(texts), strict=True):  # alone, so without padding
        ids = encoder.tokenizer(text, return_tensors="pt").input_ids
        expected = encoder.model.text_projection(encoder.model.text_model(ids).pooler_output)[0]
        torch.testing.assert_close(embed, expected / expected.norm(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("siglip"), build_tokenizer()
    torch.manual_seed(0)
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=12, projection_size=16)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    SiglipModel(SiglipModelConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}, resample=Image.Resampling.BILINEAR).save_pretrained(folder)
    return folder


def test_siglip_pictures_are_attention_pooled(siglip_folder):
    encoder, picture = SiglipEncoder(SiglipConfig(str(siglip_folder))), random_picture(1, (50, 40))
    squashed = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    pixels = torch.from_numpy(squashed).permute(2, 0, 1)[None] / 127.5 - 1
    tokens, head = encoder.model.vision_model(pixels).last_hidden_state, encoder.model.vision_model.head
    (wq, wk, wv), (bq, bk, bv) = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (head.probe @ wq.T + bq, tokens @ wk.T + bk, tokens @ wv.T + bv))
    mixed = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    pooled = head.attention.out_proj(mixed)
    pooled = (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
    torch.testing.assert_close(encoder.encode_images([picture]), pooled / pooled.norm(), rtol=1e-4, atol=1e-5)


def test_siglip_texts_are_lower_case_and_padded_on_the_right_to_full_length(siglip_folder):
    encoder = SiglipEncoder(SiglipConfig(str(siglip_folder)))
    ids = encoder.tokenizer("a cat in the snow").input_ids
    padded = torch.tensor([ids + [encoder.tokenizer.pad_token_id] * (12 - len(ids))])
    tokens = encoder.model.text_model(padded).last_hidden_state[:, -1]
    expected = encoder.model.text_model.head(tokens)
    encoder.tokenizer = Mock(wraps=encoder.tokenizer)  # which writes all in lower case itself
    both = encoder.encode_texts(["A CAT in the snow", "a mug"])
    assert encoder.tokenizer.call_args.args == (["a cat in the snow", "a mug"],)
    torch.testing.assert_close(both[:1], expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_dreamsims_distance_is_one_minus_the_cosine(monkeypatch):
    """With a stand-in for the package, which is an extra: what it is asked for, and what is made of its embeddings."""
    asked = {}

    class Perceptual(torch.nn.Linear):
        def embed(self, pixels):
            return self(pixels.flatten(1))

    def dreamsim(**options):
        asked.update(options)
        return model, lambda image: transforms.ToTensor()(image.resize((4, 4)))[None]

    torch.manual_seed(0)
    model = Perceptual(48, 6)
    monkeypatch.setitem(sys.modules, "dreamsim", types.SimpleNamespace(dreamsim=dreamsim))
    encoder, pictures = DreamsimEncoder(DreamsimConfig("dino_vitb16", "somewhere")), [random_picture(i) for i in range(2)]
    a, b = encoder.encode_images(pictures)
    x, y = (model.embed(transforms.ToTensor()(picture.resize((4, 4)))[None]) for picture in pictures)
    assert float(1 - a @ b) == pytest.approx(float(1 - torch.cosine_similarity(x, y)), abs=1e-5)
    assert asked == {"pretrained": True, "device": "cpu", "cache_dir": "somewhere", "dreamsim_type": "dino_vitb16"}


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(ImportError, match=r"pip install -e \.\[dreamsim\]"):
        DreamsimEncoder(DreamsimConfig())


def test_revisions_reach_the_hub_and_mean_nothing_to_folders(clip_folder):
    assert source_of(ClipConfig("owner/name", revision="abc")) == {"pretrained_model_name_or_path": "owner/name", "revision": "abc"}
    assert source_of(ClipConfig("owner/name@def", revision=None)) == {"pretrained_model_name_or_path": "owner/name", "revision": "def"}
    assert source_of(ClipConfig(str(clip_folder), revision="abc")) == {"pretrained_model_name_or_path": str(clip_folder)}
    assert timm_name("vit_small_patch16_224.dino", None) == "vit_small_patch16_224.dino"
    assert timm_name("vit_small_patch16_224.dino", "abc") == "hf-hub:timm/vit_small_patch16_224.dino@abc"
    assert timm_name("owner/name", "abc") == timm_name("owner/name@abc", None) == "hf-hub:owner/name@abc"
    assert timm_name(str(clip_folder), "abc") == f"local-dir:{clip_folder}"


def test_encoders_are_fetched_at_the_revision_that_they_are_loaded_at(clip_folder):
    configs = [DinoConfig(), DinoConfig("o/dino", revision="abc"), ClipConfig("o/clip", revision=None), ClipConfig("o/clip@def", revision=None),
               ClipConfig("o/clip@def", revision="abc"), ClipConfig(str(clip_folder)), DreamsimConfig()]
    assert hub_names(configs) == ["timm/vit_small_patch16_224.dino@main", "o/dino@abc", "o/clip@main", "o/clip@def", "o/clip@abc"]


def test_fingerprint_changes_with_weights_and_settings(clip_folder):
    config = ClipConfig(str(clip_folder))
    encoder = ClipEncoder(config)
    before = fingerprint(encoder, config)
    assert fingerprint(encoder, config) == before
    assert fingerprint(encoder, ClipConfig(str(clip_folder), backend="torchvision")) != before
    encoder.model.logit_scale.data += 1
    assert fingerprint(encoder, config) != before


def test_fingerprint_changes_with_the_processor_beside_the_weights(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    encoder = ClipEncoder(ClipConfig(str(folder)))
    before = fingerprint(encoder, ClipConfig(str(folder)))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    assert fingerprint(encoder, ClipConfig(str(folder))) != before


def test_cache_encodes_each_picture_once_and_survives(tmp_path):
    path, pictures = tmp_path / "dino.npz", [random_picture(i) for i in (0, 1, 0, 2)]
    inner = ColorEncoder()
    cached = CachedEncoder(inner, path, batch_size=2)
    torch.testing.assert_close(cached.encode_images(pictures), ColorEncoder().encode_images(pictures))
    assert inner.seen == 3
    cached.save()
    again = ColorEncoder()
    torch.testing.assert_close(CachedEncoder(again, path).encode_images(pictures), inner.encode_images(pictures))
    assert again.seen == 0
    assert [p.name for p in tmp_path.iterdir()] == ["dino.npz"]


def test_digest_is_of_pixels_not_of_files():
    picture = random_picture(0)
    assert pixel_digest(picture) == pixel_digest(picture.copy())
    assert pixel_digest(picture) != pixel_digest(random_picture(1))
    assert pixel_digest(picture) != pixel_digest(picture.rotate(90))


def test_encoder_without_text_tower_says_so(dino):
    with pytest.raises(NotImplementedError, match="DinoEncoder has no text tower"):
        dino.encode_texts(["a cat"])
