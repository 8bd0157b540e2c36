"""Families of multimodal LLMs: what transformers' image-text-to-text models have not in common, for one square picture before a text.

Common to them are a vision tower (`get_encoder("image")`), a language model (`get_decoder()`), and a connector between the two.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moma_lightning.models.last_layer import only_first_read
from moma_lightning.models.preprocess import preprocess_square

#: Side of the picture for models that take any size: 256 tokens of Qwen2.5-VL, 196 of Qwen3-VL.
DEFAULT_SIDE = 448


@dataclass(frozen=True)
class Family:
    """What the models of one family want.

    vision: regex of the vision tower's parameters, by their names in the inner model; the others are connector and language model.
    layout: what `get_image_features` takes, of normalised pictures [batch, 3, side, side] and the image processor.
    before, after: the words that the model was trained to read around a picture's places.
    connector: name of the inner model's module that makes the picture's places of the vision tower's features, and of nothing else; None where
        it is part of the tower (Qwen-VL) or more comes between (LLaVA-OneVision's line ends).
    """

    vision: str
    layout: Callable[[Tensor, Any], dict[str, Any]]
    before: str = ""
    after: str = ""
    connector: str | None = None


def whole(pixels: Float[Tensor, "batch 3 side side"], image_processor: Any) -> dict[str, Any]:
    return {"pixel_values": pixels}


def untiled(pixels: Float[Tensor, "batch 3 side side"], image_processor: Any) -> dict[str, Any]:
    """LLaVA-OneVision cuts a picture in tiles where it is its text's only one, and only then: each is said to be one of two."""
    sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
    return {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": [2] * len(pixels)}


def one_each(pixels: Float[Tensor, "batch 3 side side"], image_processor: Any) -> dict[str, Any]:
    """Idefics3 takes lists of tiles: one tile, the whole picture."""
    return {"pixel_values": pixels[:, None]}


def patches(pixels: Float[Tensor, "batch 3 side side"], image_processor: Any) -> dict[str, Any]:
    """Qwen-VL takes the patches of all pictures in one row, and how many rows and columns of them each picture has."""
    sizes = {name: getattr(image_processor, name) for name in ("patch_size", "merge_size", "temporal_patch_size")}
    flat, rows, columns = image_processor.patchify(pixels, **sizes)
    return {"pixel_values": flat.flatten(0, 1), "image_grid_thw": torch.tensor([[1, rows, columns]] * len(pixels), device=pixels.device)}


_LLAVA = r"^vision_tower\."
_IDEFICS = Family(r"^vision_model\.", one_each, "<fake_token_around_image><global-img>", "<fake_token_around_image>", "connector")
_QWEN = Family(r"^visual\.(?!merger\.|deepstack_merger_list\.)", patches, "<|vision_start|>", "<|vision_end|>")
#: By `model_type` of the model's config. Others may want something else of a picture (attention that is not causal on it, sizes), and
#: would be trained on nonsense without a word.
FAMILIES = {
    "llava": Family(_LLAVA, whole, connector="multi_modal_projector"), "llava_onevision": Family(_LLAVA, untiled),
    "idefics3": _IDEFICS, "smolvlm": _IDEFICS, "qwen2_5_vl": _QWEN, "qwen3_vl": _QWEN,
}


def family_of(config: Any) -> Family:
    """Raises ValueError for a family that was never run here."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"MLLMs of the family {config.model_type!r} are not known, only {', '.join(FAMILIES)}: add its Family to {__name__}, and a test")
    return FAMILIES[config.model_type]


def picture_side(config: Any, wanted: int | None) -> int:
    """Side in pixels of the square that the model sees. Raises ValueError for a `wanted` one that the model cannot take."""
    vision = config.vision_config
    fixed = getattr(vision, "image_size", None)
    if fixed is not None:
        if wanted not in (None, fixed):
            raise ValueError(f"image_size {wanted}: the MLLM ({config.model_type}) takes pictures of {fixed} pixels only; leave it out")
        return fixed
    side, multiple = wanted or DEFAULT_SIDE, vision.patch_size * vision.spatial_merge_size
    if side % multiple:
        raise ValueError(f"image_size {side} is no multiple of {multiple}, which the MLLM ({config.model_type}) needs")
    return side


@dataclass
class Seen:
    """Pictures as the language model takes them.

    embeds: stand in the picture's places. deepstack: what Qwen3-VL adds there after its first layers, one [places, hidden] a layer.
    """

    embeds: Float[Tensor, "batch tokens hidden"]
    deepstack: list[Float[Tensor, "places hidden"]] = field(default_factory=list)


def see(mllm: nn.Module, image_processor: Any, white_background: Float[Tensor, "batch 3 height width"], side: int) -> Seen:
    """Vision tower and connector of an inner model on pictures in [-1, 1]: the whole of each, as one square of `side` pixels."""
    pixels = preprocess_square(white_background, side, image_processor).to(mllm.get_encoder("image").dtype)
    inputs = family_of(mllm.config).layout(pixels, image_processor)
    with only_first_read(unread_vision_layer(mllm)):
        output = mllm.get_image_features(**inputs, return_dict=True)
    return Seen(torch.stack(list(output.pooler_output)), [torch.cat(list(layer)) for layer in getattr(output, "deepstack_features", [])])


def connector_of(mllm: nn.Module) -> nn.Module:
    """Raises ValueError where the family has none that could be run alone."""
    name = family_of(mllm.config).connector
    if name is None:
        can = ", ".join(kind for kind, family in FAMILIES.items() if family.connector)
        raise ValueError(f"what the vision tower makes of pictures cannot be cached for MLLMs of the family {mllm.config.model_type!r}, only for {can}: "
                         "train on the pictures")
    return mllm.get_submodule(name)


def vision_features(
    mllm: nn.Module, image_processor: Any, white_background: Float[Tensor, "batch 3 height width"], side: int
) -> Float[Tensor, "batch patches channels"]:
    """What `see`'s connector reads. Taken there by a hook: which layers and tokens of the tower those are, is the model's own affair."""
    kept: list[Tensor] = []
    hook = connector_of(mllm).register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    try:
        see(mllm, image_processor, white_background, side)
    finally:
        hook.remove()
    return kept[0]


def connected(mllm: nn.Module, features: Float[Tensor, "batch patches channels"]) -> Seen:
    """What `see` gives of the pictures whose `vision_features` these are."""
    connector = connector_of(mllm)
    return Seen(connector(features.to(next(connector.parameters()).dtype)))


def unread_vision_layer(mllm: nn.Module) -> nn.Module | None:
    """The vision tower's last layer where nothing is read of it: LLaVA takes the one before. None where it is read, or a tower has no such list of layers."""
    if getattr(mllm.config, "vision_feature_layer", None) != -2:
        return None
    layers = getattr(getattr(mllm.get_encoder("image"), "encoder", None), "layers", None)
    return layers[-1] if layers is not None and hasattr(layers[-1], "mlp") else None


def unread_parameters(mllm: nn.Module) -> set[nn.Parameter]:
    """The vision tower's parameters that no output depends on: LLaVA and LLaVA-OneVision read a layer's output, without the last normalisation."""
    last = getattr(mllm.get_encoder("image"), "post_layernorm", None) if hasattr(mllm.config, "vision_feature_layer") else None
    return {p for part in (unread_vision_layer(mllm), last) if part is not None for p in part.parameters()}


def picture_start(mllm: nn.Module, input_ids: Int[Tensor, "batch tokens"]) -> int:
    """The picture's first place: the same in all rows, as every template brings the picture before label and prompt."""
    return int((input_ids[0] == mllm.config.image_token_id).nonzero()[0])


def where(mllm: nn.Module, input_ids: Int[Tensor, "batch tokens"], count: int, length: int) -> Int[Tensor, "3 batch length"] | None:
    """Position ids of `length` tokens that begin as `input_ids` do, with `count` for the picture, where they are not 0, 1, 2, ... (then None).

    Qwen-VL gives a picture's tokens its rows and columns, and goes on after the larger of the two. As every text brings its
    picture at the same place, and is padded on the right, they are the same for all rows.
    """
    if not hasattr(mllm, "get_rope_index"):
        return None
    start, side = picture_start(mllm, input_ids), isqrt(count) * mllm.config.vision_config.spatial_merge_size
    is_image = torch.zeros(1, length, dtype=torch.int)
    is_image[:, start : start + count] = 1
    ids, _ = mllm.get_rope_index(is_image.long(), mm_token_type_ids=is_image, image_grid_thw=torch.tensor([[1, side, side]]))
    return ids.expand(-1, len(input_ids), -1).to(input_ids.device)


def language_inputs(seen: Seen, is_image: Bool[Tensor, "batch tokens"]) -> dict[str, Any]:
    """What the language model takes of a picture beside its embeddings."""
    return {"visual_pos_masks": is_image, "deepstack_visual_embeds": seen.deepstack} if seen.deepstack else {}
