import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.metrics import Masker, masker
from moma_lightning.segmentation import NothingFoundError, SamConfig, SamMasker, build_sam
from tests.evaluation.fakes import random_picture


class Half(torch.nn.Module):
    """Finds the left half of a picture, and nothing in a black one. Counts what it is asked."""

    def __init__(self, seed: float = 0.0):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.tensor([seed])), 0

    def forward(self, image):
        self.seen += 1
        if not np.asarray(image).any():
            raise NothingFoundError("SAM found no object")
        mask = torch.zeros(1, image.height, image.width)
        mask[..., : image.width // 2] = 1
        return mask


def test_each_picture_is_segmented_once_and_masks_survive(tmp_path):
    sam, pictures = Half(), [random_picture(0), random_picture(1, (30, 20)), random_picture(0)]
    masks = [Masker(sam, tmp_path)(picture) for picture in pictures]
    assert sam.seen == 2
    assert [mask.shape for mask in masks] == [(24, 24), (20, 30), (24, 24)]
    assert all(mask[:, : mask.shape[1] // 2].all() and not mask[:, mask.shape[1] // 2 :].any() for mask in masks)
    again = Half()
    np.testing.assert_array_equal(Masker(again, tmp_path)(pictures[1]), masks[1])
    assert again.seen == 0


def test_masks_that_a_folder_has_do_not_pile_up_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(masker, "HELD", 3)
    sam, pictures = Half(), [random_picture(i) for i in range(8)]
    found, kept = Masker(sam, tmp_path), Masker(sam)
    for picture in [*pictures, *pictures]:
        np.testing.assert_array_equal(found(picture), kept(picture))
    assert len(found.known) == 3 and len(kept.known) == 8
    assert sam.seen == 2 * 8, "each picture once for each of the two"


def test_other_weights_find_masks_of_their_own(tmp_path):
    Masker(Half(), tmp_path)(random_picture(0))
    other = Half(seed=1.0)
    Masker(other, tmp_path)(random_picture(0))
    assert other.seen == 1


def test_no_subject_is_an_empty_mask_that_is_kept(tmp_path):
    black = Image.new("RGB", (8, 6))
    assert Masker(Half(), tmp_path)(black).sum() == 0
    again = Half()
    assert Masker(again, tmp_path)(black).shape == (6, 8)
    assert again.seen == 0


def test_a_real_sam_gives_masks_of_the_pictures_size():
    torch.manual_seed(0)
    config = SamConfig(image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, prompt_embed_dim=16, decoder_depth=1, decoder_mlp_dim=16)
    mask = Masker(SamMasker(build_sam(config)))(random_picture(2, (40, 30)))
    assert mask.shape == (30, 40) and mask.dtype == bool


def test_a_missing_segmenter_is_named():
    with pytest.raises(FileNotFoundError, match="no/such/sam.pth"):
        Masker.from_pretrained("no/such/sam.pth")
