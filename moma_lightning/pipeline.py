"""MoMAPipeline: a picture of a subject and prompts to new pictures of it. The one sampler of the project."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor, nn

from moma_lightning.base_pipelines import BasePipelineSD, BasePipelineSDXL
from moma_lightning.batch import white_background
from moma_lightning.foundation import Base, Dtype, FoundationConfig, ImageEncoder, load_base, load_image_encoder
from moma_lightning.models.adapter import MoMAAdapter
from moma_lightning.models.attention import Conditioning, ContextConditioning, MoMAAttnProcessor, Recorder
from moma_lightning.models.image_feature_decoder import ImageFeatureDecoder
from moma_lightning.models.latents import scaled, unscaled
from moma_lightning.models.widths import check_embed_dims, decoder_embed_dim
from moma_lightning.pictures import to_rgb
from moma_lightning.pipeline_inputs import as_lists, check_conditions, check_latents, check_settings
from moma_lightning.segmentation import SamMasker
from moma_lightning.subject import (
    VARIANTS,
    Subject,
    SubjectGuide,
    SubjectSettings,
    acting_loras,
    foreground,
    label_tokens,
    picture_pixels,
)


@dataclass
class MoMAPipelineOutput(BaseOutput):
    """images: PIL pictures, prompt by prompt. masks: M_gen estimated at each step [steps, batch, 1, h, w], if asked for."""

    images: list[Image.Image] | Tensor | np.ndarray
    masks: Tensor | None = None


class MoMAPipeline(DiffusionPipeline):
    """Stable Diffusion with MoMA's two conditions. Without a picture it is the base's own pipeline of diffusers, bit for bit.

    What `from_base` returns is a StableDiffusionPipeline or a StableDiffusionXLPipeline as well, as the base is; the sampler is this.

    adapter: subject and context attention. decoder: the MLLM that predicts the context embedding. clip: CLIP's image embedding,
    IP-Adapter's context, used where there is no decoder. masker: finds M_ref when no mask is given. own_scheduler: the
    one that the base came with, in whose place is DDIM.
    """

    adapter: MoMAAdapter | None = None
    decoder: ImageFeatureDecoder | None = None
    clip: ImageEncoder | None = None
    masker: SamMasker | None = None
    own_scheduler: Any = None

    @classmethod
    def from_base(cls, base: Base, adapter: MoMAAdapter | None = None, decoder: ImageFeatureDecoder | None = None,
                  clip: ImageEncoder | None = None, masker: SamMasker | None = None) -> "MoMAPipeline":
        """Put loaded parts together; the base's attention processors must be MoMA's (`load_base` installs them)."""
        wanted = adapter.image_proj.proj.in_features if adapter is not None else None
        for name, part in (("decoder", decoder), ("image encoder", clip)):
            if part is not None and wanted not in (None, part.embed_dim):
                raise ValueError(f"the {name} makes embeddings of {part.embed_dim}, the adapter's projector reads {wanted}: they do not belong together")
        pipe = (MoMAPipelineSD if base.text_encoder_2 is None else MoMAPipelineSDXL).of(base)
        pipe.adapter, pipe.decoder, pipe.clip, pipe.masker, pipe.own_scheduler = adapter, decoder, clip, masker, base.own_scheduler
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "MoMAPipeline":
        """Raises ValueError: a folder of diffusers holds the base alone."""
        raise ValueError("a MoMAPipeline is a base with an adapter and a decoder: load_pipeline(FoundationConfig(base=..., ...), adapter=..., decoder=...), "
                         "or MoMAPipeline.from_base")

    def to(self, *args, **kwargs) -> "MoMAPipeline":
        super().to(*args, **kwargs)
        kwargs.pop("silence_dtype_warnings", None)  # of diffusers' own
        for part in (self.adapter, self.decoder, self.clip):
            if isinstance(part, nn.Module):
                part.to(*args, **kwargs)
        if isinstance(self.masker, nn.Module):
            self.masker.to(self.device)  # SAM makes float32 of its points, and stays in it
        return self

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        """As diffusers has it for the base's models; adapter, decoder and image encoder stay on the GPU."""
        super().enable_model_cpu_offload(*args, **kwargs)
        for part in (self.adapter, self.decoder, self.clip):
            if isinstance(part, nn.Module):
                part.to(self._execution_device)

    def load_ip_adapter(self, *args, **kwargs) -> None:
        """Raises ValueError: diffusers' processors would take the place of MoMA's."""
        raise ValueError("an IP-Adapter is read as any adapter here: load_pipeline(foundation, adapter='ip-adapter_sd15.safetensors')")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Subject | None = None,
        mask: Image.Image | Tensor | None = None,
        label: str | None = None,
        *,
        beta: float | Sequence[float] | Tensor = 1.0,
        mask_strength: float = 1.0,
        context_scale: float = 1.0,
        image_embeds: Float[Tensor, "rows dim"] | None = None,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_masks: bool = False,
        mask_threshold: float = 0.2,
        mask_layers: Sequence[int] | None = None,
        guide_subject: bool = False,
        mllm_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        return_dict: bool = True,
    ) -> MoMAPipelineOutput | tuple[Any, ...]:
        """New pictures of the subject in `image`, for each prompt.

        image, mask, label: the reference, its foreground (None: SAM finds it) and the word for it, which each prompt contains; or
            image alone, as `prepare_subject` made it, so that calls for more prompts share that work. A mask is white on black; of a cut-out
            the alpha channel is one. A Subject belongs to the weights that made it: prepare it anew after a LoRA was loaded, let go or fused.
        beta: subject strength (Eq. 3), one or one a prompt; 0 turns the reference features off; about 1 for new contexts, 0.4 for new textures.
        mask_strength: 1 masks fully, 0 not at all (Tab. 3), for M_ref and M_gen alike.
        mask_threshold: label attention up to this, of [0, 1], is background. mask_layers: numbers of the cross-attention layers whose
            maps are averaged into M_gen, None for all.
        guide_subject: let classifier-free guidance amplify the subject attention too, by leaving it out of the unconditional half; in
            the released code it acts in both halves.
        context_scale: weight of the context cross-attention; 0 turns it off.
        image_embeds: used instead of the decoder's prediction: one row, or one a prompt.
        mllm_prompt: what the decoder is asked for, one a prompt, where it is not the prompt itself: the released code reads
            "photo of a {label}. {prompt}" with the UNet and "{prompt}" with the MLLM.
        negative_prompt: for all prompts, or one a prompt.
        eta, callback_on_step_end, return_dict: as diffusers' pipelines have them; of a step's tensors the callback gets
            the latents, and guidance stays as it was.
        Raises ValueError for a label that no prompt names, settings out of their range, betas or image_embeds that are neither one nor one a
        prompt, latents or image_embeds of a size that the models do not read, a mask or label without its picture or beside a Subject of others, a
        Subject of weights of another dtype or with other LoRAs, a mask that is empty or a picture in colours, a reference or image_embeds
        without adapter, a reference without label, a context that nothing can embed, and a height or width that the autoencoder cannot divide;
        TypeError for an image that is neither a PIL picture nor a Subject.
        """
        prompts, asked, negative = as_lists(prompt, mllm_prompt, negative_prompt)
        check_settings(len(prompts), num_images_per_prompt, num_inference_steps, guidance_scale)
        check_conditions(len(prompts), image, mask, label, beta, image_embeds)
        check_latents(latents, len(prompts) * num_images_per_prompt, self.unet.config.in_channels)
        self._require_parts(image, image_embeds)
        self._guidance_scale = guidance_scale  # what callbacks of diffusers look at
        height, width = self._size(height, width)
        device, guided = self._execution_device, guidance_scale > 1
        text = self.encode_text(prompts, (height, width), num_images_per_prompt, guided, negative)
        batch = len(prompts) * num_images_per_prompt
        subject = image if isinstance(image, Subject) or image is None else self.prepare_subject(image, mask, label, height * width)
        context = self._context(subject, asked, image_embeds, context_scale, num_images_per_prompt, guided)
        dtype = text.encoder_hidden_states.dtype
        self.scheduler.set_timesteps(num_inference_steps, device=device)  # first, since it says how large Euler's noise is
        latents = self.prepare_latents(batch, self.unet.config.in_channels, height, width, dtype, device, generator, latents)
        guide = None
        if subject is not None:
            assert self.adapter is not None, "prepare_subject has seen to it"
            settings = SubjectSettings(beta, mask_strength, mask_threshold, mask_layers, guide_subject)
            spelled, label = (self.maybe_convert_prompt(texts, self.tokenizer) for texts in (prompts, subject.label))  # as encode_text reads them
            tokens = label_tokens(self.tokenizers, spelled, label).to(device)
            guide = SubjectGuide(self.adapter, subject, tokens, num_images_per_prompt, guided, latents.shape[-2:], settings)
        extra = self.prepare_extra_step_kwargs(generator, eta)
        masks: list[Tensor] = []
        made: dict[tuple[int, str], Any] = {}
        timesteps = self.scheduler.timesteps
        numbers = timesteps.tolist()  # since a GPU is waited for to compare its tensor
        self._interrupt, self._num_timesteps = False, len(numbers)
        for step, t in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                continue
            doubled = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            recorder = Recorder(label_tokens=guide.label_tokens if guide else None)
            conditioning = guide.conditioning(numbers[step], context, recorder) if guide else Conditioning(context=context)
            conditioning.made = made
            noise_pred = self.unet(doubled, t, **text._asdict(), cross_attention_kwargs={"conditioning": conditioning}, return_dict=False)[0]
            if guided:
                unconditional, conditional = noise_pred.chunk(2)
                noise_pred = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(noise_pred, t, latents, **extra, return_dict=False)[0]
            if guide is not None:
                masks.append(guide.update(recorder))
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, t, {"latents": latents}).pop("latents", latents)
        if guide is not None and not guide.is_silent and not guide.has_acted:
            warnings.warn("the subject attention has acted in no step: the released variant's waits for a first M_gen, and for t < 950; take more steps",
                          stacklevel=2)
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        output = MoMAPipelineOutput(images=images, masks=torch.stack(masks) if masks and return_masks else None)
        return output if return_dict else output.to_tuple()

    def prepare_subject(self, image: object, mask: Image.Image | Tensor | None, label: str | None, area: int) -> Subject:
        """Mask, white-background picture and reference features of the subject of a PIL picture, at about `area` pixels, aspect ratio kept."""
        if not isinstance(image, Image.Image):
            raise TypeError(f"image is one PIL picture or a Subject that was prepared of one, not {type(image).__name__}: a call is for one subject")
        if self.adapter is None or label is None:
            raise ValueError("a reference picture needs an adapter (load_pipeline(..., adapter=...)) and a label, the word for its subject")
        self._require_processors()
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)  # sides that the UNet can halve
        pixels = picture_pixels(image, area, multiple).to(self._execution_device)
        found = foreground(self._find(image) if mask is None else mask, ImageOps.exif_transpose(image).size, pixels.shape[-2:]).to(pixels.device)
        if not found.any():
            raise ValueError(f"the mask of {label!r} is empty: no pixel is above half; give another mask or none, to let SAM find one")
        white = white_background(pixels, found)
        seen = white if VARIANTS[self.adapter.variant].white_reference else pixels
        encoded = self._encode(seen)
        with torch.compiler.set_stance("force_eager"):  # one pass is not worth compiling for, and its features would outlive a CUDA graph's memory
            features = self.adapter.reference_features(self.unet, encoded, *self.encode_text([label], pixels.shape[-2:]))
        return Subject(pixels, white, features, found, tuple(encoded.shape[-2:]), label, self.adapter.variant, self.unet.dtype, self._acting_loras())

    def default_size(self) -> int:
        """Sides of the pictures that the UNet was made for. Raises ValueError where they are not squares."""
        size = self.unet.config.sample_size
        if not isinstance(size, int):
            raise ValueError(f"the UNet's sample_size is {size}: give height and width")
        return size * self.vae_scale_factor

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        height, width = height or self.default_size(), width or self.default_size()
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ValueError(f"height {height} and width {width} have to be divisible by {self.vae_scale_factor}")
        return height, width

    def _require_parts(self, image: Any, image_embeds: Tensor | None) -> None:
        if self.adapter is None and (image_embeds is not None or isinstance(image, Subject)):
            raise ValueError("a Subject and image_embeds need an adapter: load_pipeline(..., adapter=...)")
        if self.adapter is not None and image_embeds is not None and image_embeds.shape[-1] != (width := self.adapter.image_proj.proj.in_features):
            raise ValueError(f"image_embeds of shape {tuple(image_embeds.shape)}: the adapter reads rows of {width}")
        if isinstance(image, Subject) and image.dtype != self.unet.dtype:
            raise ValueError(f"the Subject was prepared in {image.dtype}, the UNet is in {self.unet.dtype} now: prepare it anew")
        if isinstance(image, Subject) and image.loras != self._acting_loras():
            raise ValueError("LoRAs were loaded, let go or scaled since the Subject was prepared: prepare it anew")
        if image is not None or image_embeds is not None:
            self._require_processors()

    def _acting_loras(self) -> frozenset[tuple[str, float, float]]:
        return acting_loras(self.unet, *self.text_encoders)

    def _require_processors(self) -> None:
        if not all(isinstance(processor, MoMAAttnProcessor) for processor in self.unet.attn_processors.values()):
            raise ValueError("the UNet's attention processors are no longer MoMA's (attention slicing, fused projections, another UNet, a pipeline that "
                             "shares it): call moma_lightning.models.adapter.install_processors(pipe.unet)")

    def _find(self, image: Image.Image) -> Tensor:
        if self.masker is None:
            raise ValueError("no mask was given and there is no SAM: pass mask=..., or name one as foundation.sam")
        return self.masker(to_rgb(image))

    def _context(self, subject, prompts, image_embeds, scale, repeats, guided) -> ContextConditioning | None:
        """Image tokens' keys and values for the whole batch; the unconditional half gets projector(zeros)."""
        if scale == 0 or self.adapter is None or (image_embeds is None and subject is None):
            return None
        if image_embeds is None:
            image_embeds = self.context_embeds(subject, prompts)
        image_embeds = image_embeds.to(self._execution_device, self.adapter.image_proj.proj.weight.dtype).expand(len(prompts), -1).repeat_interleave(repeats, 0)
        if guided:
            image_embeds = torch.cat([torch.zeros_like(image_embeds), image_embeds])
        return self.adapter.context_conditioning(image_embeds, scale)

    def context_embeds(self, subject: Subject, prompts: Sequence[str]) -> Float[Tensor, "rows dim"]:
        """Stage 1's prediction from subject and prompt; without a decoder CLIP's embedding of the whole reference, as in IP-Adapter."""
        if self.decoder is not None:
            if subject.mllm_cache is None:
                subject.mllm_cache = self.decoder.read_picture(subject.white_background)
            each = list(dict.fromkeys(prompts))  # a prompt asked for under several seeds is read once
            embeds = self.decoder.predict(subject.mllm_cache, subject.label, each)
            return embeds[[each.index(prompt) for prompt in prompts]]
        if self.clip is None:
            raise ValueError("the context attention needs a decoder or a CLIP image encoder: load one, pass image_embeds, or set context_scale=0")
        return self.clip(subject.pixels)

    def _encode(self, pixels: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "1 c h w"]:
        with self.vae_in_range():
            latents = scaled(self.vae, self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode())
        return latents.to(self.unet.dtype)

    def _decode(self, latents, output_type):
        with self.vae_in_range():
            images = self.vae.decode(unscaled(self.vae, latents.to(self.vae.dtype)), return_dict=False)[0]
        if not images.isfinite().all():
            raise ValueError("the pictures hold values that are not finite: weights of the adapter or the base are damaged, or too large for float16 "
                             "(bfloat16 and float32 hold them)")
        return self.image_processor.postprocess(images, output_type=output_type)


