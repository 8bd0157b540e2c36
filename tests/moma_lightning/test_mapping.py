import numpy as np
import torch

from moma_lightning.models.mapping import Mapping


def test_is_the_swiglu_formula():
    torch.manual_seed(0)
    mapping = Mapping(6, 4)
    x = torch.randn(3, 5, 6)
    gate, up, down = (p.detach().numpy().astype(np.float64) for p in mapping.parameters())
    g = np.einsum("oi,nti->nto", gate, x.numpy())
    expected = np.einsum("oi,nti->nto", down, g / (1 + np.exp(-g)) * np.einsum("oi,nti->nto", up, x.numpy()))
    np.testing.assert_allclose(mapping(x).detach().numpy(), expected, atol=1e-6)


def test_has_the_released_layout():
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Mapping(4096, 1024).named_parameters()}
    assert shapes == {"gate_proj.weight": [1024, 4096], "up_proj.weight": [1024, 4096], "down_proj.weight": [1024, 1024]}
