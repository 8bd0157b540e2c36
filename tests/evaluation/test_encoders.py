import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from evaluation.metrics import CachedEncoder, ClipConfig, ClipEncoder, DinoConfig, DinoEncoder
from evaluation.metrics.cache import fingerprint, pixel_digest
from evaluation.metrics.encoders import load_timm
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
                max_position_embeddings=MAX_TOKENS, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=[0.5] * 3, image_std=[0.4] * 3).save_pretrained(folder)
    return folder


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


def test_dino_embedding_is_the_unit_cls_token(dino):
    pictures = [random_picture(i, (300, 260)) for i in range(2)]
    tokens = dino.model.forward_features(dino.preprocess(pictures))
    expected = tokens[:, 0] / tokens[:, 0].square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(dino.encode_images(pictures), expected)


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
        load_timm("no/such/dino")
    model = timm.create_model("resnet10t", num_classes=0)
    timm.models.save_for_hf(model, tmp_path, model_args={"num_classes": 0})
    with pytest.raises(ValueError, match="CLS token"):
        load_timm(str(tmp_path))


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


def test_fingerprint_changes_with_weights_and_settings(clip_folder):
    config = ClipConfig(str(clip_folder))
    encoder = ClipEncoder(config)
    before = fingerprint(encoder, config)
    assert fingerprint(encoder, config) == before
    assert fingerprint(encoder, ClipConfig(str(clip_folder), backend="torchvision")) != before
    encoder.model.logit_scale.data += 1
    assert fingerprint(encoder, config) != before


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
