"""Stage 2's pictures in validation: reference | redrawn from its own caption."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from PIL import Image

from moma_lightning.files import write_beside


@dataclass
class GridConfig:
    """The picture grid of validation: the first `pictures` validation samples, redrawn from their own captions. 0: none."""

    pictures: int = 8
    num_inference_steps: int = 50
    guidance_scale: float = 7.5


@torch.compiler.set_stance("force_eager")  # a few pictures are not worth compiling a trained UNet anew for
@torch.no_grad()
def redrawn(pipe, batch, pictures, embeds, beta: float, config: GridConfig) -> list[list[Image.Image]]:
    """A row (reference, new picture) for each of the first samples that can be drawn; the noise is the sample's number's.

    pictures: [batch, 3, height, width] in [-1, 1]. embeds: [batch, dim], the context's.
    """
    rows = []
    for i in range(min(config.pictures, len(batch))):
        reference = pipe.image_processor.postprocess(pictures[i : i + 1].cpu(), "pil")[0]
        try:
            output = pipe(batch.caption[i], reference, batch.subject_mask[i], batch.label[i], beta=beta, image_embeds=embeds[i : i + 1],
                          guidance_scale=config.guidance_scale, num_inference_steps=config.num_inference_steps,
                          generator=torch.Generator("cpu").manual_seed(i))
        except ValueError as error:  # training does not read the label's place in the caption, and must not end for want of a picture
            warnings.warn(f"{batch.key[i]} is not redrawn: {error}", stacklevel=2)
            continue
        rows.append([reference, output.images[0]])
    return rows


def save(module: LightningModule, grid: Image.Image) -> None:
    """Beside the checkpoints, and to the loggers that take pictures."""
    write_beside(Path(module.trainer.default_root_dir) / "pictures" / f"step-{module.global_step:06d}.png", grid.save)
    for logger in module.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image("val/pictures", [grid], step=module.global_step)
