"""A transformer's last layer, without the MLP of positions that nobody reads.

Only attention brings positions together, so where an embedding is read at one position, the last layer's MLP is needed there
alone: what is read stays the same, to rounding. Of LLaVA-1.5-7B's language model that is 2 % of the work, of a ViT-S/16 5 %.
(LLM.int8 chooses what it keeps in 16 bits by all rows that it is given: there the last MLP rounds a little otherwise.)
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def only_first_read(layer: nn.Module | None) -> Iterator[None]:
    """Of a model that ends with `layer` only the first position (the CLS token) is read meanwhile; all others hold nothing of use. None changes nothing."""
    if layer is None:
        yield
        return
    hook = layer.mlp.register_forward_pre_hook(_first)
    try:
        yield
    finally:
        hook.remove()


def _first(mlp: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0][:, :1],)  # broadcast over the others by the residual sum


class ReadAt:
    """Lets the model that ends with `layer` take `read_at`, an index of positions [batch]: its output is right there, in row i at read_at[i].

    transformers hands keywords that a model does not know on to its layers' attention. They arrive there anew where activations
    are recomputed, which a hook of the layer itself would not see. Without `read_at` all positions are right.
    """

    def __init__(self, layer: nn.Module):
        self.places: Tensor | None = None
        layer.self_attn.register_forward_pre_hook(self.take, with_kwargs=True)
        layer.mlp.register_forward_pre_hook(self.gather)

    def take(self, attention: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.places = options.pop("read_at", None)
        return inputs, options

    def gather(self, mlp: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.places is None:
            return None
        rows = torch.arange(len(self.places), device=self.places.device)
        return (inputs[0][rows, self.places].unsqueeze(1),)
