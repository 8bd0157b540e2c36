"""8 and 4 bits: what is asked of transformers and bitsandbytes, and the errors where they cannot be had. gpu/test_quantization.py runs them."""

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.quantizers.quantizers_utils import should_convert_module

from moma_lightning import foundation, optim
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.models.lora import LoraOptions
from moma_lightning.optim import OptimizerConfig
from moma_lightning.quantization import KEPT
from moma_lightning.training.sharding import shard
from tests.tiny_mllms import MLLMS, write


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def bitsandbytes(monkeypatch):
    """Something in its place, without a GPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(bitsandbytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def parameters():
    return [("weight", torch.nn.Parameter(torch.ones(2, 2))), ("bias", torch.nn.Parameter(torch.ones(2)))]


def test_says_how_to_get_bitsandbytes(no_bitsandbytes, tiny_foundation):
    with pytest.raises(ImportError, match=r"foundation.mllm_quantization 4bit needs bitsandbytes: pip install 'moma-lightning\[bitsandbytes\]'"):
        foundation.load_mllm(replace(tiny_foundation, mllm_quantization="4bit"))
    with pytest.raises(ImportError, match=r"optimizer.kind adamw8bit needs bitsandbytes"):
        optim.build(parameters(), OptimizerConfig(kind="adamw8bit"))


def test_says_that_there_is_no_gpu(bitsandbytes, tiny_foundation):
    with pytest.raises(RuntimeError, match="mllm_quantization 8bit needs a CUDA GPU"):
        foundation.load_mllm(replace(tiny_foundation, mllm_quantization="8bit"))
    with pytest.raises(RuntimeError, match="adamw8bit needs a CUDA GPU"):
        optim.build(parameters(), OptimizerConfig(kind="adamw8bit"))


def asked(given, monkeypatch) -> dict:
    """What `load_mllm` calls transformers with."""

    def stop(**options):
        raise Asked(options)

    monkeypatch.setattr(foundation.AutoModelForImageTextToText, "from_pretrained", stop)
    with pytest.raises(Asked) as caught:
        foundation.load_mllm(given, torch.bfloat16)
    return caught.value.args[0]


class Asked(Exception):
    """Nothing is loaded: the options are its argument."""


def test_asks_for_nf4_of_the_language_model_on_this_processs_gpu(gpu, tiny_foundation, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    options = asked(replace(tiny_foundation, mllm_quantization="4bit", mllm_dtype="bfloat16"), monkeypatch)
    config = options["quantization_config"]
    assert config.load_in_4bit and not config.load_in_8bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 == options["dtype"] and options["device_map"] == {"": 3}
    assert config.llm_int8_skip_modules == KEPT


@pytest.mark.parametrize("family", MLLMS)
def test_the_language_model_alone_is_converted(family, tmp_path):
    write(family, tmp_path)
    with torch.device("meta"):
        mllm = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    linear = {name for name, module in mllm.named_modules() if isinstance(module, torch.nn.Linear)}
    converted = {name for name in linear if should_convert_module(name, KEPT)}
    own = {name for name in linear if name.startswith(("model.language_model.", "model.text_model."))}
    assert converted == own and 0 < len(own) < len(linear)


def test_asks_for_int8(gpu, tiny_foundation, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    options = asked(replace(tiny_foundation, mllm_quantization="8bit"), monkeypatch)
    assert options["quantization_config"].load_in_8bit and not options["quantization_config"].load_in_4bit
    assert options["device_map"] == {"": 1} and options["quantization_config"].llm_int8_skip_modules == KEPT


def test_without_it_nothing_is_asked(tiny_foundation, monkeypatch):
    assert set(asked(tiny_foundation, monkeypatch)) == {"pretrained_model_name_or_path", "dtype", "output_loading_info"}


def test_the_optimizer_is_bitsandbytes_with_the_same_groups(gpu, monkeypatch):
    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    config = OptimizerConfig(kind="adamw8bit", lr=1e-3, weight_decay=0.1)
    made, plain = optim.build(parameters(), config), optim.build(parameters(), replace(config, kind="adamw"))
    assert type(made).__name__ == "AdamW8bit" and type(plain) is torch.optim.AdamW
    assert [g["weight_decay"] for g in made.param_groups] == [g["weight_decay"] for g in plain.param_groups] == [0.1, 0.0]


def with_bytes(tiny_foundation, **options) -> ImageFeatureDecoder:
    """A decoder on an MLLM one layer of which is integers, as bitsandbytes makes them."""
    mllm, processor = foundation.load_mllm(tiny_foundation)
    layer = mllm.model.language_model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.mul(100).to(torch.int8), requires_grad=False)
    return ImageFeatureDecoder(mllm, processor, 12, DecoderConfig(**options))


def test_a_quantized_language_model_is_not_trained_and_not_sharded(tiny_foundation):
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight is quantized .*use a decoder with decoder\.lora"):
        with_bytes(tiny_foundation)
    decoder = with_bytes(tiny_foundation, lora=LoraOptions(target=r"layers\.\d+\.self_attn\.q_proj"))
    assert sum("lora_" in name for name in decoder.own_parameters()) == 4
    with pytest.raises(ValueError, match=r"up_proj\.weight is quantized .*--trainer\.strategy ddp"):
        shard(decoder, [], Mock(spec=DeviceMesh), bf16=False)
