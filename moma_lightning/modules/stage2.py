"""Stage 2, diffusion learning: subject and context attention on the frozen UNet (paper section 3.2, Eq. 1 and 3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float, Int
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from moma_lightning import losses
from moma_lightning.batch import CachedBatch, TripletBatch, white_background
from moma_lightning.checkpoints import save_adapter
from moma_lightning.digests import identity
from moma_lightning.foundation import (
    Base,
    FoundationConfig,
    ImageEncoder,
    frozen,
    image_embed_dim,
    load_base,
    load_image_encoder,
    vae_name,
)
from moma_lightning.hub import local_path
from moma_lightning.models.adapter import KeptFeatures, MoMAAdapter, Reference
from moma_lightning.models.attention import Conditioning
from moma_lightning.models.blocks import blocks_of
from moma_lightning.models.image_feature_decoder import ImageFeatureDecoder
from moma_lightning.models.kept_reference import kept_reference, read_reference
from moma_lightning.models.latents import scaled
from moma_lightning.models.masks import MaskPyramid, resize_mask
from moma_lightning.models.text import TextConditioning
from moma_lightning.modules import grid
from moma_lightning.modules.base import TrainedPartModule, stated
from moma_lightning.modules.grid import GridConfig
from moma_lightning.modules.stage2_parts import Stage2Config, build_adapter, load_decoder
from moma_lightning.optim import OptimizerConfig
from moma_lightning.picture_grid import picture_grid
from moma_lightning.pipeline import MoMAPipeline
from moma_lightning.subject import VARIANTS
from moma_lightning.training.options import TrainingOptions
from moma_lightning.training.sharding import whole_parameters

BANDS = 4


class Stage2(TrainedPartModule):
    """Trains a MoMAAdapter by noise prediction; MLLM, UNet, VAE and text encoder stay frozen.

    decoder: folder that stage 1 wrote (`image_feature_decoder`), needed when `stage2.context` is "decoder".
    decoder_digest: of what was in it, on rank 0; None for one on the hub.
    """

    decoder_digest: str | None = None

    def __init__(self, foundation: FoundationConfig, stage2: Stage2Config, optimizer: OptimizerConfig,
                 decoder: str | None = None, grid: GridConfig = GridConfig(),  # noqa: B008 - never changed
                 training: TrainingOptions = TrainingOptions()):  # noqa: B008
        super().__init__(optimizer, training)
        self.config, self.grid, self.foundation, self.decoder_name = stage2, grid, foundation, decoder
        base, self.image_encoder, feature_decoder, self.adapter = self.load_parts()
        if stage2.context == "decoder" and decoder is not None and local_path(decoder) is not None and rank_zero_only.rank == 0:
            self.decoder_digest = identity(decoder)
        self.base, self.unet, self.vae, self.text_encoder, self.text_encoder_2 = base, base.unet, base.vae, base.text_encoder, base.text_encoder_2
        self.decoder = frozen(feature_decoder) if feature_decoder is not None else None
        self.noise_scheduler = DDPMScheduler.from_config(self.base.scheduler.config)
        if self.noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"the base predicts {self.noise_scheduler.config.prediction_type!r}: stage 2 trains on epsilon and v_prediction")
        self.grid_samples: TripletBatch | CachedBatch | None = None

    def load_parts(self) -> tuple[Base, ImageEncoder | None, ImageFeatureDecoder | None, MoMAAdapter]:
        """The models with their weights; the planner's stage has them without."""
        config, foundation = self.config, self.foundation
        base, embed_dim, wanted = load_base(foundation), image_embed_dim(foundation), None if config.cached else config.context
        image_encoder = load_image_encoder(foundation) if wanted == "image_encoder" else None
        feature_decoder = load_decoder(self.decoder_name, foundation, embed_dim) if wanted == "decoder" else None
        return base, image_encoder, feature_decoder, build_adapter(base, foundation, config, embed_dim)

    def forward(self, noisy_latents: Float[Tensor, "rows c h w"], timesteps: Int[Tensor, " rows"], batch: TripletBatch | CachedBatch,
                image_embeds: Float[Tensor, "batch dim"], captions: list[str],
                reference_latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, "rows c h w"]:
        """Noise prediction with both conditions; M_gen = M_ref, as always in training.

        There may be several rows a sample, side by side, as `noise_draws` has them: what is frozen is run once for them.
        """
        latent_size, draws = tuple(noisy_latents.shape[-2:]), len(noisy_latents) // len(batch)
        context, subject = self.adapter.context_conditioning(image_embeds.repeat_interleave(draws, 0)), None
        if self.config.subject:
            mask = MaskPyramid(batch.subject_mask, latent_size)
            generated = mask if draws == 1 else MaskPyramid(batch.subject_mask.repeat_interleave(draws, 0), latent_size)
            # The features have no name here: it would hold them while the UNet runs, at the paper's size .4 GB.
            subject = self.adapter.subject_conditioning(self.reference(reference_latents, batch, mask), mask, generated)
            subject.rows_per_subject = draws
            if VARIANTS[self.config.variant].mask_context:
                context.generated_mask = generated
        conditioning = Conditioning(subject, context)
        text = self.encode_text(captions, batch).repeated(draws)
        return self.unet(noisy_latents, timesteps, **text._asdict(), cross_attention_kwargs={"conditioning": conditioning}).sample

    def reference(
        self, latents: Float[Tensor, "batch c h w"], batch: TripletBatch | CachedBatch, mask: MaskPyramid
    ) -> Reference | Mapping[int, KeptFeatures]:
        """What K' and V' are made of, from the cache where it has it."""
        if isinstance(batch, CachedBatch) and self.config.cache_reference:
            return read_reference(batch.features, mask, self.adapter)
        return self.reference_features(latents, batch)

    def reference_features(self, latents: Float[Tensor, "batch c h w"], batch: TripletBatch | CachedBatch) -> Reference:
        """The frozen UNet's own features of the clean reference, with the label as text."""
        return self.adapter.reference_features(self.unet, latents, *self.encode_text(batch.label, batch))

    @torch.no_grad()
    def latents(
        self, batch: TripletBatch | CachedBatch, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch c h w"]]:
        """Two samples of the autoencoder's posterior: of the target, and of what the reference pass sees of it."""
        target, seen = (DiagonalGaussianDistribution(moments.float()) for moments in self.moments(batch))
        return scaled(self.vae, target.sample(generator)), scaled(self.vae, seen.sample(generator))

    def moments(self, batch: TripletBatch | CachedBatch) -> tuple[Float[Tensor, "batch two_c h w"], Float[Tensor, "batch two_c h w"]]:
        """Mean and log-variance, in one, of the autoencoder's posterior of both pictures."""
        if isinstance(batch, CachedBatch):
            target = batch.features["moments"]
            return target, batch.features["white_moments"] if self.white_reference and not self.config.cache_reference else target
        if batch.pixel_values.shape[-1] % (factor := 2 ** (len(self.vae.config.block_out_channels) - 1)):
            raise ValueError(f"pictures of {batch.pixel_values.shape[-1]} pixels: data.config.image_size has to be divisible by the autoencoder's {factor}")
        target = self.vae.encode(batch.pixel_values).latent_dist.parameters
        if not self.white_reference:
            return target, target
        return target, self.vae.encode(white_background(batch.pixel_values, batch.subject_mask)).latent_dist.parameters

    @property
    def white_reference(self) -> bool:
        return self.config.subject and VARIANTS[self.config.variant].white_reference

    @torch.no_grad()
    def features(self, batch: TripletBatch) -> dict[str, Tensor]:
        """`moments`, `white_moments` where the variant's reference is on white, `image_embeds`, and where asked for `kept_reference`'s.

        The reference pass sees the posterior's mean there, as in sampling, in place of a new sample each time.
        """
        target, seen = self.moments(batch)
        features = {"moments": target, "image_embeds": self.context_embeds(batch)}
        if self.config.cache_reference:
            latents = scaled(self.vae, DiagonalGaussianDistribution(seen.float()).mode())
            mask = MaskPyramid(batch.subject_mask, tuple(latents.shape[-2:]))
            features |= kept_reference(self.reference_features(latents, batch), mask)
        elif self.white_reference:
            features["white_moments"] = seen
        return features

    def cache_identity(self) -> dict[str, str]:
        models = {"vae": vae_name(self.foundation)}
        if self.config.context == "decoder":
            if self.decoder_name is None:
                raise ValueError("a cache is held against the decoder that made it: set model.init_args.decoder to its image_feature_decoder folder")
            models |= {"decoder": str(self.decoder_name), "mllm": self.foundation.mllm}
        else:
            models["image_encoder"] = self.foundation.image_encoder
        if self.config.cache_reference:
            models["base"] = self.foundation.base
            if self.foundation.base_config is not None:  # of a LoRA all that it changes
                models["base_config"] = self.foundation.base_config
        options = {"stage": "stage2", "reference": "white" if self.white_reference else "whole", "mllm_dtype": self.foundation.mllm_dtype,
                   "mllm_quantization": self.foundation.mllm_quantization,
                   "reference_features": self.config.variant if self.config.cache_reference else None}
        return {name: identity(model) for name, model in models.items()} | stated(options) | self.own_class()

    @torch.no_grad()
    def encode_text(self, texts: list[str], batch: TripletBatch | CachedBatch) -> TextConditioning:
        """Texts as the UNet reads them for pictures of the batch's size."""
        return self.base.encode_text(texts, batch.subject_mask.shape[-2:], self.device)

    @torch.no_grad()
    def context_embeds(self, batch: TripletBatch | CachedBatch) -> Float[Tensor, "batch dim"]:
        """The predicted embedding of the target picture (MoMA), or CLIP's own (IP-Adapter)."""
        if isinstance(batch, CachedBatch):
            return batch.features["image_embeds"].float()
        if self.decoder is None:
            if self.image_encoder is None:
                raise ValueError("stage2.cached is true, but the shards hold pictures: point data.init_args.config.train and val at a cache")
            return self.image_encoder(batch.pixel_values)
        return self.decoder(white_background(batch.pixel_values, batch.subject_mask), batch.label, batch.caption)

    def random_draws(self, latents: Float[Tensor, "batch c h w"], generator: torch.Generator | None, drop: bool, draws: int = 1):
        """Noise and timesteps, `draws` rows a sample, and for the two dropouts, which are a sample's, numbers in [0, 1) [2, batch]; None without `drop`."""
        rows = draws * len(latents)
        noise = torch.randn(rows, *latents.shape[1:], generator=generator, device=self.device)
        timesteps = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (rows,), generator=generator, device=self.device)
        return noise, timesteps, torch.rand(2, len(latents), device=self.device) if drop else None

    def sample_losses(
        self, batch: TripletBatch | CachedBatch, generator: torch.Generator | None = None, *, drop: bool, draws: int | None = None
    ) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Eq. 1 and its timestep, for each sample `draws` times side by side, None for `noise_draws`. `drop` applies the two dropouts."""
        draws = draws or self.config.noise_draws
        latents, reference_latents = self.latents(batch, generator)
        noise, timesteps, chance = self.random_draws(latents, generator, drop, draws)
        embeds, captions = self.context_embeds(batch), batch.caption
        if chance is not None:
            embeds = torch.where((chance[0] < self.config.context_dropout)[:, None], torch.zeros_like(embeds), embeds)
            captions = ["" if lost else text for lost, text in zip((chance[1] < self.config.text_dropout).tolist(), captions, strict=True)]
        latents = latents.repeat_interleave(draws, 0)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        target = losses.denoising_target(self.noise_scheduler, latents, noise, timesteps)
        noise_pred = self(noisy_latents, timesteps, batch, embeds, captions, reference_latents)
        return self.weighted(losses.noise_prediction_losses(noise_pred, target, self.position_weight(batch, latents)), timesteps), timesteps

    def position_weight(self, batch: TripletBatch | CachedBatch, latents: Float[Tensor, "rows c h w"]) -> Float[Tensor, "rows 1 h w"] | None:
        if not self.config.subject_weight:
            return None
        weight = 1 + self.config.subject_weight * resize_mask(batch.subject_mask, tuple(latents.shape[-2:]))
        return weight.repeat_interleave(len(latents) // len(batch), 0)

    def weighted(self, values: Float[Tensor, " rows"], timesteps: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        if self.config.min_snr_gamma is None:
            return values
        alphas = self.noise_scheduler.alphas_cumprod.to(self.device)[timesteps]
        return values * losses.min_snr_weight(alphas, self.config.min_snr_gamma, self.noise_scheduler.config.prediction_type == "v_prediction")

    def training_step(self, batch: TripletBatch | CachedBatch, batch_idx: int) -> Tensor:
        values, timesteps = self.sample_losses(batch, drop=True)
        loss = values.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        if (self.global_step + 1) % max(1, self.trainer.log_every_n_steps):  # not written: Lightning would write this step's values later
            return loss
        self._log_bands(values.detach(), timesteps)
        if self.config.subject:
            self.log_dict({f"lambda/{i}": layer.lambda_.detach()[0] for i, layer in self.adapter.subject.items()}, batch_size=len(batch))
        return loss

    def validation_step(self, batch: TripletBatch | CachedBatch, batch_idx: int) -> None:
        generator = torch.Generator(self.device).manual_seed(self.number_of(batch_idx))
        values, _ = self.sample_losses(batch, generator, drop=False, draws=1)
        self.log_val_loss(values.mean(), batch)
        if batch_idx == 0:
            self.grid_samples = batch if isinstance(batch, TripletBatch) else batch.without_reference()

    def _log_bands(self, values: Float[Tensor, " rows"], timesteps: Int[Tensor, " rows"]) -> None:
        """Loss by quarter of the noise schedule, `train/loss_t0` the least noisy. NaN where the batch has no sample: Lightning writes the last value again."""
        bands = timesteps * BANDS // self.noise_scheduler.config.num_train_timesteps
        self.log_dict({f"train/loss_t{band}": values[bands == band].mean() for band in range(BANDS)}, batch_size=len(values))

    def on_validation_epoch_end(self) -> None:
        if not self.grid.pictures or self.grid_samples is None or self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        with self.trainer.precision_plugin.forward_context():  # what is frozen may be of fewer bits than what is trained
            if self.device_mesh is not None:  # every rank holds a part of the models, so all draw, and the same pictures
                # By way of the CPU: tensors of a GPU would come to every rank on rank 0's.
                samples = self.trainer.strategy.broadcast(self.transfer_batch_to_device(self.grid_samples, torch.device("cpu"), 0))
                self._log_grid(self.transfer_batch_to_device(samples, self.device, 0))
            elif self.trainer.is_global_zero:
                self._log_grid(self.grid_samples)

    @torch.no_grad()
    def _log_grid(self, batch: TripletBatch | CachedBatch) -> None:
        pipe = MoMAPipeline.from_base(self.base, self.adapter).to(self.device)
        rows = grid.redrawn(pipe, batch, self.pictures(batch), self.context_embeds(batch), float(self.config.subject), self.grid)
        if rows and self.trainer.is_global_zero:
            grid.save(self, picture_grid(rows))

    def pictures(self, batch: TripletBatch | CachedBatch) -> Float[Tensor, "batch 3 height width"]:
        """The reference pictures in [-1, 1]; from a cache as the autoencoder has kept them."""
        if isinstance(batch, TripletBatch):
            return batch.pixel_values
        return self.vae.decode(DiagonalGaussianDistribution(batch.features["moments"].float()).mode()).sample

    def units(self) -> list[nn.Module]:
        unet, encoders = self.unet, [part for part in (self.image_encoder, self.decoder) if part is not None]
        parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet, self.vae.encoder, self.vae.decoder, *self.base.text_encoders]
        return [*blocks_of(self), *parts, *encoders]

    def compile_parts(self) -> None:
        self.unet.compile()

    def setup(self, stage: str) -> None:
        """Refuses, besides what every stage refuses, an option for caches where pictures are trained on."""
        if stage != "predict" and self.config.cache_reference and not self.config.cached:
            raise ValueError("stage2.cache_reference is for making a cache and, with stage2.cached, for training from one: set both, or neither")
        super().setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["decoder_digest"] = self.decoder_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tells of a decoder that holds other weights, besides what every stage refuses."""
        super().on_load_checkpoint(checkpoint)
        before, now = checkpoint.get("decoder_digest"), self.decoder_digest
        if before and now and before != now:
            rank_zero_warn(f"{self.decoder_name} holds other weights than the adapter in the checkpoint was trained with: train under another "
                           "trainer.default_root_dir, or put stage 1's former result back")

    def kept_options(self) -> dict[str, Any]:
        """W' of one variant fits the other's in name and shape; the context side was trained on one source of embeddings."""
        return {f"stage2.{name}": getattr(self.config, name) for name in ("variant", "context")}

    def on_fit_end(self) -> None:
        if self.trainer.fast_dev_run:
            return
        if other := [name for name in self.kept() if not name.startswith("adapter.")]:
            rank_zero_warn(f"trained, and in the checkpoint, but not in the adapter's folder: {', '.join(other[:5])}. Evaluation will not see it: "
                           "export it in an on_fit_end of your own")
        with whole_parameters(self.adapter, dict(self.adapter.named_parameters())):
            if self.trainer.is_global_zero:
                card = {"steps": self.global_step, "context": self.config.context}
                save_adapter(self.adapter, Path(self.trainer.default_root_dir) / "adapter", card)
