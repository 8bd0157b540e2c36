"""M_gen from the label's cross-attention maps (section 3.2, Figure 3 b; thresholds from the authors' released code)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moma_lightning.models.masks import layer_size


def min_max(maps: Float[Tensor, "*batch positions"]) -> Float[Tensor, "*batch positions"]:
    """Each map scaled to [0, 1]; a constant one becomes 0."""
    low, high = maps.aminmax(dim=-1, keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-8)


def average_maps(label_maps: Mapping[int, Float[Tensor, "batch *heads positions"]], latent_size: tuple[int, int]) -> Float[Tensor, "batch 1 h w"]:
    """Per-layer maps (of each head, or averaged over heads), each scaled to [0, 1], resized to the latents' size and averaged, then scaled again.

    Resizing is linear, so maps of one size are added before it.
    """
    of_size: dict[int, list[Tensor]] = {}
    for label_map in label_maps.values():
        of_size.setdefault(label_map.shape[-1], []).append(label_map)
    summed = []
    for positions, maps in of_size.items():
        if len({m.shape for m in maps}) > 1:  # of other numbers of heads
            maps = [m.mean(1) if m.dim() == 3 else m for m in maps]
        alike = torch.stack(maps, 1)
        if alike.dim() == 4:
            alike = alike.mean(2)
        of_one_size = min_max(alike).sum(1, keepdim=True).unflatten(2, layer_size(positions, *latent_size))
        summed.append(of_one_size if of_one_size.shape[-2:] == latent_size else F.interpolate(of_one_size, latent_size, mode="bilinear"))
    return min_max(sum(summed[1:], summed[0]).flatten(2) / len(label_maps)).unflatten(2, latent_size)


def estimate_mask(
    label_maps: Mapping[int, Float[Tensor, "batch *heads positions"]], latent_size: tuple[int, int], threshold: float = 0.2
) -> Float[Tensor, "batch 1 h w"]:
    """M_gen(t) in [0, 1] at the latents' size: averaged maps, values <= threshold set to 0, per sample.

    The released code scales once more. Here that would change nothing: where a map is not constant, it has a 0 and a 1, and both stay.
    """
    return F.threshold(average_maps(label_maps, latent_size), threshold, 0.0)


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
