"""The attention processor with MoMA's two additions (paper Eq. 3 and section 3.2), free of parameters and of state.

Everything it adds comes in through `cross_attention_kwargs={"conditioning": ...}`: keys and values made once by
`MoMAAdapter`, masks, beta, and a place for what the steps of a sampling share. Without conditioning it computes what diffusers'
AttnProcessor2_0 computes, bit for bit.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moma_lightning.models.masks import MaskPyramid, keeps_all, kept_positions

KeyValue = tuple[Float[Tensor, "batch positions channels"], Float[Tensor, "batch positions channels"]]


class SubjectKeys(NamedTuple):
    """What the queries of one layer are attended to: K' and lambda V' at the positions that M_ref keeps, and the bias log(M_ref) there.

    The other positions have no weight in Eq. 3's softmax, so leaving them out is exact; lambda V' is 0 where M_ref keeps nothing.
    """

    key: Float[Tensor, "subjects kept channels"]
    value: Float[Tensor, "subjects kept channels"]
    bias: Float[Tensor, "subjects 1 1 kept"]

    def split(self, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and bias as `attend` takes them."""
        return split_heads(self.key.to(dtype), heads), split_heads(self.value.to(dtype), heads), self.bias.to(dtype)


@dataclass
class SubjectConditioning:
    """The second term of Eq. 3: lambda * beta * M_gen . Attn(Q, K', V', key mask M_ref).

    keys: of each self-attention layer, for each row of the batch a subject of its own, or one for all rows.
    generated_mask: M_gen, or None while it is unknown (the first step): no masking then.
    beta: one strength, or one a row of the batch.
    resolutions: positions of the layers to come, where they are known: what the first layer asks for is found for all of them, since a GPU is
        waited for, and would run dry at each resolution anew.
    """

    keys: dict[int, SubjectKeys]
    generated_mask: MaskPyramid | None = None
    beta: float | Float[Tensor, "batch 1"] = 1.0
    resolutions: Collection[int] = ()
    _queries: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def queries(self, rows: int, positions: int, subjects: int) -> tuple[Int[Tensor, " all_kept"] | None, Float[Tensor, "subjects kept 1"]]:
        """Where the term is not zero, counted through all rows, and beta * M_gen there; rows that share a subject are one long row.

        None: everywhere, where `keeps_all`. Found once for all layers of a resolution.
        """
        if positions not in self._queries:
            self._queries |= {each: self._find(rows, each, subjects) for each in {positions, *self.resolutions} - self._queries.keys()}
        return self._queries[positions]

    def _find(self, rows: int, positions: int, subjects: int) -> tuple[Tensor | None, Tensor]:
        key = next(iter(self.keys.values())).key
        mask = torch.ones((), device=key.device) if self.generated_mask is None else self.generated_mask.weight(positions)
        weight = (mask * self.beta).expand(rows, positions).reshape(subjects, -1)
        if keeps_all(weight):
            return None, weight[..., None].to(key.dtype)
        index = kept_positions(weight)
        kept = weight.gather(1, index)[..., None].to(key.dtype)
        if subjects > 1:
            index = index + torch.arange(subjects, device=index.device)[:, None] * weight.shape[1]
        return index.flatten(), kept


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
    """The one entry MoMA adds to `cross_attention_kwargs`.

    made: what the steps of one sampling share (the text's, the subject's and the image tokens' keys and values, split into heads, and the
    label's values): the first forward pass writes it down, the others read it. None: made in each pass, as in training, where all of it
    changes. So it is under torch.compile, which would compile the UNet once more for a pass that writes.
    """

    subject: SubjectConditioning | None = None
    context: ContextConditioning | None = None
    recorder: Recorder | None = None
    made: dict[tuple[int, str], Any] | None = None

    def once(self, layer: int, name: str, make: Callable[[], Any]) -> Any:
        if self.made is None or torch.compiler.is_compiling():
            return make()
        if (layer, name) not in self.made:
            self.made[layer, name] = make()
        return self.made[layer, name]


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
        given = conditioning or Conditioning()
        asked = attn.to_q(hidden_states)
        query = split_heads(asked, attn.heads)
        if encoder_hidden_states is None:
            key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
            if given.recorder is not None and given.recorder.keep_reference:
                given.recorder.reference[self.layer] = (hidden_states, key, value)
            key, value = split_heads(key, attn.heads), split_heads(value, attn.heads)
        else:
            key, value = given.once(self.layer, "text", lambda: tuple(split_heads(x(encoder_hidden_states), attn.heads) for x in (attn.to_k, attn.to_v)))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], len(key)).unflatten(0, (len(key), attn.heads))
        output = attend(query, key, value, attention_mask)
        if encoder_hidden_states is not None:
            output = self._with_image_tokens(output, given, query, key)
        elif given.subject is not None:
            keys = given.subject.keys[self.layer]
            output = add_subject_attention(output, given.subject, asked, *given.once(self.layer, "subject", lambda: keys.split(attn.heads, query.dtype)))
        output = attn.to_out[1](attn.to_out[0](output.to(query.dtype)))
        return output / attn.rescale_output_factor

    def _with_image_tokens(self, output: Tensor, given: Conditioning, query: Tensor, key: Tensor) -> Tensor:
        """A cross-attention layer's output with the context attention added; the label's map is written down."""
        recorder, context = given.recorder, given.context
        if recorder is not None and recorder.label_tokens is not None:
            labels = recorder.label_tokens
            recorder.label_maps[self.layer] = label_map(query, *given.once(self.layer, "label", lambda: label_key_value(key, labels)))
        if context is None:
            return output
        image = given.once(self.layer, "context", lambda: tuple(split_heads(x.to(query.dtype), query.shape[1]) for x in context.key_values[self.layer]))
        return add_context_attention(output, context, query, *image)


