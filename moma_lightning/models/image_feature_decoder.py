"""The multimodal generative image-feature decoder (paper section 3, figure 2 top left): MLLM + token + mapping."""

import copy
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin

from moma_lightning.foundation import FoundationConfig, load_mllm
from moma_lightning.hub import find_folder
from moma_lightning.models import mllm as mllms
from moma_lightning.models.instruction import PICTURE, instruction
from moma_lightning.models.last_layer import ReadAt
from moma_lightning.models.lora import LoraOptions, add_adapters, is_adapter, merge_adapters
from moma_lightning.models.mapping import Mapping
from moma_lightning.models.mllm import Seen, family_of, language_inputs, picture_side, picture_start, see, where
from moma_lightning.models.published import PublishedModel
from moma_lightning.models.trained_weights import CONFIG, WEIGHTS, read_config, read_weights, write_folder
from moma_lightning.models.widths import check_hidden_size
from moma_lightning.quantization import refuse_quantized


@dataclass
class DecoderConfig:
    """Options of the image-feature decoder.

    template: the instruction's wording (see models/instruction.py).
    learnable_token: append one learnable token and read the output there; None: as the template has it (paper yes, released
        no). Without it the output is read at the instruction's last token.
    trainable: regexes of the decoder's parameter names; every parameter in which none is found stays frozen. None: all but the
        MLLM's vision tower is trained, which is language model, connector, token and mapping.
    image_size: side in pixels of the square picture, for MLLMs that take any (Qwen-VL); None: the MLLM's own, or 448.
    lora: train low-rank adapters in the language model's place, which stays frozen unless `trainable` names it.
    """

    template: Literal["paper", "released"] = "paper"
    learnable_token: bool | None = None
    trainable: list[str] | None = None
    image_size: int | None = None
    lora: LoraOptions | None = None

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "DecoderConfig":
        """What `asdict` gave, out of a file."""
        return cls(**options | {"lora": LoraOptions(**options["lora"]) if options.get("lora") else None})


