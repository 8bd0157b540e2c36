"""Weights of 8 and 4 bits by bitsandbytes, on a CUDA GPU."""

import importlib.util
import os
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

Quantization = Literal["8bit", "4bit"]
#: Vision towers and connectors keep their precision, the latter as they are trained: the language model alone is quantized. Regexes that
#: transformers matches from the start of a module's full name ("model.vision_tower...").
KEPT = ["lm_head", r"(?:.*\.)?(?:vision_tower|vision_model|visual|multi_modal_projector|connector)"]


def require_bitsandbytes(option: str) -> None:
    """Raises ImportError without bitsandbytes and RuntimeError without a GPU; both name the option that wants them."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"{option} needs bitsandbytes: pip install 'moma-lightning[bitsandbytes]'")
    if not torch.cuda.is_available():
        raise RuntimeError(f"{option} needs a CUDA GPU, and there is none here: leave it out")


def quantized(kind: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained`: NF4 with quantized constants (QLoRA, Dettmers et al., NeurIPS 2023) or LLM.int8().

    dtype: of the products where weights have 4 bits. Each process loads onto its own GPU. Raises as `require_bitsandbytes`.
    """
    require_bitsandbytes(f"foundation.mllm_quantization {kind}")
    if kind == "4bit":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
                                    llm_int8_skip_modules=KEPT)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return {"quantization_config": config, "device_map": {"": rank}}


def refuse_quantized(parameters: Iterable[tuple[str, nn.Parameter]], what: str) -> None:
    """ValueError that names the first parameter which is no floating-point one, for `what` cannot do with it."""
    for name, parameter in parameters:
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is quantized (foundation.mllm_quantization): {what}")
