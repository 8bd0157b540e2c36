"""M_gen from the label's cross-attention maps (section 3.2, Figure 3 b; thresholds from the authors' released code)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moma_lightning.models.masks import layer_size


def min_max(maps: Float[Tensor, "batch maps h w"]) -> Float[Tensor, "batch maps h w"]:
    """Each map scaled to [0, 1]; a constant one becomes 0."""
    low, high = (x[..., None, None] for x in maps.flatten(2).aminmax(dim=2))
    return (maps - low) / (high - low).clamp(min=1e-8)


def average_maps(label_maps: Mapping[int, Float[Tensor, "batch *heads positions"]], latent_size: tuple[int, int]) -> Float[Tensor, "batch 1 h w"]:
    """Per-layer maps (of each head, or averaged over heads), each scaled to [0, 1], resized to the latents' size and averaged, then scaled again.

    Resizing is linear, so maps of one size are averaged before it.
    """
    total: Tensor | float = 0.0
    for positions in sorted({m.shape[-1] for m in label_maps.values()}):
        maps = [m for m in label_maps.values() if m.shape[-1] == positions]
        if len({m.shape for m in maps}) > 1:  # of other numbers of heads
            maps = [m.mean(1) if m.dim() == 3 else m for m in maps]
        alike = torch.stack(maps, 1)
        if alike.dim() == 4:
            alike = alike.mean(2)
        summed = min_max(alike.unflatten(2, layer_size(positions, *latent_size))).sum(1, keepdim=True)
        total = total + F.interpolate(summed, latent_size, mode="bilinear", align_corners=False)
    return min_max(total / len(label_maps))


def estimate_mask(
    label_maps: Mapping[int, Float[Tensor, "batch *heads positions"]], latent_size: tuple[int, int], threshold: float = 0.2
) -> Float[Tensor, "batch 1 h w"]:
    """M_gen(t) in [0, 1] at the latents' size: averaged maps, values <= threshold set to 0, scaled again, per sample."""
    maps = average_maps(label_maps, latent_size)
    return min_max(maps * (maps > threshold))


def find_label_tokens(
    input_ids: Int[Tensor, "batch text"], label_ids: Sequence[Sequence[int]], prompts: Sequence[str], label: str | Sequence[str]
) -> Float[Tensor, "batch text"]:
    """1 at the label's tokens, 0 elsewhere: every occurrence of any of the spellings `label_ids` (singular, plural).

    Raises ValueError naming the prompt in which no spelling occurs: its M_gen could not be estimated.
    """
    weights = torch.zeros(input_ids.shape, device=input_ids.device)
    for row, ids in enumerate(input_ids.tolist()):
        for spelling in label_ids:
            for start in range(len(ids) - len(spelling) + 1):
                if ids[start : start + len(spelling)] == list(spelling):
                    weights[row, start : start + len(spelling)] = 1
        if not weights[row].any():
            raise ValueError(f"the subject word {label!r} does not occur in the prompt {prompts[row]!r}, or beyond what the tokenizer reads: name it there")
    return weights
