"""The subject's mask by Segment Anything: what the paper's evaluation does ("SAM to extract main objects", section 4.1)."""

import json
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from moma_lightning.checkpoints.formats import read_pickle
from moma_lightning.hub import find_file, local_path
from moma_lightning.models.trained_weights import read_tensors
from moma_lightning.pictures import to_rgb


@dataclass(frozen=True)
class SamConfig:
    """Sizes of a small `Sam`; masks come out at a quarter of `patch_size` pixels and are resized to the picture."""

    image_size: int = 64
    patch_size: int = 4
    embed_dim: int = 64
    depth: int = 3
    num_heads: int = 4
    prompt_embed_dim: int = 64
    decoder_depth: int = 2
    decoder_mlp_dim: int = 128


def build_sam(config: SamConfig) -> Sam:
    """segment_anything's own builder with the sizes as arguments; global attention in every block."""
    grid, dim = config.image_size // config.patch_size, config.prompt_embed_dim
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=config.image_size, patch_size=config.patch_size, embed_dim=config.embed_dim, depth=config.depth,
            num_heads=config.num_heads, out_chans=dim, norm_layer=partial(nn.LayerNorm, eps=1e-6), window_size=0),
        prompt_encoder=PromptEncoder(
            embed_dim=dim, image_embedding_size=(grid, grid), input_image_size=(config.image_size, config.image_size), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer=TwoWayTransformer(depth=config.decoder_depth, embedding_dim=dim, mlp_dim=config.decoder_mlp_dim, num_heads=4),
            transformer_dim=dim, iou_head_hidden_dim=dim),
    ).eval()


def save_sam(sam: Sam, config: SamConfig, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, the folder that `SamMasker.from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    save_file({key: value.contiguous() for key, value in sam.state_dict().items()}, folder / "model.safetensors")


class NothingFoundError(ValueError):
    """SAM found no object where it was asked for one."""


class SamMasker(nn.Module):
    """The mask of a picture's main object: SAM asked with the centre as subject and the four corners as background."""

    def __init__(self, sam: Sam):
        super().__init__()
        self.sam = sam.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "SamMasker":
        """Load a folder with `config.json` and `model.safetensors`, or an official `sam_vit_{h,l,b}*.pth` checkpoint, here or on the hub.

        Raises FileNotFoundError when there is neither, and ValueError when a checkpoint's name does not tell its size or its
        weights do not fit.
        """
        found = local_path(str(path))
        if found is None and re.search(r"@[^/]+/.*\.pth$", str(path)):
            found = find_file(str(path))
        if found is not None and found.is_dir():
            return cls(_load_folder(found))
        if found is not None and found.suffix == ".pth":
            return cls(_load_checkpoint(found))
        raise FileNotFoundError(f"{path}: neither a folder with config.json and model.safetensors nor a sam_vit_*.pth checkpoint; "
                                "official checkpoints are listed at https://github.com/facebookresearch/segment-anything; "
                                "where every mask is given, set foundation.sam to null")

    @torch.no_grad()
    def forward(self, image: Image.Image | Float[Tensor, "3 height width"]) -> Float[Tensor, "1 height width"]:
        """Mask (0 or 1) of the main object, on SAM's device: of three candidates the one with the best predicted IoU.

        `image` is a PIL picture or pixels in [-1, 1]. Raises NothingFoundError (a ValueError) when SAM finds nothing at the centre.
        """
        pixels = as_rgb(image)
        height, width = pixels.shape[:2]
        predictor = SamPredictor(self.sam)
        predictor.set_image(pixels)
        masks, quality, _ = predictor.predict(*point_prompts(height, width), multimask_output=True)
        mask = masks[int(np.argmax(quality))]
        if not mask.any():
            raise NothingFoundError(f"SAM found no object at the centre of the {width}x{height} picture: give a mask yourself")
        return torch.from_numpy(mask)[None].to(self.sam.device, torch.float32)


def point_prompts(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """SAM's points (x, y) in pixels and their labels: the centre is subject (1), the corners are background (0)."""
    right, bottom = width - 1, height - 1
    points = [(right / 2, bottom / 2), (0, 0), (right, 0), (0, bottom), (right, bottom)]
    return np.asarray(points, np.float32), np.asarray([1, 0, 0, 0, 0], np.int64)


def as_rgb(image: Image.Image | Tensor) -> np.ndarray:
    """uint8 RGB [height, width, 3] of a PIL picture, on white where transparent, or of pixels in [-1, 1]."""
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image, turn=False))
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"one picture [3, height, width] is wanted, not a tensor of shape {tuple(image.shape)}")
    return ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def _load_folder(folder: Path) -> Sam:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: a SAM folder holds config.json and model.safetensors")
    config = SamConfig(**json.loads((folder / "config.json").read_text()))
    return _with_weights(build_sam(config), read_tensors(folder / "model.safetensors"), folder)


def _load_checkpoint(path: Path) -> Sam:
    sizes = [name for name in sam_model_registry if name != "default" and name in path.name]
    if not sizes:
        raise ValueError(f"{path}: the file's name must say vit_h, vit_l or vit_b, as the official checkpoints' do")
    return _with_weights(sam_model_registry[sizes[0]](), read_pickle(path), path)


def _with_weights(sam: Sam, weights: dict[str, Tensor], source: Path) -> Sam:
    try:
        sam.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source}: the weights are not those of the SAM it is said to be: {error}") from error
    return sam
