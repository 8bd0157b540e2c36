"""Spatial masks at the attention layers' resolutions, and the foreground / background weights made of them."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F


def layer_size(sequence_length: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the layer with `sequence_length` positions, in a UNet over `height` x `width` latents.

    Every downsampler of a diffusers UNet halves and rounds up. Raises ValueError when no halving fits.
    """
    h, w = height, width
    while h * w > sequence_length and h * w > 1:
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    if h * w != sequence_length:
        raise ValueError(f"no halving of {height}x{width} latents has {sequence_length} positions")
    return h, w


def resize_mask(mask: Float[Tensor, "batch 1 height width"], size: tuple[int, int]) -> Float[Tensor, "batch 1 h w"]:
    """Coverage of each cell in [0, 1] (area average): a small subject keeps weight at any resolution."""
    if mask.shape[-2:] == size:
        return mask
    if all(new <= old for new, old in zip(size, mask.shape[-2:], strict=True)):
        return F.adaptive_avg_pool2d(mask, size)
    return F.interpolate(mask, size, mode="bilinear", align_corners=False)


def mask_weight(mask: Float[Tensor, "..."], strength: float) -> Float[Tensor, "..."]:
    """Weight 1 on the foreground and 1 - strength on the background: 1 is full masking, 0 none (Tab. 3)."""
    return mask if strength == 1 else 1 - strength * (1 - mask)


def keeps_all(weight: Tensor) -> bool:
    """Whether no position may be left out: under torch.compile, where each mask's shapes would compile anew, and for tensors without data (meta, fake)."""
    return torch.compiler.is_compiling() or weight.is_meta or isinstance(weight, FakeTensor)


def kept_positions(weight: Float[Tensor, "batch positions"]) -> Int[Tensor, "batch kept"]:
    """The positions of any weight, in order; all of them where `keeps_all`.

    `kept` is the fullest row's count, at least 1; other rows are filled up with positions of weight 0.
    """
    if keeps_all(weight):
        return torch.arange(weight.shape[1], device=weight.device).expand(weight.shape)
    if len(weight) == 1 and len(index := (weight[0] > 0).nonzero()):
        return index.T
    order, kept = kept_first(weight)
    return order[:, : max(1, int(kept.sum(1).max()))]


def kept_first(weight: Float[Tensor, "batch positions"]) -> tuple[Int[Tensor, "batch positions"], Bool[Tensor, "batch positions"]]:
    """All positions, those of any weight first and both in order, and which of them have weight."""
    kept = weight > 0
    order = kept.byte().argsort(dim=1, descending=True, stable=True)
    return order, kept.take_along_dim(order, 1)


def log_bias(weight: Float[Tensor, "batch keys"]) -> tuple[Float[Tensor, "batch 1 1 keys"], Float[Tensor, "batch 1 1"]]:
    """Additive key bias log(weight), and 1 where any key is left, else 0.

    Where no key is left the bias is 0 everywhere, so that the softmax stays finite and the second value silences it.
    """
    alive = (weight > 0).any(1, keepdim=True)
    bias = torch.where(alive, weight, torch.ones_like(weight)).log()
    return bias[:, None, None, :], alive[:, :, None].to(weight.dtype)


class MaskPyramid:
    """One mask seen at every layer's resolution, resized when first asked for."""

    def __init__(self, mask: Float[Tensor, "batch 1 height width"], latent_size: tuple[int, int], strength: float = 1.0):
        self.mask, self.latent_size, self.strength = mask, latent_size, strength
        self._levels: dict[tuple[int, torch.dtype], Tensor] = {}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def weight(self, sequence_length: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "batch positions"]:
        """Weights in [0, 1] for the layer with `sequence_length` positions."""
        level = sequence_length, dtype
        if level not in self._levels:
            self._levels[level] = self._resized(sequence_length) if dtype == torch.float32 else self.weight(sequence_length).to(dtype)
        return self._levels[level]

    def _resized(self, sequence_length: int) -> Float[Tensor, "batch positions"]:
        size = layer_size(sequence_length, *self.latent_size)
        return mask_weight(resize_mask(self.mask, size).flatten(1), self.strength)

    def kept(self, sequence_length: int) -> tuple[Int[Tensor, "batch kept"], Float[Tensor, "batch kept"]]:
        """`kept_positions` of the layer with `sequence_length` positions, and their weights."""
        if sequence_length not in self._kept:
            weight = self.weight(sequence_length)
            index = kept_positions(weight)
            self._kept[sequence_length] = index, weight.gather(1, index)
        return self._kept[sequence_length]
