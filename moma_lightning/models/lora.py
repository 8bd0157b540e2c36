"""Low-rank adapters (LoRA, Hu et al., ICLR 2022) on the MLLM's language model, made by peft."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class LoraOptions:
    """W x becomes W x + alpha / rank * B A x, with W frozen and A, B of `rank`; B starts at 0.

    dropout: of x before A, in training. target: regex of the module names in the language model, which must match as a whole; every
    linear layer of attention and MLP by default.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target: str = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def add_adapters(language_model: nn.Module, options: LoraOptions) -> None:
    """Put adapters on the layers that `options.target` names; everything else of the language model is frozen.

    Raises ImportError without peft, ValueError for a target that is no layer's name and for a rank below 1.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("decoder.lora needs peft: pip install 'moma-lightning[lora]'") from error
    if options.rank < 1:
        raise ValueError(f"lora.rank {options.rank}: must be at least 1")
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=options.target)
    try:
        inject_adapter_in_model(config, language_model)
    except ValueError as error:
        layers = {name.split(".", 2)[-1] for name, module in language_model.named_modules() if isinstance(module, nn.Linear)}
        raise ValueError(f"lora.target {options.target!r}: {error}. In layers.<number>. there are {', '.join(sorted(layers))}") from error
    for name, parameter in language_model.named_parameters():
        if is_adapter(name) and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()  # peft gives them the frozen weight's type, in which small steps would be lost


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is one of `add_adapters`."""
    return ".lora_" in name


def merge_adapters(language_model: nn.Module) -> None:
    """Add every adapter to the weight it stands beside, and take it out: the layers are plain ones afterwards."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(language_model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(language_model.get_submodule(parent), own, layer.get_base_layer())
    del language_model.peft_config