class ImageFeatureDecoder(nn.Module, PublishedModel):
    """Predicts the CLIP image embedding of the picture a prompt describes, with the subject of a white-background picture.

    Only the inner model of `mllm` is kept: there is no language-model head, so no vocabulary logits. Parameter names begin
    with `mllm.` (LLaVA: `vision_tower`, `multi_modal_projector`, `language_model`), `token` or `mapping.`.
    """

    entries = ("read_picture", "predict", "vision_features", "from_features")  # called from outside, beside `forward`: sharded training is told of them

    def __init__(self, mllm: PreTrainedModel, processor: ProcessorMixin, embed_dim: int, config: DecoderConfig):
        super().__init__()
        hidden_size = mllm.get_input_embeddings().weight.shape[1]
        self.config, self.embed_dim = config, embed_dim
        self.family, self.picture_side = family_of(mllm.config), picture_side(mllm.config, config.image_size)
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.image_token = processor.image_token
        self.mllm = mllm.model
        if config.lora is not None:
            add_adapters(self.mllm.get_decoder(), config.lora)
        ReadAt(self.mllm.get_decoder().layers[-1])
        self.mapping = Mapping(hidden_size, embed_dim)
        has_token = config.template == "paper" if config.learnable_token is None else config.learnable_token
        self.token = nn.Parameter(hidden_size**-0.5 * torch.randn(hidden_size)) if has_token else None
        self._choose_trained()

    @classmethod
    def from_foundation(
        cls, foundation: FoundationConfig, config: DecoderConfig, embed_dim: int, dtype: torch.dtype = torch.float32
    ) -> "ImageFeatureDecoder":
        """A decoder that has not seen stage 1: the foundation's MLLM in `dtype` with a new token and mapping."""
        mllm, processor = load_mllm(foundation, dtype)
        return cls(mllm, processor, embed_dim, config)

    def _choose_trained(self) -> None:
        patterns = self.config.trainable
        for pattern in patterns or ():
            if pattern != r"^token$" and not any(re.search(pattern, name) for name, _ in self.named_parameters()):
                raise ValueError(f"trainable: {pattern!r} is found in no parameter name of the image-feature decoder")
        fixed = self.vision_parameters() if self.config.lora is None else self.vision_parameters() | self.language_parameters()
        unread = mllms.unread_parameters(self.mllm)  # would get no gradient, which DDP and sharded checkpoints do not take
        for name, parameter in self.named_parameters():
            chosen = name not in fixed if patterns is None else any(re.search(pattern, name) for pattern in patterns) and parameter not in unread
            if chosen:
                refuse_quantized([(name, parameter)], "it cannot be trained, nor take what was trained; use a decoder with decoder.lora")
            parameter.requires_grad_(chosen or is_adapter(name))

    def vision_parameters(self) -> dict[str, nn.Parameter]:
        """The vision tower's, without what its family calls connector."""
        return {f"mllm.{name}": p for name, p in self.mllm.named_parameters() if re.search(self.family.vision, name)}

    def language_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name.startswith(self._language_prefix())}

    def _language_prefix(self) -> str:
        (part,) = (name for name, module in self.mllm.named_children() if module is self.mllm.get_decoder())
        return f"mllm.{part}."

    def train(self, mode: bool = True) -> "ImageFeatureDecoder":
        """As nn.Module's, but the frozen vision tower stays in eval mode."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_parameters().values()):
            self.mllm.get_encoder("image").eval()
        return self

    def forward(
        self, white_background: Float[Tensor, "batch 3 height width"], label: list[str], prompt: list[str]
    ) -> Float[Tensor, "batch embed_dim"]:
        """Eq. 4's MLLM(CLIP(I_wb), P, Token), mapped; one label and one prompt for each picture in [-1, 1], of any size."""
        return self._of_seen(self.see(white_background), label, prompt)

    @torch.no_grad()
    def vision_features(self, white_background: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches channels"]:
        """What a frozen vision tower makes of pictures, for `from_features`. Raises ValueError for a trained tower, and where `connector_of` does."""
        if any(parameter.requires_grad for parameter in self.vision_parameters().values()):
            raise ValueError("decoder.trainable names the vision tower: what it makes of pictures changes in training and cannot be cached")
        return mllms.vision_features(self.mllm, self.image_processor, white_background, self.picture_side)

    def from_features(self, features: Float[Tensor, "batch patches channels"], label: list[str], prompt: list[str]) -> Float[Tensor, "batch embed_dim"]:
        """As `forward`, of pictures whose `vision_features` these are."""
        return self._of_seen(mllms.connected(self.mllm, features), label, prompt)

    def _of_seen(self, seen: Seen, label: list[str], prompt: list[str]) -> Float[Tensor, "batch embed_dim"]:
        pictures, count = seen.embeds.shape[:2]
        if not pictures == len(label) == len(prompt):
            raise ValueError(f"{pictures} pictures, {len(label)} labels and {len(prompt)} prompts: must be as many")
        input_ids, mask = (t.to(seen.embeds.device) for t in self.tokenize(label, prompt, count))
        embeds, is_image = self.mllm.get_input_embeddings()(input_ids), input_ids == self.mllm.config.image_token_id
        embeds = embeds.masked_scatter(is_image[..., None], seen.embeds.to(embeds.dtype))
        if self.token is not None:
            embeds, mask = append_token(embeds, mask, self.token)
            is_image = nn.functional.pad(is_image, (0, 1))
        places = where(self.mllm, input_ids, count, embeds.shape[1])
        return self._mapped(embeds, mask, position_ids=places, attention_mask=mask.long(), use_cache=False, **language_inputs(seen, is_image))

    def _mapped(self, embeds: Float[Tensor, "batch tokens hidden"], mask: Bool[Tensor, "batch tokens"], **options) -> Float[Tensor, "batch embed_dim"]:
        """The language model's output at each row's last real token, mapped to an embedding."""
        last = mask.sum(1) - 1
        hidden = self.mllm.get_decoder()(inputs_embeds=embeds, read_at=last, **options).last_hidden_state
        return self.mapping(hidden[torch.arange(len(last), device=last.device), last].to(self.mapping.down_proj.weight.dtype))

    @torch.no_grad()
    def read_picture(self, white_background: Float[Tensor, "1 3 height width"]) -> DynamicCache:
        """The language model's keys and values of the instruction up to the picture's last token, which no label or prompt changes."""
        seen, cache = self.see(white_background), DynamicCache()
        input_ids = self.tokenize([""], [""], seen.embeds.shape[1])[0].to(seen.embeds.device)
        start = picture_start(self.mllm, input_ids)
        before = self.mllm.get_input_embeddings()(input_ids[:, :start])
        embeds = torch.cat([before, seen.embeds.to(before.dtype)], dim=1)
        is_image = torch.arange(embeds.shape[1], device=embeds.device)[None] >= start
        places = where(self.mllm, input_ids, seen.embeds.shape[1], embeds.shape[1])
        self.mllm.get_decoder()(inputs_embeds=embeds, position_ids=places, cache=cache, use_cache=True, **language_inputs(seen, is_image))
        return cache

    @torch.no_grad()
    def predict(self, picture: DynamicCache, label: str, prompt: list[str]) -> Float[Tensor, "batch embed_dim"]:
        """What `forward` gives for each prompt with the picture that `read_picture` read: only the words after it are computed."""
        cache = copy.deepcopy(picture)  # the language model appends to it
        cache.batch_repeat_interleave(len(prompt))
        input_ids, mask = (t.to(self.mapping.down_proj.weight.device) for t in self.tokenize([label] * len(prompt), prompt, 1))
        start, read = picture_start(self.mllm, input_ids), picture.get_seq_length()
        embeds, mask = self.mllm.get_input_embeddings()(input_ids[:, start + 1 :]), mask[:, start + 1 :]
        if self.token is not None:
            embeds, mask = append_token(embeds, mask, self.token)
        attended = nn.functional.pad(mask.long(), (read, 0), value=1)
        places = where(self.mllm, input_ids, read - start, attended.shape[1])
        places = None if places is None else places[..., read:]
        return self._mapped(embeds, mask, position_ids=places, attention_mask=attended, cache=cache, use_cache=True)

    def see(self, white_background: Float[Tensor, "batch 3 height width"]) -> Seen:
        """The pictures as the language model takes them: vision tower and connector."""
        return see(self.mllm, self.image_processor, white_background, self.picture_side)

    def tokenize(
        self, label: list[str], prompt: list[str], image_tokens: int
    ) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """Instructions as right-padded token ids with `image_tokens` places for the picture, and which of them are real."""
        texts = [instruction(self.config.template, a, b) for a, b in zip(label, prompt, strict=True)]
        for text in texts:
            if text.count(PICTURE) != 1 or self.image_token in text.replace(PICTURE, ""):
                raise ValueError(f"label and prompt must not contain {' or '.join({PICTURE, self.image_token})}: {text!r}")
        texts = [text.replace(PICTURE, f"{self.family.before}{self.image_token}{self.family.after}") for text in texts]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        # Of each row's one place for the picture as many, after tokenizing: LLaVA's 576 in the text take the tokenizer far longer than its words.
        times = torch.where(tokens.input_ids == self.mllm.config.image_token_id, image_tokens, 1).flatten()
        ids, mask = (t.flatten().repeat_interleave(times).view(len(texts), -1) for t in (tokens.input_ids, tokens.attention_mask))
        return ids, mask.bool()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What the foundation's MLLM does not hold: the token, the mapping and whatever of the MLLM is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad or not name.startswith("mllm.")}

    def merge_lora(self) -> "ImageFeatureDecoder":
        """Add the adapters to the weights beside them: the same outputs, from a decoder whose file then holds the whole language model.

        Raises ValueError for a decoder without adapters.
        """
        if self.config.lora is None:
            raise ValueError("this image-feature decoder has no LoRA adapters to merge")
        merge_adapters(self.mllm.get_decoder())
        patterns = self.config.trainable
        if patterns is not None:
            patterns = [*patterns, f"^{re.escape(self._language_prefix())}"]
        self.config = replace(self.config, lora=None, trainable=patterns)
        self._choose_trained()
        return self

    def _save_pretrained(self, save_directory: Path) -> None:
        """`own_parameters` (`model.safetensors`) and the options (`config.json`)."""
        sizes = {"embed_dim": self.embed_dim, "hidden_size": self.mapping.gate_proj.in_features}
        write_folder(save_directory, self.own_parameters(), sizes | {"decoder": asdict(self.config)})

    def describe(self) -> dict[str, str]:
        own = sum(p.numel() for p in self.own_parameters().values()) / 1e6
        token = "no" if self.token is None else "one"
        lora = f", LoRA of rank {self.config.lora.rank}" if self.config.lora else ""
        return {
            "title": "MoMA image-feature decoder",
            "details": f"Predicts a CLIP image embedding of {self.embed_dim} numbers from a picture and a prompt: {own:.2f} M parameters on top of "
                       f"an MLLM of width {self.mapping.gate_proj.in_features}; template `{self.config.template}`, {token} learnable token{lora}.",
            "usage": 'ImageFeatureDecoder.from_pretrained("owner/name@revision", foundation)  # or decoder: owner/name@revision in a YAML',
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, foundation: FoundationConfig) -> "ImageFeatureDecoder":  # type: ignore[override]
        """Read a folder of `save_pretrained`, here or as `owner/name@revision` on the hub, in eval mode, the MLLM in the foundation's `mllm_dtype`.

        Raises FileNotFoundError for a missing file, ValueError (with file, keys and shapes) for one that does not fit the
        foundation's MLLM.
        """
        folder = find_folder(str(folder), [WEIGHTS, CONFIG])
        options = read_config(folder)
        check_hidden_size(folder, options.get("hidden_size"), foundation)
        dtype = getattr(torch, foundation.mllm_dtype)
        decoder = cls.from_foundation(foundation, DecoderConfig.from_dict(options["decoder"]), options["embed_dim"], dtype)
        unread = mllms.unread_parameters(decoder.mllm)  # which a trained vision tower's file once held
        read_weights(folder, decoder.own_parameters(), {name for name, p in decoder.named_parameters() if p in unread})
        return decoder.eval()


def append_token(
    embeds: Float[Tensor, "batch tokens hidden"], mask: Bool[Tensor, "batch tokens"], token: Float[Tensor, " hidden"]
) -> tuple[Float[Tensor, "batch tokens_plus_1 hidden"], Bool[Tensor, "batch tokens_plus_1"]]:
    """Put the learnable token right after each row's last real token (right-padded rows)."""
    embeds, mask = nn.functional.pad(embeds, (0, 0, 0, 1)), nn.functional.pad(mask, (0, 1))
    place = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True)
    return torch.where(place[..., None], token.to(embeds.dtype), embeds), mask | place
