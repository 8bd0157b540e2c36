"""A reference pass's features for a cache: at the positions alone that M_ref keeps, since Eq. 3 gives the others no weight."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from moma_lightning.batch import OF_THE_SUBJECT
from moma_lightning.models.adapter import Reference
from moma_lightning.models.masks import MaskPyramid, kept_first


def kept_reference(reference: Reference, mask: MaskPyramid) -> dict[str, Float[Tensor, "batch positions channels"]]:
    """By name: the kept positions' features in order, then zeros. A layer whose two are the same (the paper's variant) has one."""
    named, orders = {}, {key.shape[1]: kept_first(mask.weight(key.shape[1])) for key, _ in reference.values()}
    for layer, (key, value) in reference.items():
        positions = key.shape[1]
        order, kept = orders[positions]
        for part, x in {"key": key, **({} if value is key else {"value": value})}.items():
            named[f"{OF_THE_SUBJECT}{layer}.{positions}.{part}"] = x.take_along_dim(order[..., None], 1) * kept[..., None]
    return named


def whole_reference(features: Mapping[str, Tensor], mask: MaskPyramid) -> Reference:
    """Back at their places, with zeros at the others. features: of those named by `kept_reference` at least the kept positions.

    Raises ValueError where there are none.
    """
    found: dict[int, dict[str, Tensor]] = {}
    orders: dict[int, Tensor] = {}
    for name, kept in features.items():
        if name.startswith(OF_THE_SUBJECT):
            numbers, part = name.removeprefix(OF_THE_SUBJECT).rsplit(".", 1)
            layer, positions = map(int, numbers.split("."))
            if positions not in orders:
                orders[positions], _ = kept_first(mask.weight(positions))
            whole = torch.zeros(len(kept), positions, kept.shape[2], device=kept.device)
            found.setdefault(layer, {})[part] = whole.scatter_(1, orders[positions][:, : kept.shape[1], None].expand_as(kept), kept.float())
    if not found:
        raise ValueError("stage2.cache_reference is true, but the cache holds no features of a reference: make it again with the option, or leave it out")
    return {layer: (parts["key"], parts.get("value", parts["key"])) for layer, parts in found.items()}
