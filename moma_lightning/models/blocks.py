"""The repeated layers of transformers' models."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of every list called `layers` or `blocks`."""
    lists = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and name.split(".")[-1] in ("layers", "blocks")]
    return [block for members in lists for block in members]
