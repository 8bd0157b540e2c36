"""A reference's features are kept at the subject's positions and come back to their places."""

import pytest
import torch

from moma_lightning.models.kept_reference import kept_reference, whole_reference
from moma_lightning.models.masks import MaskPyramid


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("same", [False, True])
def test_there_and_back(rows, same):
    """Masks that keep everything, some and nothing; layers of two resolutions; one tensor where K' and V' are made of the same."""
    mask = torch.zeros(3, 1, 4, 6)
    mask[0], mask[1, 0, 1:3, 2:5] = 1, 1
    pyramid = MaskPyramid(mask[:rows], (4, 6))
    reference = {i: tuple(torch.randn(2, rows, n, 5)) for i, n in ((2, 24), (4, 6))}
    if same:
        reference = {i: (key, key) for i, (key, _) in reference.items()}
    features = kept_reference(reference, pyramid)
    assert len(features) == (2 if same else 4)
    counts = {name: int(feature.any(-1).sum(1).max()) for name, feature in features.items()}
    for given in (features, {name: feature[:, : counts[name]] for name, feature in features.items()}):
        whole = whole_reference(given, pyramid)
        for i, pair in reference.items():
            for found, x in zip(whole[i], pair, strict=True):
                assert torch.equal(found, x * (pyramid.weight(x.shape[1]) > 0)[..., None])


def test_a_cache_without_them_is_told():
    with pytest.raises(ValueError, match="holds no features of a reference: make it again with the option"):
        whole_reference({"moments": torch.zeros(1)}, MaskPyramid(torch.ones(1, 1, 4, 4), (4, 4)))