class MoMAPipelineSD(MoMAPipeline, BasePipelineSD):
    """On a base of Stable Diffusion 1 or 2."""


class MoMAPipelineSDXL(MoMAPipeline, BasePipelineSDXL):
    """On an SDXL base."""


def load_pipeline(
    foundation: FoundationConfig, adapter: str | None = None, decoder: str | None = None, dtype: str = "float32"
) -> MoMAPipeline:
    """A ready pipeline: base, image encoder and SAM from `foundation`, then optionally an adapter and a decoder.

    adapter: folder of stage 2, or an IP-Adapter file. decoder: folder that `ImageFeatureDecoder.save_pretrained` wrote. dtype: float32, or one of
    16 bits for all but SAM; with float32 the MLLM keeps `foundation.mllm_dtype`.
    Raises ValueError, with their names, where image encoder, adapter and decoder differ in the width of their image embeddings, and for another dtype;
    FileNotFoundError for what is not there, SAM included, which `foundation.sam: null` leaves out.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype {dtype!r}: {', '.join(get_args(Dtype))} are known, by these names")
    masker = SamMasker.from_pretrained(foundation.sam) if foundation.sam else None
    base = load_base(foundation)
    clip = load_image_encoder(foundation)
    loaded = MoMAAdapter.from_pretrained(adapter, base.unet) if adapter else None
    if decoder and loaded is not None and loaded.trained_on == "image_encoder":
        warnings.warn(f"the adapter {adapter} was trained on CLIP's embeddings (stage2.context), not the decoder's: leave the decoder out", stacklevel=2)
    widths = {f"the image encoder {foundation.image_encoder}": clip.embed_dim}
    if loaded is not None:
        widths[f"the adapter {adapter}"] = loaded.image_proj.proj.in_features
    if decoder:
        widths[f"the decoder {decoder}"] = decoder_embed_dim(decoder)
    check_embed_dims(widths)
    pipe = MoMAPipeline.from_base(
        base,
        adapter=loaded,
        decoder=ImageFeatureDecoder.from_pretrained(decoder, foundation) if decoder else None,
        clip=clip,
        masker=masker,
    )
    return pipe if dtype == "float32" else pipe.to(getattr(torch, dtype))
