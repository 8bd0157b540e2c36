"""What stage 2 is made of: its options, stage 1's decoder and a fresh adapter."""

from dataclasses import dataclass
from typing import Literal

from moma_lightning.checkpoints import holds_subject, load_into, read_adapter_file
from moma_lightning.foundation import Base, FoundationConfig
from moma_lightning.models.adapter import MoMAAdapter, Variant
from moma_lightning.models.image_feature_decoder import ImageFeatureDecoder
from moma_lightning.models.widths import check_embed_dims, decoder_embed_dim


@dataclass
class Stage2Config:
    """What stage 2 trains and on what.

    variant: what K' and V' are made of and what the reference pass sees (`MoMAAdapter`, `subject.VARIANTS`).
    context: the context embedding's source: stage 1's decoder (MoMA) or CLIP of the whole picture (IP-Adapter).
    subject: train the subject attention; False is an IP-Adapter.
    context_dropout: rate of all-zero embeddings (guidance on the context side only); text_dropout: of empty captions.
    noise_draws: timesteps and noises drawn for each sample of a training step, each a row of the UNet's batch (as MAR's `diffusion_batch_mul`, Li et al.,
        2024; the paper says nothing of it): autoencoder, MLLM and reference pass, which are frozen, then run once for so many rows, and text and context
        are dropped for all of them or none. Rows, and what the UNet holds for gradients, are `batch_size` times it.
    num_tokens: N of section 3.2.
    subject_weight: the loss weighs 1 + subject_weight on the subject's positions, 1 elsewhere (ours); 0 is Eq. 1.
    min_snr_gamma: min-SNR weights over timesteps (Hang et al., ICCV 2023), which the paper does not use; None is Eq. 1.
    cached: the shards are a cache's (`make cache-stage2`), so the MLLM and the image encoder are not loaded at all.
    cache_reference: the cache holds what the UNet makes of the reference as well, so that training runs no reference pass (docs/data.md).
    """

    variant: Variant = "released"
    context: Literal["decoder", "image_encoder"] = "decoder"
    subject: bool = True
    context_dropout: float = 0.1
    text_dropout: float = 0.0
    noise_draws: int = 1
    num_tokens: int = 4
    subject_weight: float = 0.0
    min_snr_gamma: float | None = None
    cached: bool = False
    cache_reference: bool = False

    def __post_init__(self) -> None:
        if self.noise_draws < 1:
            raise ValueError(f"stage2.noise_draws {self.noise_draws}: it has to be 1 or more")
        if self.cache_reference and not self.subject:
            raise ValueError("stage2.cache_reference keeps what the subject attention reads, and stage2.subject is false: leave one of them out")


def load_decoder(folder: str | None, foundation: FoundationConfig, embed_dim: int) -> ImageFeatureDecoder:
    """Stage 1's result. ValueError for none, and for one whose embeddings are not as wide as `embed_dim`, the image encoder's."""
    if folder is None:
        raise ValueError("stage 2 with context=decoder needs stage 1's result: set model.init_args.decoder to its image_feature_decoder folder")
    check_embed_dims({f"the image encoder {foundation.image_encoder}": embed_dim, f"the decoder {folder}": decoder_embed_dim(folder)})
    return ImageFeatureDecoder.from_pretrained(folder, foundation)


def build_adapter(base: Base, foundation: FoundationConfig, config: Stage2Config, image_embed_dim: int) -> MoMAAdapter:
    """A fresh adapter; its context side and projector start from `foundation.ip_adapter` where one is named (section 4.1).

    From a MoMA adapter in its place the subject side starts too. Raises ValueError for one of another variant.
    """
    adapter = MoMAAdapter.for_unet(base.unet, image_embed_dim, num_tokens=config.num_tokens, variant=config.variant)
    if foundation.ip_adapter:
        path = foundation.ip_adapter
        state, metadata = read_adapter_file(path)
        others = ("mapping.",) if config.subject else ("mapping.", "subject_adapter.")
        state = {name: value for name, value in state.items() if not name.startswith(others)}
        variant = metadata.get("moma_variant", "released")
        if holds_subject(state) and variant != config.variant:
            raise ValueError(f"foundation.ip_adapter {path} is a MoMA adapter of the variant {variant!r}, and stage2.variant is {config.variant!r}")
        load_into(adapter, state, path)
    adapter.has_subject = config.subject
    adapter.subject.requires_grad_(config.subject)
    return adapter
