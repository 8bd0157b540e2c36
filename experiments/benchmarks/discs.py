"""Masks of a known size."""

import torch
from torch import Tensor


def disc(share: float, size: int) -> Tensor:
    """The `share` of [1, 1, size, size] that lies nearest to the middle."""
    across = torch.arange(size) - (size - 1) / 2
    distance = (across[:, None] ** 2 + across[None] ** 2).flatten()
    mask = torch.zeros(size * size)
    mask[distance.argsort(stable=True)[: round(share * size * size)]] = 1
    return mask.view(1, 1, size, size)
