"""MoMA's attention with every matrix written out: the baseline that the project's processor is timed and tested against.

The same formulas as `moma_lightning.models.attention`, in the shape of the authors' released code: softmax matrices of all queries and
all keys, K' and V' doubled for guidance, the key mask as an additive -inf.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from moma_lightning.models import attention


@dataclass
class Explicit:
    """keys: layer -> (K', V') at every position, doubled; factors: layer -> lambda * beta. m_ref, m_gen: number of positions -> weights.

    label_tokens [rows, text]: of the conditional half, which comes last. maps: receives the label's probability, by layer.
    """

    keys: dict[int, tuple[Tensor, Tensor]]
    factors: dict[int, Tensor]
    context: dict[int, tuple[Tensor, Tensor]]
    m_ref: dict[int, Tensor]
    m_gen: dict[int, Tensor]
    label_tokens: Tensor
    maps: dict[int, Tensor] = field(default_factory=dict)


class ExplicitProcessor:
    """Attention layer number `layer` of the UNet."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask=None, temb=None,
                 explicit: Explicit | None = None) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (split_heads(x, attn.heads) for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)))
        probability = probabilities(query, key)
        output = merge(probability, value)
        if explicit is not None:
            generated = explicit.m_gen[query.shape[2]][..., None]
            if encoder_hidden_states is None:
                k, v = (split_heads(x, attn.heads) for x in explicit.keys[self.layer])
                added = attend(query, k, v, explicit.m_ref[k.shape[2]].log()[:, None, None])
                output = output + explicit.factors[self.layer] * generated * added
            else:
                output = output + generated * attend(query, *(split_heads(x, attn.heads) for x in explicit.context[self.layer]))
                rows = len(explicit.label_tokens)
                explicit.maps[self.layer] = (probability[-rows:].mean(1) * explicit.label_tokens[:, None]).sum(-1)
        return attn.to_out[0](output)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def probabilities(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias), [batch, heads, queries, keys]."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1)


def merge(probability: Tensor, value: Tensor) -> Tensor:
    return (probability @ value).transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `moma_lightning.models.attention.attend`, which has a kernel of its own for it."""
    return merge(probabilities(query, key, bias), value)


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """The project's processor in the released code's shape, for whole samplings: every matrix written out, the text's keys and values made in each step.

    Every layer ends with dropout and a division, as with diffusers' processors. The label's map is read off the text's matrix. To the baseline's
    advantage the subject attention stays between kept positions, the subject's and the image tokens' keys and values are made once a call, and
    diffusers finds the processor's parameters at once.
    """
    kept, last = attention.Conditioning.once, []

    def once(self, layer: int, name: str, make: Callable[[], Any]) -> Any:
        return make() if name == "text" else kept(self, layer, name, make)

    def noted(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        last[:] = [probabilities(query, key, bias)]
        return merge(last[0], value)

    def label_map(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (last[0][-len(key) :].sum(1) * value[:, :1, :, 0]).sum(-1)  # the layer's attention to the text has just been made

    def projected(attn: Attention, output: Tensor) -> Tensor:
        return attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor

    changed = {"projected": projected, "attend": noted, "label_map": label_map, "by_columns": lambda query, keys: False}
    with mock.patch.multiple(attention, **changed), mock.patch.object(attention.Conditioning, "once", once), \
            mock.patch.object(attention.kernels, "fit", return_value=False):
        yield


def install(unet: UNet2DConditionModel) -> None:
    unet.set_attn_processor({name: ExplicitProcessor(i) for i, name in enumerate(unet.attn_processors)})


def conditioning(adapter, reference: dict, context, m_ref, m_gen, label_tokens: Tensor) -> Explicit:
    """All of it from the same parts as `SubjectGuide` has, for a guided batch of two; beta is 1. m_ref, m_gen: MaskPyramids."""
    keys = {int(i): tuple(torch.cat([x] * 2) for x in (layer.to_k(reference[int(i)][0]), layer.to_v(reference[int(i)][1])))
            for i, layer in adapter.subject.items()}
    lengths, dtype = {k.shape[1] for k, _ in keys.values()}, next(adapter.parameters()).dtype
    factors = {int(i): layer.lambda_ for i, layer in adapter.subject.items()}
    return Explicit(keys, factors, context.key_values, {n: m_ref.weight(n, dtype) for n in lengths}, {n: m_gen.weight(n, dtype) for n in lengths}, label_tokens)
