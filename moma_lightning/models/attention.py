"""The attention processor with MoMA's two additions (paper Eq. 3 and section 3.2), free of parameters and of state.

Everything it adds comes in through `cross_attention_kwargs={"conditioning": ...}`: keys and values made once by
`MoMAAdapter`, masks, and beta. Without conditioning it computes what diffusers' AttnProcessor2_0 computes, bit for bit.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moma_lightning.models.masks import MaskPyramid, kept_positions

KeyValue = tuple[Float[Tensor, "batch positions channels"], Float[Tensor, "batch positions channels"]]


class SubjectKeys(NamedTuple):
    """What the queries of one layer are attended to: K' and V' at the positions that M_ref keeps, the bias log(M_ref) there, and lambda.

    The other positions have no weight in Eq. 3's softmax, so leaving them out is exact. lambda is 0 where M_ref keeps nothing.
    """

    key: Float[Tensor, "subjects kept channels"]
    value: Float[Tensor, "subjects kept channels"]
    bias: Float[Tensor, "subjects 1 1 kept"]
    lambda_: Float[Tensor, "subjects 1 1"]


@dataclass
class SubjectConditioning:
    """The second term of Eq. 3: lambda * beta * M_gen . Attn(Q, K', V', key mask M_ref).

    keys: of each self-attention layer, for each row of the batch a subject of its own, or one for all rows.
    generated_mask: M_gen, or None while it is unknown (the first step): no masking then.
    beta: one strength, or one a row of the batch.
    """

    keys: dict[int, SubjectKeys]
    generated_mask: MaskPyramid | None = None
    beta: float | Float[Tensor, "batch 1"] = 1.0
    _queries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def queries(
        self, query: Float[Tensor, "batch heads positions dim"], subjects: int
    ) -> tuple[Int[Tensor, " all_kept"], Float[Tensor, "subjects kept 1"]]:
        """Where the term is not zero, counted through all rows, and beta * M_gen there; rows that share a subject are one long row.

        Found once for all layers of a resolution: on a GPU the count is waited for.
        """
        batch, _, positions, _ = query.shape
        if positions not in self._queries:
            mask = torch.ones((), device=query.device) if self.generated_mask is None else self.generated_mask.weight(positions)
            weight = (mask * self.beta).expand(batch, positions).reshape(subjects, -1)
            index = kept_positions(weight)
            first = torch.arange(subjects, device=index.device)[:, None] * weight.shape[1]
            self._queries[positions] = (index + first).flatten(), weight.gather(1, index)[..., None]
        return self._queries[positions]


@dataclass
class ContextConditioning:
    """Decoupled cross-attention to the image tokens (IP-Adapter): scale * Attn(Q, K_ip, V_ip), optionally times M_gen."""

    key_values: dict[int, KeyValue]
    scale: float = 1.0
    generated_mask: MaskPyramid | None = None


@dataclass
class Recorder:
    """What a forward pass is asked to write down, by layer; writing a layer twice (recomputation) changes nothing.

    reference: the self-attention layers' inputs [batch, positions, channels] and their frozen keys and values.
    label_tokens: weights [batch, text length] that pick the label's tokens; when given, `label_maps` receives each
    cross-attention layer's probability of the label, summed over its tokens and averaged over heads [batch, positions].
    """

    keep_reference: bool = False
    label_tokens: Float[Tensor, "batch text"] | None = None
    reference: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    label_maps: dict[int, Float[Tensor, "batch positions"]] = field(default_factory=dict)


@dataclass
class Conditioning:
    """The one entry MoMA adds to `cross_attention_kwargs`."""

    subject: SubjectConditioning | None = None
    context: ContextConditioning | None = None
    recorder: Recorder | None = None


class MoMAAttnProcessor:
    """Attention layer number `layer` of the UNet (its position in `unet.attn_processors`; even = self, odd = cross)."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch positions channels"],
        encoder_hidden_states: Float[Tensor, "batch text dim"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Float[Tensor, "batch positions channels"]:
        is_self = encoder_hidden_states is None
        source = hidden_states if is_self else encoder_hidden_states
        key, value = attn.to_k(source), attn.to_v(source)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], len(key)).unflatten(0, (len(key), attn.heads))
        output = attend(query, key, value, attn.heads, attention_mask)
        if conditioning is not None:
            if conditioning.recorder is not None:
                self._record(conditioning.recorder, attn, query, hidden_states, key, value, is_self)
            if is_self and conditioning.subject is not None:
                output = add_subject_attention(output, conditioning.subject, self.layer, query, attn.heads)
            if not is_self and conditioning.context is not None:
                output = output + context_attention(conditioning.context, self.layer, query, attn.heads)
        output = attn.to_out[1](attn.to_out[0](output.to(query.dtype)))
        return output / attn.rescale_output_factor

    def _record(self, recorder, attn, query, hidden_states, key, value, is_self):
        if is_self and recorder.keep_reference:
            recorder.reference[self.layer] = (hidden_states, key, value)
        if not is_self and recorder.label_tokens is not None:
            recorder.label_maps[self.layer] = label_map(query, key, attn.heads, attn.scale, recorder.label_tokens)


