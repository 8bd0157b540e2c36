"""Cross-attention on a CPU where the label's map is asked for: text, map and image tokens of one small matrix (docs/performance.md)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moma_lightning.models import kernels

#: Of so many probabilities or fewer (4 MB) a matrix is written out on a CPU; a larger one is memory that the system hands out and clears anew each time.
FEW_PROBABILITIES = 2**20


def by_columns(query: Float[Tensor, "batch positions channels"], keys: int) -> bool:
    """Whether `Columns` serves, for so many keys of all heads: on a CPU, where it takes .3 to .9 of three attentions' time.

    MOMA_KERNELS=0 leaves it out too.
    """
    few = query.shape[0] * query.shape[1] * keys <= FEW_PROBABILITIES
    return query.device.type == "cpu" and few and kernels.cpu_multiplies(query.dtype) and kernels.wanted()


class Columns(NamedTuple):
    """The text, the label's map and the image tokens, read off one matrix of probabilities with a row a key.

    A position's probabilities are a column then, and all positions' are exponentiated and summed side by side, in the order they have in memory.

    key: the text's and the image tokens', over sqrt(dim). label: 1 / heads at the label's tokens; under guidance of the conditional, last rows alone.
    """

    key: Float[Tensor, "batch heads keys dim"]
    value: Float[Tensor, "batch heads text dim"]
    label: Float[Tensor, "rows 1 1 text"]
    image_value: Float[Tensor, "batch heads tokens dim"] | None

    @classmethod
    def of(cls, text: Sequence[Tensor], label_tokens: Float[Tensor, "rows text"], image: Sequence[Tensor] | None) -> "Columns":
        """text, image: keys and values [batch, heads, keys, dim]."""
        (key, value), keys = text, [text[0]] if image is None else [text[0], image[0]]
        label = (label_tokens[:, None, None] / key.shape[1]).to(value.dtype)
        return cls(torch.cat(keys, 2) / key.shape[-1] ** 0.5, value.contiguous(), label, None if image is None else image[1].contiguous())

    def attend(
        self, query: Float[Tensor, "batch heads positions dim"]
    ) -> tuple[Float[Tensor, "batch positions channels"], Float[Tensor, "rows positions"], Float[Tensor, "batch positions channels"] | None]:
        """`attend` to the text, `label_map`, and `attend` to the image tokens (None without them)."""
        scores, tokens = self.key @ query.transpose(2, 3), self.value.shape[2]
        probability = scores[:, :, :tokens].softmax(2)
        label_map = (self.label @ probability[-len(self.label) :]).sum((1, 2), dtype=torch.float32)
        added = None if self.image_value is None else merged(scores[:, :, tokens:].softmax(2), self.image_value)
        return merged(probability, self.value), label_map, added


def merged(probability: Float[Tensor, "batch heads keys positions"], value: Float[Tensor, "batch heads keys dim"]) -> Float[Tensor, "batch positions channels"]:
    return (probability.transpose(2, 3) @ value).transpose(1, 2).flatten(2)
