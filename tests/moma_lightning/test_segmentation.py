"""SamMasker on a tiny SAM with random weights: prompts, choice among candidates, formats, errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import sam_model_registry

from moma_lightning import segmentation
from moma_lightning.segmentation import SamConfig, SamMasker, as_rgb, build_sam, point_prompts, save_sam

CONFIG = SamConfig(image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, prompt_embed_dim=32, decoder_depth=1, decoder_mlp_dim=16)


@pytest.fixture
def sam():
    torch.manual_seed(0)
    return build_sam(CONFIG)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def answer(monkeypatch, masks, quality):
    """Let the mask decoder return these low-resolution logits and qualities; records the prompts' embedding."""
    seen = []

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        seen.append((sparse_prompt_embeddings, multimask_output))
        return masks, quality

    monkeypatch.setattr(segmentation.MaskDecoder, "forward", forward)
    return seen


def halves(*positions):
    """One 16x16 logit map a position: positive in the named half."""
    maps = -torch.ones(1, len(positions), 16, 16)
    for i, position in enumerate(positions):
        maps[0, i][{"left": np.s_[:, :8], "top": np.s_[:5], "none": np.s_[:0]}[position]] = 1
    return maps


def test_the_candidate_with_the_best_predicted_iou_wins(sam, picture, monkeypatch):
    answer(monkeypatch, halves("top", "left", "top"), torch.tensor([[0.5, 0.9, 0.7]]))
    mask = SamMasker(sam)(picture)
    assert mask.shape == (1, 24, 40) and mask.dtype == torch.float32
    assert mask[0, :, :19].min() == 1 and mask[0, :, 21:].max() == 0


def test_padding_is_cut_off_from_wide_pictures(sam, picture, monkeypatch):
    answer(monkeypatch, halves("top", "top", "top"), torch.zeros(1, 3))
    mask = SamMasker(sam)(picture)
    # 40x24 becomes 32x19 in a 32x32 canvas; the upper 5 of 16 logit rows are its upper 10 of 19 rows, 12.6 of 24
    assert mask[0, :12].min() == 1 and mask[0, 14:].max() == 0


def test_centre_is_subject_and_corners_are_background(sam, picture, monkeypatch):
    points, labels = point_prompts(24, 40)
    assert points.tolist() == [[19.5, 11.5], [0, 0], [39, 0], [0, 23], [39, 23]] and labels.tolist() == [1, 0, 0, 0, 0]
    seen = answer(monkeypatch, halves("top", "top", "top"), torch.zeros(1, 3))
    SamMasker(sam)(picture)
    scaled = torch.tensor(points) * torch.tensor([32 / 40, 19 / 24])
    expected, _ = sam.prompt_encoder(points=(scaled[None], torch.tensor(labels)[None]), boxes=None, masks=None)
    torch.testing.assert_close(seen[0][0], expected)
    assert seen[0][1] is True


def test_nothing_found_is_an_error(sam, picture, monkeypatch):
    answer(monkeypatch, halves("left", "none", "top"), torch.tensor([[0.5, 0.9, 0.7]]))
    with pytest.raises(ValueError, match="40x24"):
        SamMasker(sam)(picture)


def test_pixels_and_picture_mean_the_same(sam, picture):
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1
    assert np.array_equal(as_rgb(pixels), np.asarray(picture))
    torch.testing.assert_close(SamMasker(sam)(pixels), SamMasker(sam)(picture))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 8, 8), (8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="one picture"):
        as_rgb(torch.zeros(shape))


def test_grey_and_transparent_pictures_are_read_as_rgb(picture):
    assert as_rgb(picture.convert("L")).shape == (24, 40, 3)
    layer = picture.convert("RGBA")
    layer.putalpha(Image.fromarray(np.pad(np.full((24, 20), 255, np.uint8), ((0, 0), (0, 20)))))
    left, right = np.split(as_rgb(layer), 2, axis=1)
    assert np.array_equal(left, np.asarray(picture)[:, :20]) and (right == 255).all()


def test_a_saved_folder_loads_bit_for_bit_and_frozen(sam, tmp_path):
    save_sam(sam, CONFIG, tmp_path / "sam")
    loaded = SamMasker.from_pretrained(tmp_path / "sam").sam
    assert all(torch.equal(a, b) for a, b in zip(sam.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_an_official_checkpoint_is_built_by_its_name(sam, tmp_path, monkeypatch):
    monkeypatch.setitem(sam_model_registry, "vit_b", lambda: build_sam(CONFIG))
    torch.save(sam.state_dict(), tmp_path / "sam_vit_b_01ec64.pth")
    loaded = SamMasker.from_pretrained(tmp_path / "sam_vit_b_01ec64.pth").sam
    assert torch.equal(loaded.mask_decoder.mask_tokens.weight, sam.mask_decoder.mask_tokens.weight)
    (tmp_path / "sam_vit_b_01ec64.pth").rename(tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="vit_h, vit_l or vit_b"):
        SamMasker.from_pretrained(tmp_path / "sam.pth")


def test_what_is_not_there_is_named(sam, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SamMasker.from_pretrained(tmp_path / "nowhere")
    save_sam(sam, CONFIG, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        SamMasker.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused(sam, tmp_path):
    save_sam(sam, CONFIG, tmp_path)
    other = json.loads((tmp_path / "config.json").read_text()) | {"embed_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="size mismatch"):
        SamMasker.from_pretrained(tmp_path)