def split_heads(x: Float[Tensor, "batch positions channels"], heads: int) -> Float[Tensor, "batch heads positions dim"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(
    query: Float[Tensor, "batch heads positions dim"],
    key: Float[Tensor, "batch heads keys dim"],
    value: Float[Tensor, "batch heads keys dim"],
    bias: Tensor | None = None,
) -> Float[Tensor, "batch positions channels"]:
    """softmax(Q K^T / sqrt(d) + bias) V, the heads side by side in the output."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)


def add_subject_attention(
    output: Float[Tensor, "batch positions channels"],
    subject: SubjectConditioning,
    query: Float[Tensor, "batch positions channels"],
    key: Float[Tensor, "subjects heads kept dim"],
    value: Float[Tensor, "subjects heads kept dim"],
    bias: Float[Tensor, "subjects 1 1 kept"],
) -> Float[Tensor, "batch positions channels"]:
    """`output` plus the second term of Eq. 3 for one layer, computed from kept queries to kept keys only: all else is zero.

    Raises ValueError where the subjects are neither one nor one a row.
    """
    if len(key) not in (1, len(query)):
        raise ValueError(f"{len(key)} subjects for a batch of {len(query)}: give one, or one a row")
    index, weight = subject.queries(len(query), query.shape[1], len(key))
    asked = query if index is None else query.flatten(0, 1).index_select(0, index)
    added = (attend(split_heads(asked.reshape(len(key), -1, query.shape[2]), key.shape[1]), key, value, bias) * weight).to(output.dtype)
    if index is None:
        return output + added.view_as(output)
    rows, added = output.flatten(0, 1), added.flatten(0, 1)
    # A backward pass needs the output as it was.
    return (rows.index_add(0, index, added) if torch.is_grad_enabled() else rows.index_add_(0, index, added)).view_as(output)


def add_context_attention(
    output: Float[Tensor, "batch positions channels"],
    context: ContextConditioning,
    query: Float[Tensor, "batch heads positions dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
) -> Float[Tensor, "batch positions channels"]:
    added = attend(query, key, value)
    if context.generated_mask is None:  # in the operations of diffusers' IP-Adapter, so that the bits are its own
        return output + (added if context.scale == 1 else context.scale * added)
    return output.addcmul(added, context.generated_mask.weight(query.shape[2], output.dtype)[..., None], value=context.scale)


def label_key_value(
    key: Float[Tensor, "batch heads text dim"], label_tokens: Float[Tensor, "rows text"]
) -> tuple[Float[Tensor, "rows heads text dim"], Float[Tensor, "rows heads text dim"]]:
    """What `label_map` reads: the text's keys, and values that are 1 at the label's tokens, in the first channel.

    Under classifier-free guidance the conditional half comes last: of it are the `rows` with a label.
    """
    key = key[-len(label_tokens) :]
    value = torch.zeros_like(key)
    value[..., 0] = label_tokens[:, None]
    return key, value


def label_map(
    query: Float[Tensor, "batch heads positions dim"], key: Float[Tensor, "rows heads text dim"], value: Float[Tensor, "rows heads text dim"]
) -> Float[Tensor, "rows positions"]:
    """Attention probability of the label's tokens, summed over them, averaged over heads; for the last `rows` of the batch.

    By the kernel that attends to the text: the matrix of probabilities, which takes a GPU three to six times as long, is never there.
    """
    return F.scaled_dot_product_attention(query[-len(key) :], key, value)[..., 0].mean(1, dtype=torch.float32)
