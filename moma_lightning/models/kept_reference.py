"""A reference pass's features for a cache: at the positions alone that M_ref keeps, since Eq. 3 gives the others no weight."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moma_lightning.batch import OF_THE_SUBJECT
from moma_lightning.models.adapter import KeptFeatures, MoMAAdapter, Reference
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


def read_reference(features: Mapping[str, Tensor], mask: MaskPyramid, adapter: MoMAAdapter) -> dict[int, KeptFeatures]:
    """As `MoMAAdapter.subject_conditioning` takes them, in the type of the adapter's weights. features: `kept_reference`'s, with or without the zeros.

    Raises ValueError where there are none, or those of the other variant.
    """
    dtype, named = next(adapter.subject.parameters()).dtype, {}
    for name, feature in features.items():
        if name.startswith(OF_THE_SUBJECT):
            numbers, part = name.removeprefix(OF_THE_SUBJECT).rsplit(".", 1)
            layer, positions = map(int, numbers.split("."))
            missing = mask.kept(positions)[0].shape[1] - feature.shape[1]  # of a batch without a subject: the one that `kept` has at least
            named[layer, part] = positions, F.pad(feature, (0, 0, 0, missing)).to(dtype)
    wanted = {(int(layer), part) for layer in adapter.subject for part in (("key",) if adapter.variant == "paper" else ("key", "value"))}
    if named.keys() != wanted:
        raise ValueError(f"stage2.cache_reference is true, but the cache holds no features of a reference for the {adapter.variant} variant: "
                         "make it again with both options, or leave this one out")
    found = {}
    for layer in {layer for layer, _ in wanted}:
        positions, key = named[layer, "key"]
        found[layer] = KeptFeatures(key, key if adapter.variant == "paper" else named[layer, "value"][1], positions)
    return found
