"""Stage 1, multimodal generative learning: teach the image-feature decoder CLIP's embedding of the whole picture (Eq. 4)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms import v2

from moma_lightning import losses, optim
from moma_lightning.batch import TripletBatch, white_background
from moma_lightning.foundation import FoundationConfig, ImageEncoder, load_image_encoder
from moma_lightning.metrics import EmbeddingMatch
from moma_lightning.models.caption_encoder import CaptionEncoder
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.modules.base import TrainedPartModule
from moma_lightning.training.options import TrainingOptions, blocks_of
from moma_lightning.training.sharding import whole_parameters

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
    edits: see EditConfig.
    Checkpoints hold what is trained; the rest is the foundation's.
    """

    target_sum: Tensor
    target_count: Tensor

    def __init__(
        self, foundation: FoundationConfig, decoder: DecoderConfig, optimizer: optim.OptimizerConfig, clip: str | None = None,
        loss: Literal["mse", "cosine"] = "mse", edits: EditConfig = EditConfig(),  # noqa: B008 - never changed
        training: TrainingOptions = TrainingOptions(),  # noqa: B008
    ):  # fmt: skip
        super().__init__(optimizer, training)
        self.edits = edits
        image_encoder = load_image_encoder(foundation)
        feature_decoder = ImageFeatureDecoder.from_foundation(foundation, decoder, image_encoder.embed_dim)
        self.assemble(image_encoder, feature_decoder, CaptionEncoder.from_pretrained(clip) if clip else None, loss)

    def assemble(self, image_encoder: ImageEncoder, decoder: ImageFeatureDecoder, caption_encoder: CaptionEncoder | None, loss: str = "mse") -> None:
        """Put the loaded parts in their places."""
        embed_dim = image_encoder.embed_dim
        self.loss, self.image_encoder, self.decoder, self.caption_encoder = LOSSES[loss], image_encoder, decoder.train(), caption_encoder
        names = ["decoder", *(name for name in BASELINES if caption_encoder is not None or name != "caption")]
        self.matches: dict[str, EmbeddingMatch] = nn.ModuleDict({n: EmbeddingMatch() for n in names})  # type: ignore[assignment]
        self.register_buffer("target_sum", torch.zeros(embed_dim))
        self.register_buffer("target_count", torch.zeros(()))

    def forward(self, batch: TripletBatch) -> Float[Tensor, "batch embed_dim"]:
        """Predicted CLIP(I_ref) of each sample."""
        subject = white_background(batch.pixel_values, batch.subject_mask)
        return self.decoder(subject, batch.label, batch.caption)

    @torch.no_grad()
    def target(self, batch: TripletBatch) -> Float[Tensor, "batch embed_dim"]:
        """CLIP(I_ref), without gradient."""
        return self.image_encoder(batch.pixel_values).float()

    def training_step(self, batch: TripletBatch, batch_idx: int) -> Tensor:
        subject, caption = edited(batch, self.edits.rate)
        predicted, target = self.decoder(subject, batch.label, caption), self.target(batch)
        self.target_sum += target.sum(0)
        self.target_count += len(batch)
        loss = self.loss(predicted, target)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/cosine", losses.image_embedding_cosine(predicted, target), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: TripletBatch, batch_idx: int) -> None:
        predicted, target = self(batch), self.target(batch)
        loss = self.loss(predicted, target)
        self.log("val/loss", loss, batch_size=len(batch), sync_dist=True)
        for name, embeds in {"decoder": predicted, **self.baselines(batch)}.items():
            self.matches[name].update(embeds, target)

    @torch.no_grad()
    def baselines(self, batch: TripletBatch) -> dict[str, Float[Tensor, "batch embed_dim"]]:
        """What could be had without stage 1, by the names in BASELINES."""
        embeds = {
            "white_background": self.image_encoder(white_background(batch.pixel_values, batch.subject_mask)),
            "mean": self.mean_target().expand(len(batch), -1),
        }
        if self.caption_encoder is not None:
            embeds["caption"] = self.caption_encoder(batch.caption)
        return embeds

    def mean_target(self) -> Float[Tensor, " embed_dim"]:
        """The mean of what all ranks have seen in training; every rank must call this."""
        sums = torch.cat([self.target_sum, self.target_count[None]])
        if self._trainer is not None:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return sums[:-1] / sums[-1].clamp(min=1)

    def on_validation_epoch_end(self) -> None:
        scores = {name: match.compute() for name, match in self.matches.items()}
        for name, score in scores.items():
            suffix = "" if name == "decoder" else f"_{name}"
            self.log_dict({f"val/{key}{suffix}": value for key, value in score.items()}, prog_bar=False)
            self.matches[name].reset()
        self.print(table(scores))

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the module: the decoder's own parameters and the running mean of the targets."""
        own: dict[str, Tensor] = {f"decoder.{name}": p for name, p in self.decoder.own_parameters().items()}
        return own | {"target_sum": self.target_sum, "target_count": self.target_count}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["decoder"] = asdict(self.decoder.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also raises ValueError where the decoder's options are not those of the checkpoint (a LoRA's alpha shows in no shape)."""
        now = asdict(self.decoder.config)
        if other := [f"decoder.{key}: {value} in the checkpoint, {now[key]} now" for key, value in checkpoint.get("decoder", now).items() if value != now[key]]:
            raise ValueError("\n  ".join(["the checkpoint's image-feature decoder is another:", *other]))
        super().on_load_checkpoint(checkpoint)

    def units(self) -> list[nn.Module]:
        captions = [self.caption_encoder] if self.caption_encoder is not None else []
        return [*blocks_of(self), self.image_encoder, *captions, self.decoder]

    def on_fit_end(self) -> None:
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
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
