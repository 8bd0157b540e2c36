"""The attention processor with MoMA's two additions (paper Eq. 3 and section 3.2), free of parameters and of state.

Everything it adds comes in through `cross_attention_kwargs={"conditioning": ...}`: keys and values made once by
`MoMAAdapter`, masks, beta, and a place for what the steps of a sampling share. Without conditioning it computes what diffusers'
AttnProcessor2_0 computes, bit for bit. On a GPU in 16 bits, without gradients, the kernels of `kernels.py` compute the same to rounding;
on a CPU `columns.py` does, where the label's map is asked for.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moma_lightning.models import kernels
from moma_lightning.models.columns import Columns, by_columns
from moma_lightning.models.masks import MaskPyramid, keeps_all, kept_positions

#: In sampling, so many or fewer are all computed, those of weight 0 too: picking the others out takes a CPU longer.
FEW_QUERIES = 256

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

    def of_one(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and bias of the one subject as `kernels.add_subject_attention_` takes them."""
        return self.key[0].to(dtype).contiguous(), self.value[0].to(dtype).contiguous(), self.bias.flatten().float()


@dataclass
class SubjectConditioning:
    """The second term of Eq. 3: lambda * beta * M_gen . Attn(Q, K', V', key mask M_ref).

    keys: of each self-attention layer, of one subject for all rows of the batch, or of several, for `rows_per_subject` of them side by side each.
    generated_mask: M_gen, or None while it is unknown (the first step): no masking then.
    beta: one strength, or one a row of the batch.
    resolutions: positions of the layers to come, where they are known: what the first layer asks for is found for all of them, since a GPU is
        waited for, and would run dry at each resolution anew.
    """

    keys: dict[int, SubjectKeys]
    generated_mask: MaskPyramid | None = None
    beta: float | Float[Tensor, "batch 1"] = 1.0
    resolutions: Collection[int] = ()
    rows_per_subject: int = 1
    _queries: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _places: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def queries(self, rows: int, positions: int, subjects: int) -> tuple[Int[Tensor, " all_kept"] | None, Float[Tensor, "subjects_or_rows kept 1"]]:
        """Where the term is not zero, counted through all rows, and beta * M_gen there; rows that share a subject are one long row.

        None: everywhere, where `keeps_all`, or in sampling where they are few; row by row then. Found once for all layers of a resolution.
        """
        if positions not in self._queries:
            self._queries |= {each: self._find(rows, each, subjects) for each in {positions, *self.resolutions} if each not in self._queries}
        return self._queries[positions]

    def places(self, rows: int, positions: int) -> tuple[Int[Tensor, " all_positions"], Float[Tensor, " all_positions"]]:
        """As `queries` has it for one subject, without waiting for the GPU: the places come first, -1 fills up, and the weight is every position's."""
        if positions not in self._places:
            weight = self._weight(rows, positions).flatten().contiguous()  # one number for all would be a view of it
            self._places[positions] = torch.nonzero_static(weight > 0, size=len(weight)).flatten(), weight
        return self._places[positions]

    def _weight(self, rows: int, positions: int) -> Float[Tensor, "rows positions"]:
        """beta * M_gen."""
        device = next(iter(self.keys.values())).key.device
        mask = torch.ones((), device=device) if self.generated_mask is None else self.generated_mask.weight(positions)
        return (mask * self.beta).expand(rows, positions)

    def _find(self, rows: int, positions: int, subjects: int) -> tuple[Tensor | None, Tensor]:
        dtype = next(iter(self.keys.values())).key.dtype
        weight = self._weight(rows, positions)
        if keeps_all(weight) or (weight.numel() <= FEW_QUERIES and not torch.is_grad_enabled()):
            return None, weight[..., None].to(dtype)
        weight = weight.reshape(subjects, -1)
        index = kept_positions(weight)
        kept = weight.gather(1, index)[..., None].to(dtype)
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
    cross-attention layer's probability of the label, summed over its tokens: [batch, positions], averaged over heads, or
    [batch, heads, positions] where a kernel made it, to be averaged for all layers at once.
    """

    keep_reference: bool = False
    label_tokens: Float[Tensor, "batch text"] | None = None
    reference: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    label_maps: dict[int, Float[Tensor, "batch *heads positions"]] = field(default_factory=dict)


@dataclass
class Conditioning:
    """The one entry MoMA adds to `cross_attention_kwargs`.

    made: what the steps of one sampling share (the text's, the subject's and the image tokens' keys and values, split into heads or as a kernel
    takes them, and the label's values): the first forward pass writes it down, the others read it. None: made in each pass, as in training,
    where all of it changes. So it is under torch.compile, which would compile the UNet once more for a pass that writes.
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
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            output = self._self_attention(attn, given, hidden_states, query, attention_mask)
        else:
            output = self._cross_attention(attn, given, encoder_hidden_states, query, attention_mask)
        return projected(attn, output.to(query.dtype))

    def _self_attention(self, attn: Attention, given: Conditioning, hidden_states: Tensor, query: Tensor, attention_mask: Tensor | None) -> Tensor:
        """With the subject attention added; what is asked of the reference is written down."""
        key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
        if given.recorder is not None and given.recorder.keep_reference:
            given.recorder.reference[self.layer] = (hidden_states, key, value)
        asked, key, value = (split_heads(x, attn.heads) for x in (query, key, value))
        output = attend(asked, key, value, as_bias(attn, attention_mask, key))
        if given.subject is None:
            return output
        keys = given.subject.keys[self.layer]
        if keys.key.shape[0] == 1 and kernels.fit(query, attn.heads):
            its_key, its_value, bias = given.once(self.layer, "subject, for a kernel", lambda: keys.of_one(query.dtype))
            places, weight = given.subject.places(*query.shape[:2])
            return kernels.add_subject_attention_(output, query, its_key, its_value, bias, places, weight, attn.heads)
        return add_subject_attention(output, given.subject, query, *given.once(self.layer, "subject", lambda: keys.split(attn.heads, query.dtype)))

    def _cross_attention(self, attn: Attention, given: Conditioning, text: Tensor, query: Tensor, attention_mask: Tensor | None) -> Tensor:
        """With the context attention added; the label's map is written down."""
        recorder, context = given.recorder, given.context
        labels = None if recorder is None else recorder.label_tokens
        if attention_mask is None and not (labels is None and context is None) and kernels.fit(query, attn.heads):
            return self._cross_attention_by_kernel(attn, given, text, query)

        def split(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(split_heads(x.to(query.dtype), attn.heads) for x in tensors)

        asked, added = split_heads(query, attn.heads), None
        if recorder is not None and labels is not None and attention_mask is None and by_columns(query, attn.heads * text.shape[1]):
            image = None if context is None else context.key_values[self.layer]
            columns = given.once(self.layer, "columns", lambda: Columns.of(split(attn.to_k(text), attn.to_v(text)), labels, image and split(*image)))
            output, recorder.label_maps[self.layer], added = columns.attend(asked)
        else:
            key, value = given.once(self.layer, "text", lambda: split(attn.to_k(text), attn.to_v(text)))
            output = attend(asked, key, value, as_bias(attn, attention_mask, key))
            if recorder is not None and labels is not None:
                recorder.label_maps[self.layer] = label_map(asked, *given.once(self.layer, "label", lambda: label_key_value(key, labels)))
            if context is not None:
                added = attend(asked, *given.once(self.layer, "context", lambda: split(*context.key_values[self.layer])))
        return output if context is None or added is None else add_context_attention(output, context, added)

    def _cross_attention_by_kernel(self, attn: Attention, given: Conditioning, text: Tensor, query: Tensor) -> Tensor:
        recorder, context = given.recorder, given.context
        key_value = given.once(self.layer, "text, for a kernel", lambda: (attn.to_k(text).contiguous(), attn.to_v(text).contiguous()))
        image, scale, weight = None, 1.0, None
        if context is not None:
            image = given.once(self.layer, "context, for a kernel", lambda: tuple(x.to(query.dtype).contiguous() for x in context.key_values[self.layer]))
            scale, weight = context.scale, None if context.generated_mask is None else context.generated_mask.weight(query.shape[1])
        labels = None if recorder is None else recorder.label_tokens
        output, label_maps = kernels.cross_attention(query, key_value, image, labels, attn.heads, scale, weight)
        if recorder is not None and label_maps is not None:
            recorder.label_maps[self.layer] = label_maps
        return output


class KnownSignature(inspect.Signature):
    """What `inspect.signature` finds at once: diffusers asks at every call of a layer, and working it out takes as long as a small matrix product.

    Its parameters are a plain dict, since torch.compile does not read on in a mapping proxy.
    """

    def __init__(self, parameters: Sequence[inspect.Parameter]):
        super().__init__(parameters)
        self.known = {parameter.name: parameter for parameter in parameters}
        self.bound = KnownSignature(parameters[1:]) if "self" in self.known else self

    def replace(self, *args: Any, **kwargs: Any) -> "KnownSignature":
        """The one thing `inspect.signature` replaces: a bound method shows its parameters without `self`."""
        return self.bound

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:  # type: ignore[override]
        return self.known


MoMAAttnProcessor.__call__.__signature__ = KnownSignature(list(inspect.signature(MoMAAttnProcessor.__call__).parameters.values()))  # type: ignore[attr-defined]


def projected(attn: Attention, output: Float[Tensor, "batch positions channels"]) -> Float[Tensor, "batch positions channels"]:
    """The layer's last projection, without what does nothing: dropout outside of training, and a division by 1."""
    output = attn.to_out[0](output)
    if attn.training:
        output = attn.to_out[1](output)
    return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


def as_bias(attn: Attention, attention_mask: Tensor | None, key: Float[Tensor, "batch heads keys dim"]) -> Tensor | None:
    """diffusers' mask of keys as `attend` takes it."""
    if attention_mask is None:
        return None
    return attn.prepare_attention_mask(attention_mask, key.shape[2], len(key)).unflatten(0, (len(key), attn.heads))


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

    Raises ValueError where there are several subjects and another number of rows than theirs.
    """
    (batch, positions, channels), (subjects, heads) = query.shape, key.shape[:2]
    if subjects not in (1, batch / subject.rows_per_subject):
        raise ValueError(f"{subjects} subjects of {subject.rows_per_subject} rows each for a batch of {batch}: give one, or as many as there are rows for")
    index, weight = subject.queries(batch, positions, subjects)
    asked = query if index is None else query.flatten(0, 1).index_select(0, index)
    added = attend(split_heads(asked.reshape(subjects, -1, channels), heads), key, value, bias)
    if index is None:
        return output.addcmul(added.view_as(output), weight.to(output.dtype))
    rows, added = output.flatten(0, 1), (added * weight).to(output.dtype).flatten(0, 1)
    # A backward pass needs the output as it was.
    return (rows.index_add(0, index, added) if torch.is_grad_enabled() else rows.index_add_(0, index, added)).view_as(output)


def add_context_attention(
    output: Float[Tensor, "batch positions channels"], context: ContextConditioning, added: Float[Tensor, "batch positions channels"]
) -> Float[Tensor, "batch positions channels"]:
    """`output` plus what the queries read off the image tokens, `added`."""
    if context.generated_mask is None:  # in the operations of diffusers' IP-Adapter, so that the bits are its own (where no kernel serves)
        return output + (added if context.scale == 1 else context.scale * added)
    return output.addcmul(added, context.generated_mask.weight(added.shape[1], output.dtype)[..., None], value=context.scale)


def label_key_value(
    key: Float[Tensor, "batch heads text dim"], label_tokens: Float[Tensor, "rows text"]
) -> tuple[Float[Tensor, "rows heads text dim"], Float[Tensor, "rows heads text dim"]]:
    """What `label_map` reads: the text's keys, and values that are 1 / heads at the label's tokens, in the first channel.

    Under classifier-free guidance the conditional half comes last: of it are the `rows` with a label.
    """
    key = key[-len(label_tokens) :]
    value = torch.zeros_like(key)
    value[..., 0] = label_tokens[:, None] / key.shape[1]
    return key, value


def label_map(
    query: Float[Tensor, "batch heads positions dim"], key: Float[Tensor, "rows heads text dim"], value: Float[Tensor, "rows heads text dim"]
) -> Float[Tensor, "rows positions"]:
    """Attention probability of the label's tokens, summed over them, averaged over heads; for the last `rows` of the batch.

    By the kernel that attends to the text: the matrix of probabilities, which takes a GPU three to six times as long, is never there.
    """
    return F.scaled_dot_product_attention(query[-key.shape[0] :], key, value)[..., 0].sum(1, dtype=torch.float32)
