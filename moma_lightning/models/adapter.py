"""MoMA's trained part of the diffusion side: subject attention, context attention and the image projector."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from moma_lightning.models.attention import (
    Conditioning,
    ContextConditioning,
    MoMAAttnProcessor,
    Recorder,
    SubjectConditioning,
    SubjectKeys,
)
from moma_lightning.models.masks import MaskPyramid, log_bias
from moma_lightning.models.projector import ImageProjection
from moma_lightning.models.published import PublishedModel

Variant = Literal["paper", "released"]
Reference = dict[int, tuple[Tensor, Tensor]]


class KeptFeatures(NamedTuple):
    """What K' and V' are made from at the positions that M_ref keeps, as `MaskPyramid.kept` orders them, of a layer of so many `positions`."""

    key: Float[Tensor, "batch kept channels"]
    value: Float[Tensor, "batch kept channels"]
    positions: int


class SubjectAttention(nn.Module):
    """W'_k, W'_v and lambda of one self-attention layer (Eq. 3). Identity at first, silent until lambda leaves 0."""

    def __init__(self, channels: int):
        super().__init__()
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.lambda_ = nn.Parameter(torch.zeros(1))
        nn.init.eye_(self.to_k.weight)
        nn.init.eye_(self.to_v.weight)


def subject_keys(
    layer: SubjectAttention, key: Float[Tensor, "batch positions channels"], value: Float[Tensor, "batch positions channels"], mask: MaskPyramid
) -> SubjectKeys:
    """K' and lambda V' of one layer, made at the kept positions only: W'_k and W'_v act on each position by itself."""
    index, _ = mask.kept(key.shape[1])
    kept_key, kept_value = (x.take_along_dim(index[..., None], 1) for x in (key, value))
    return kept_keys(layer, KeptFeatures(kept_key, kept_value, key.shape[1]), mask)


def kept_keys(layer: SubjectAttention, features: KeptFeatures, mask: MaskPyramid) -> SubjectKeys:
    """The same of features that are at the kept positions already."""
    _, weight = mask.kept(features.positions)
    bias, alive = log_bias(weight)
    key, value = layer.to_k(features.key), layer.to_v(features.value)
    return SubjectKeys(key, (layer.lambda_ * alive * value).to(key.dtype), bias.to(key.dtype))


class ContextAttention(nn.Module):
    """to_k_ip and to_v_ip of one cross-attention layer (IP-Adapter's decoupled cross-attention)."""

    def __init__(self, channels: int, cross_attention_dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(cross_attention_dim, channels, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim, channels, bias=False)


class MoMAAdapter(nn.Module, PublishedModel):
    """All trained parameters of stage 2, for one UNet architecture.

    Layers are numbered by their position in `unet.attn_processors` (down, up, mid; even = self, odd = cross), as in
    IP-Adapter's and the released checkpoint's files.

    variant: "released" composes on the frozen layer, K' = W'_k (W_k h), V' = W'_v (W_v h), as the authors' code does;
    "paper" takes K' = W'_k h and V' = W'_v h (below Eq. 3). h is the layer's input in the reference pass.
    trained_on: what its image embeddings were in stage 2, "decoder" or "image_encoder", where the file says so.
    has_subject: False for what was read of an IP-Adapter file, or trained as one: it then draws as an IP-Adapter, its context unmasked.
    """

    has_subject: bool = True
    trained_on: str | None = None

    def __init__(self, layers: dict[int, tuple[int, int | None]], image_embed_dim: int, cross_attention_dim: int, *,
                 num_tokens: int = 4, variant: Variant = "released"):
        super().__init__()
        self.variant = variant
        self.image_proj = ImageProjection(image_embed_dim, cross_attention_dim, num_tokens)
        self.subject = nn.ModuleDict({str(i): SubjectAttention(c) for i, (c, text) in layers.items() if text is None})
        self.context = nn.ModuleDict({str(i): ContextAttention(c, text) for i, (c, text) in layers.items() if text is not None})

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, image_embed_dim: int, *, num_tokens: int = 4, variant: Variant = "released") -> "MoMAAdapter":
        """An adapter of the UNet's shape, started from its frozen weights: to_{k,v}_ip = to_{k,v} (IP-Adapter's recipe)."""
        attentions = attention_layers(unet)
        layers = {i: (a.to_q.out_features, a.to_k.in_features if a.is_cross_attention else None) for i, a in attentions.items()}
        adapter = cls(layers, image_embed_dim, unet.config.cross_attention_dim, num_tokens=num_tokens, variant=variant)
        with torch.no_grad():
            for i, context in adapter.context.items():
                context.to_k_ip.weight.copy_(attentions[int(i)].to_k.weight)
                context.to_v_ip.weight.copy_(attentions[int(i)].to_v.weight)
            if variant == "paper":
                for i, subject in adapter.subject.items():
                    subject.to_k.weight.copy_(attentions[int(i)].to_k.weight)
                    subject.to_v.weight.copy_(attentions[int(i)].to_v.weight)
        return adapter

    @classmethod
    def from_pretrained(cls, name: str | Path, unet: UNet2DConditionModel, variant: Variant | None = None) -> "MoMAAdapter":  # type: ignore[override]
        """As `checkpoints.load_adapter`: a folder, a file of any layout, or `owner/name@revision` on the hub; frozen, in eval mode."""
        from moma_lightning.checkpoints import load_adapter  # which builds adapters itself

        return load_adapter(name, unet, variant).eval().requires_grad_(False)

    def _save_pretrained(self, save_directory: Path) -> None:
        from moma_lightning.checkpoints import save_adapter

        save_adapter(self, save_directory)

    def describe(self) -> dict[str, str]:
        millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in self.named_children()}
        subject = f"Subject attention ({millions['subject']:.2f} M parameters), c" if self.has_subject else "C"
        sides = f"{subject}ontext attention ({millions['context']:.2f} M) and projector to "
        return {
            "title": "MoMA adapter" if self.has_subject else "IP-Adapter",
            "details": f"{sides}{self.image_proj.num_tokens} tokens ({millions['image_proj']:.2f} M); variant `{self.variant}`. `moma.safetensors` is a "
                       "valid IP-Adapter file too: diffusers' `load_ip_adapter` reads its `image_proj.` and `ip_adapter.` entries.",
            "usage": 'MoMAAdapter.from_pretrained("owner/name@revision", unet)  # or adapter: owner/name@revision in a YAML',
        }

    def context_conditioning(self, image_embeds: Float[Tensor, "batch dim"], scale: float = 1.0) -> ContextConditioning:
        """Keys and values of the image tokens for every cross-attention layer. Zeros are the unconditional embedding."""
        tokens = self.image_proj(image_embeds)
        return ContextConditioning({int(i): (layer.to_k_ip(tokens), layer.to_v_ip(tokens)) for i, layer in self.context.items()}, scale)

    def subject_conditioning(
        self, reference: Reference | Mapping[int, KeptFeatures], reference_mask: MaskPyramid, generated_mask: MaskPyramid | None = None
    ) -> SubjectConditioning:
        """K' and lambda V' of every self-attention layer from the reference pass's features (Eq. 3), at the positions that `reference_mask` keeps."""
        keys = {}
        for name, layer in self.subject.items():
            found = reference[int(name)]
            if isinstance(found, KeptFeatures):
                keys[int(name)] = kept_keys(layer, found, reference_mask)
            else:
                keys[int(name)] = subject_keys(layer, found[0], found[1], reference_mask)
        return SubjectConditioning(keys, generated_mask)

    @torch.no_grad()
    def reference_features(
        self,
        unet: UNet2DConditionModel,
        latents: Float[Tensor, "batch channels h w"],
        prompt_embeds: Float[Tensor, "batch text dim"],
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Reference:
        """One pass of the frozen UNet over the clean reference at t = 0 with the label as text (section 3.2; the latter two are a TextConditioning).

        Returns what K' and V' are made from, by layer: (h, h) for the paper's variant, (W_k h, W_v h) for the released one.
        """
        recorder = Recorder(keep_reference=True)
        given = {"conditioning": Conditioning(recorder=recorder)}
        unet(latents, 0, prompt_embeds, added_cond_kwargs=added_cond_kwargs, cross_attention_kwargs=given)
        return {i: (h, h) if self.variant == "paper" else (k, v) for i, (h, k, v) in recorder.reference.items()}


def attention_layers(unet: UNet2DConditionModel) -> dict[int, nn.Module]:
    """The UNet's attention modules by their number in `unet.attn_processors`."""
    return {i: unet.get_submodule(name.removesuffix(".processor")) for i, name in enumerate(unet.attn_processors)}


def install_processors(unet: UNet2DConditionModel) -> None:
    """Give every attention layer MoMA's stateless processor; until conditioning is passed the UNet computes the same bits."""
    unet.set_attn_processor({name: MoMAAttnProcessor(i) for i, name in enumerate(unet.attn_processors)})