def split_heads(x: Float[Tensor, "batch positions channels"], heads: int) -> Float[Tensor, "batch heads positions dim"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Float[Tensor, "batch positions channels"]:
    """softmax(Q K^T / sqrt(d) + bias) V with heads split from the keys and values and merged in the output."""
    output = F.scaled_dot_product_attention(query, split_heads(key, heads), split_heads(value, heads), attn_mask=bias)
    return output.transpose(1, 2).flatten(2)


def add_subject_attention(
    output: Float[Tensor, "batch positions channels"], subject: SubjectConditioning, layer: int, query: Float[Tensor, "batch heads positions dim"], heads: int
) -> Float[Tensor, "batch positions channels"]:
    """`output` plus the second term of Eq. 3 for one layer, computed from kept queries to kept keys only: all else is zero.

    Raises ValueError where the subjects are neither one nor one a row.
    """
    key, value, bias, lambda_ = subject.keys[layer]
    if len(key) not in (1, len(query)):
        raise ValueError(f"{len(key)} subjects for a batch of {len(query)}: give one, or one a row")
    index, weight = subject.queries(query, len(key))
    asked = query.transpose(1, 2).reshape(-1, output.shape[-1]).index_select(0, index).view(len(key), -1, output.shape[-1])
    added = attend(split_heads(asked, heads), key.to(query.dtype), value.to(query.dtype), heads, bias.to(query.dtype)) * (lambda_ * weight)
    rows, added = output.flatten(0, 1), added.flatten(0, 1).to(output.dtype)
    # A backward pass needs the output as it was.
    return (rows.index_add(0, index, added) if torch.is_grad_enabled() else rows.index_add_(0, index, added)).view_as(output)


def context_attention(context: ContextConditioning, layer: int, query: Tensor, heads: int) -> Float[Tensor, "batch positions channels"]:
    key, value = (x.to(query.dtype) for x in context.key_values[layer])
    output = attend(query, key, value, heads)
    if context.scale != 1:
        output = context.scale * output
    if context.generated_mask is not None:
        output = output * context.generated_mask.weight(query.shape[2], output.dtype)[..., None]
    return output


def label_map(query: Tensor, key: Tensor, heads: int, scale: float, label_tokens: Float[Tensor, "rows text"]) -> Float[Tensor, "rows positions"]:
    """Attention probability of the label's tokens, summed over them, averaged over heads; for the last `rows` of the batch.

    Under classifier-free guidance the conditional half comes last; its rows are the ones with a label.
    """
    rows = len(label_tokens)
    scores = (query[-rows:] * scale) @ split_heads(key[-rows:], heads).transpose(-1, -2)
    probability = scores.softmax(-1, dtype=torch.float32).mean(1)
    return (probability @ label_tokens[..., None]).squeeze(-1)
