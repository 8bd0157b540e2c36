"""Models of transformers and diffusers, read whole or not at all: what a file lacks transformers draws at random, telling it in a table only."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from moma_lightning.hub import loading


def load_whole(model_class: Any, name: str, source: Mapping[str, Any], unread: tuple[str, ...] = (), **options: Any) -> Any:
    """transformers' `from_pretrained` of `source` (`hub.resolve`). Raises ValueError that names the weights which `name` lacks.

    unread: how weights begin that may be missing, since nothing is read of them.
    """
    with loading(name):
        model, told = model_class.from_pretrained(**source, **options, output_loading_info=True)
    refuse_lacking(name, sorted(key for key in told["missing_keys"] if not key.startswith(unread)))
    return model


def require_whole(name: str, pipe: Any) -> None:
    """A diffusers pipeline with all of its weights, and of its tokenizers' words. Raises ValueError."""
    parts = pipe.components
    require_all_weights(name, parts)
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if parts.get(encoder) is not None and parts.get(tokenizer) is not None:
            require_vocabulary(name, parts[tokenizer], parts[encoder].config.vocab_size)


def require_all_weights(name: str, parts: Mapping[str, Any]) -> None:
    """diffusers leaves a parameter that the file lacks without memory, and says so in a warning only. Raises ValueError that names them."""
    modules = {part: module for part, module in parts.items() if isinstance(module, nn.Module)}
    refuse_lacking(name, [f"{part}.{key}" for part, module in modules.items() for key, value in module.named_parameters() if value.is_meta])


def refuse_lacking(name: str, keys: list[str]) -> None:
    if keys:
        raise ValueError(f"{name} lacks {len(keys)} weights of the model ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)}): fetch or write it again")


def require_vocabulary(name: str, tokenizer: Any, vocab_size: int) -> None:
    """A tokenizer whose files are not all there is one of its special tokens alone, without a word. Raises ValueError for less than half of what the
    text tower reads."""
    if len(tokenizer) < vocab_size / 2:
        raise ValueError(f"{name}: its tokenizer knows {len(tokenizer)} tokens, its text tower {vocab_size}: a file of the tokenizer is missing; fetch again")
