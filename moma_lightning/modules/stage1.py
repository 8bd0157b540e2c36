"""Stage 1, multimodal generative learning: teach the image-feature decoder CLIP's embedding of the whole picture (Eq. 4)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms import v2

from moma_lightning import losses, optim
from moma_lightning.batch import CachedBatch, TripletBatch, counted, white_background
from moma_lightning.digests import identity
from moma_lightning.foundation import FoundationConfig, ImageEncoder, image_embed_dim, load_image_encoder
from moma_lightning.metrics import EmbeddingMatch
from moma_lightning.models.blocks import blocks_of
from moma_lightning.models.caption_encoder import CaptionEncoder
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.modules.base import TrainedPartModule, stated
from moma_lightning.training.options import TrainingOptions
from moma_lightning.training.sharding import plain_name, whole_parameters

#: What `val/cosine` and `val/r_at_1` are measured against, beside the decoder itself.
BASELINES = {
    "white_background": "CLIP of the white-background picture",
    "caption": "CLIP text embedding of the caption",
    "mean": "mean training target",
}

#: Hue at random, so that white stays white; blur hides a pattern and a material's grain.
RECOLOR = v2.Compose([v2.ColorJitter(saturation=(0.2, 1.5), hue=0.5), v2.GaussianBlur(kernel_size=7, sigma=(0.1, 2.0))])


@dataclass
class EditConfig:
    """Samples that teach the MLLM that the text overrides the picture (ours; the paper relies on what LLaVA-7B knows already).

    rate: share of training samples whose text is the caption with its colour, shape and texture words, while the subject in the
    picture is recoloured and blurred at random, so that only the text tells how the target looks. 0 is the paper's training.
    """

    rate: float = 0.0


LOSSES = {"mse": losses.image_embedding_loss, "cosine": losses.image_embedding_cosine_loss}


class Stage1(TrainedPartModule):
    """Trains an ImageFeatureDecoder on I_wb and P_ref against the frozen CLIP(I_ref).

    clip: folder or hub id of the whole CLIP model whose vision tower is the foundation's image encoder; only for the caption
    baseline in validation, which is left out without it. loss: Eq. 4's squared distance, or 1 - cosine (an ablation).
    edits: see EditConfig. cached: the shards are a cache's (`make cache-stage1`), so the image encoder is not loaded.
    Checkpoints hold what is trained; the rest is the foundation's.
    """

    target_sum: Tensor
    target_count: Tensor

    def __init__(
        self, foundation: FoundationConfig, decoder: DecoderConfig, optimizer: optim.OptimizerConfig, clip: str | None = None,
        loss: Literal["mse", "cosine"] = "mse", edits: EditConfig = EditConfig(),  # noqa: B008 - never changed
        training: TrainingOptions = TrainingOptions(),  # noqa: B008
        cached: bool = False,
    ):
        super().__init__(optimizer, training)
        self.edits, self.foundation = edits, foundation
        self.image_encoder, feature_decoder, self.caption_encoder = self.load_parts(decoder, clip, cached)
        self.loss, self.decoder = LOSSES[loss], feature_decoder.train()
        names = ["decoder", *(name for name in BASELINES if self.caption_encoder is not None or name != "caption")]
        self.matches: dict[str, EmbeddingMatch] = nn.ModuleDict({n: EmbeddingMatch() for n in names})
        self.register_buffer("target_sum", torch.zeros(feature_decoder.embed_dim))
        self.register_buffer("target_count", torch.zeros(()))
        self._ddp_params_and_buffers_to_ignore = ["target_sum", "target_count"]  # DDP would put rank 0's sums in every rank's place

    def load_parts(self, decoder: DecoderConfig, clip: str | None, cached: bool) -> tuple[ImageEncoder | None, ImageFeatureDecoder, CaptionEncoder | None]:
        """The models with their weights; the planner's stage has them without."""
        image_encoder = None if cached else load_image_encoder(self.foundation)
        feature_decoder = ImageFeatureDecoder.from_foundation(self.foundation, decoder, image_embed_dim(self.foundation))
        return image_encoder, feature_decoder, CaptionEncoder.from_pretrained(clip) if clip else None

    def forward(self, batch: TripletBatch | CachedBatch, edit_rate: float = 0.0) -> Float[Tensor, "batch embed_dim"]:
        """Predicted CLIP(I_ref) of each sample."""
        if isinstance(batch, CachedBatch):
            return self.decoder.from_features(batch.features["vision"], batch.label, batch.caption)
        subject, caption = edited(batch, edit_rate)
        return self.decoder(subject, batch.label, caption)

    @torch.no_grad()
    def target(self, batch: TripletBatch | CachedBatch) -> Float[Tensor, "batch embed_dim"]:
        """CLIP(I_ref), without gradient."""
        return batch.features["target"].float() if isinstance(batch, CachedBatch) else self.embeds(batch.pixel_values)

    def predicted_and_target(
        self, batch: TripletBatch | CachedBatch, edit_rate: float = 0.0
    ) -> tuple[Float[Tensor, "batch embed_dim"], Float[Tensor, "batch embed_dim"]]:
        """What a step's loss compares; the target is made first, which keeps nothing for gradients."""
        target = self.target(batch)
        return self(batch, edit_rate), target

    @torch.no_grad()
    def subject_embeds(self, batch: TripletBatch | CachedBatch) -> Float[Tensor, "batch embed_dim"]:
        """CLIP(I_wb), a baseline."""
        if isinstance(batch, CachedBatch):
            return batch.features["white_background"].float()
        return self.embeds(white_background(batch.pixel_values, batch.subject_mask))

    def embeds(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        if self.image_encoder is None:
            raise ValueError("model.init_args.cached is true, but the shards hold pictures: point data.init_args.config.train and val at a cache")
        return self.image_encoder(pixel_values).float()

    @torch.no_grad()
    def features(self, batch: TripletBatch) -> dict[str, Tensor]:
        """`target`, `white_background` (both CLIP's) and `vision`, what the MLLM's connector reads of the picture on white."""
        subject = white_background(batch.pixel_values, batch.subject_mask)
        return {"target": self.target(batch), "white_background": self.subject_embeds(batch), "vision": self.decoder.vision_features(subject)}

    def cache_identity(self) -> dict[str, str]:
        """Raises ValueError for edits, which are other pictures in every pass."""
        if self.edits.rate:
            raise ValueError(f"edits.rate {self.edits.rate} recolours pictures at random, which a cache cannot hold: set model.init_args.edits.rate to 0, "
                             "for the cache and for training from it, or train on the pictures")
        models = {"image_encoder": self.foundation.image_encoder, "mllm": self.foundation.mllm}
        options = {"stage": "stage1", "picture_side": str(self.decoder.picture_side), "mllm_quantization": self.foundation.mllm_quantization}
        return {name: identity(model) for name, model in models.items()} | stated(options) | self.own_class()

    def training_step(self, batch: TripletBatch | CachedBatch, batch_idx: int) -> Tensor:
        predicted, target = self.predicted_and_target(batch, self.edits.rate)
        self.target_sum += target.sum(0)
        self.target_count += len(batch)
        loss = self.loss(predicted, target)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/cosine", losses.image_embedding_cosine(predicted, target), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: TripletBatch | CachedBatch, batch_idx: int) -> None:
        predicted, target = self.predicted_and_target(batch)
        self.log_val_loss(self.loss(predicted, target), batch)
        count = counted(batch)  # none: every rank updates all the same, so that all have something to gather
        for name, embeds in {"decoder": predicted, **self.baselines(batch)}.items():
            self.matches[name].update(embeds[:count], target[:count], self.number_of(batch_idx))

    @torch.no_grad()
    def baselines(self, batch: TripletBatch | CachedBatch) -> dict[str, Float[Tensor, "batch embed_dim"]]:
        """What could be had without stage 1, by the names in BASELINES."""
        embeds = {
            "white_background": self.subject_embeds(batch),
            "mean": self.mean_target().expand(len(batch), -1),
        }
        if self.caption_encoder is not None:
            embeds["caption"] = self.caption_encoder(batch.caption)
        return embeds

    def mean_target(self) -> Float[Tensor, " embed_dim"]:
        """The mean of what all ranks have seen in training; every rank must call this."""
        total, count = self.seen_targets()
        return total / count.clamp(min=1)

    def seen_targets(self) -> tuple[Float[Tensor, " embed_dim"], Float[Tensor, ""]]:
        """Sum and number of the targets that all ranks have seen; every rank must call this."""
        sums = torch.cat([self.target_sum, self.target_count[None]])
        if self._trainer is not None:
            strategy = self.trainer.strategy  # the Trainer has put the module back onto the CPU when fit is over; NCCL adds up on GPUs alone
            sums = strategy.reduce(sums.to(strategy.root_device), reduce_op="sum").to(self.target_sum.device)
        return sums[:-1], sums[-1]

    def on_validation_epoch_end(self) -> None:
        scores = {name: match.compute() for name, match in self.matches.items()}
        for name, score in scores.items():
            suffix = "" if name == "decoder" else f"_{name}"
            # Computed over all ranks, so the same on each: their mean is itself, and Lightning asks for it.
            self.log_dict({f"val/{key}{suffix}": value for key, value in score.items()}, prog_bar=False, sync_dist=True)
            self.matches[name].reset()
        self.print(table(scores))

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the module: the decoder's own parameters, what else is trained, and the running mean of the targets."""
        own: dict[str, Tensor] = {f"decoder.{plain_name(name)}": p for name, p in self.decoder.own_parameters().items()}
        return own | super().kept() | {"target_sum": self.target_sum, "target_count": self.target_count}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"]["target_sum"], checkpoint["state_dict"]["target_count"] = self.seen_targets()

    def kept_options(self) -> dict[str, Any]:
        """Such as a LoRA's alpha, which shows in no shape."""
        return {f"decoder.{key}": value for key, value in asdict(self.decoder.config).items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and not self.trainer.is_global_zero:  # the sums are of all ranks: rank 0 goes on with them, the others begin anew
            for name in ("target_sum", "target_count"):
                checkpoint["state_dict"][name] = torch.zeros_like(checkpoint["state_dict"][name])

    def units(self) -> list[nn.Module]:
        encoders = [part for part in (self.image_encoder, self.caption_encoder) if part is not None]
        return [*blocks_of(self), *encoders, self.decoder]

    def on_fit_end(self) -> None:
        if self.trainer.fast_dev_run:
            return
        with whole_parameters(self.decoder, self.decoder.own_parameters()):
            if self.trainer.is_global_zero:
                self.decoder.save_pretrained(Path(self.trainer.default_root_dir) / "image_feature_decoder")


def edited(batch: TripletBatch, rate: float) -> tuple[Float[Tensor, "batch 3 height width"], list[str]]:
    """I_wb in [-1, 1] and P of each sample; a share `rate` of them with the full caption and a subject in other colours."""
    subject, caption = white_background(batch.pixel_values, batch.subject_mask), list(batch.caption)
    if rate:
        for i in (torch.rand(len(batch)) < rate).nonzero().flatten().tolist():
            subject[i] = RECOLOR((subject[i] + 1) / 2) * 2 - 1
            caption[i] = batch.full_caption[i]
    return subject, caption


def table(scores: dict[str, dict[str, Tensor]]) -> str:
    """Scores as lines of text: the decoder first, then the baselines."""
    lines = [f"{'stage 1, validation':<38} {'cosine':>7} {'R@1':>7}"]
    for name, score in scores.items():
        lines.append(f"{BASELINES.get(name, 'image-feature decoder'):<38} {score['cosine']:7.3f} {score['r_at_1']:7.3f}")
    return "\n".join(lines)
