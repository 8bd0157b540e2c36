"""A reference's features are kept at the subject's positions, and K' and V' made of these are those made of the whole."""

import pytest
import torch

from moma_lightning.models.adapter import MoMAAdapter
from moma_lightning.models.kept_reference import kept_reference, read_reference
from moma_lightning.models.masks import MaskPyramid
from tests.tiny import EMBED_DIM, tiny_base


@pytest.fixture(params=["released", "paper"])
def adapter(request) -> MoMAAdapter:
    torch.manual_seed(0)
    adapter = MoMAAdapter.for_unet(tiny_base().unet, EMBED_DIM, variant=request.param).requires_grad_(False)
    for layer in adapter.subject.values():
        layer.lambda_.fill_(0.5)
        layer.to_k.weight.normal_()
    return adapter


def reference_of(adapter: MoMAAdapter, rows: int):
    """Layers of two resolutions in turns."""
    found = {}
    for n, (i, layer) in enumerate(adapter.subject.items()):
        key, value = torch.randn(2, rows, (24, 6)[n % 2], layer.to_k.in_features)
        found[int(i)] = (key, key if adapter.variant == "paper" else value)
    return found


@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 1, 2], [2, 2]])
def test_there_and_back(adapter, rows):
    """Masks that keep everything, some and nothing, with the zeros behind them and without."""
    mask = torch.zeros(3, 1, 4, 6)
    mask[0], mask[1, 0, 1:3, 2:5] = 1, 1
    pyramid, reference = MaskPyramid(mask[rows], (4, 6)), reference_of(adapter, len(rows))
    features = kept_reference(reference, pyramid)
    assert len(features) == len(reference) * (1 if adapter.variant == "paper" else 2)
    expected = adapter.subject_conditioning(reference, pyramid).keys
    filled = {name: feature[:, : int(feature.any(-1).sum(1).max())] for name, feature in features.items()}
    for given in (features, filled, {name: feature.half() for name, feature in filled.items()}):
        keys = adapter.subject_conditioning(read_reference(given, pyramid, adapter), pyramid).keys
        tolerance = {"atol": 2e-2, "rtol": 1e-2} if next(iter(given.values())).dtype == torch.float16 else {"atol": 1e-6, "rtol": 1e-6}
        for i, made in expected.items():
            kept = torch.isfinite(made.bias)[:, 0, 0, :, None] & (mask[rows].flatten(1).sum(1) > 0)[:, None, None]
            for part, whole in zip(keys[i][:2], made[:2], strict=True):
                torch.testing.assert_close(part * kept, whole * kept, **tolerance)
            assert torch.equal(keys[i].bias, made.bias) and torch.equal(keys[i].value[~kept.any(1)[:, 0]], made.value[~kept.any(1)[:, 0]] * 0)


def test_a_cache_without_them_or_of_the_other_variant_is_told(adapter):
    pyramid = MaskPyramid(torch.ones(1, 1, 4, 6), (4, 6))
    features = kept_reference(reference_of(adapter, 1), pyramid)
    other = MoMAAdapter.for_unet(tiny_base().unet, EMBED_DIM, variant="paper" if adapter.variant == "released" else "released")
    for given, reader in (({"moments": torch.zeros(1)}, adapter), (features, other)):
        with pytest.raises(ValueError, match=f"holds no features of a reference for the {reader.variant} variant: make it again"):
            read_reference(given, pyramid, reader)
