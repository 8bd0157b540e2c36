"""bitsandbytes at work: which layers take 8 and 4 bits, a stage 1 that trains LoRA on them, and AdamW with moments of 8 bits."""

import pytest
import torch
from lightning.pytorch import seed_everything

from experiments.mini.models import mini_foundation
from moma_lightning import optim
from moma_lightning.foundation import load_mllm
from moma_lightning.models.image_feature_decoder import DecoderConfig
from moma_lightning.models.lora import LoraOptions
from moma_lightning.modules.stage1 import Stage1
from moma_lightning.optim import OptimizerConfig
from tests.moma_lightning.training.sharded_run import global_batch, train

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_alone_takes_fewer_bits(kind):
    plain, _ = load_mllm(mini_foundation())
    mllm, _ = load_mllm(mini_foundation(mllm_quantization=kind))
    linear = {name for name, module in plain.model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, module in mllm.model.named_modules() if type(module).__name__ == KINDS[kind]}
    assert quantized == {name for name in linear if name.startswith("language_model.")} and 0 < len(quantized) < len(linear)
    assert next(mllm.parameters()).is_cuda


@pytest.mark.parametrize("kind", KINDS)
def test_stage_1_trains_adapters_on_it(kind, tmp_path):
    """The shipped mini models: the prediction is near the unquantized one's, and 20 steps of LoRA lower the loss; what was quantized stays."""
    lora = DecoderConfig(lora=LoraOptions(rank=4))
    seed_everything(0, verbose=False)
    plain = Stage1(mini_foundation(), lora, OptimizerConfig(lr=3e-3)).cuda()
    seed_everything(0, verbose=False)
    module = Stage1(mini_foundation(mllm_quantization=kind), lora, OptimizerConfig(lr=3e-3)).cuda()
    batch = global_batch(0, 0, 1)
    pixels, mask = batch.pixel_values.cuda(), batch.subject_mask.cuda()
    batch = type(batch)(pixels, mask, batch.caption, batch.label, batch.key)
    plain.decoder.load_state_dict({name: p for name, p in module.decoder.state_dict().items() if name in module.decoder.own_parameters()}, strict=False)
    with torch.no_grad():
        cosine = torch.cosine_similarity(plain(batch), module(batch)).min()
    assert 0.95 < cosine < 1
    weight = next(p for name, p in module.named_parameters() if name.endswith("q_proj.base_layer.weight"))
    before = weight.detach().cpu().clone()
    losses = train(module, tmp_path, 1, "auto", accelerator="gpu")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert torch.equal(weight.cpu(), before) and not weight.is_floating_point()  # after training Lightning has it on the CPU


def test_adamw_of_8_bits_goes_where_adamw_goes():
    def trained(kind: str) -> torch.Tensor:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(256, 256, device="cuda"))
        target = torch.randn(256, 256, device="cuda")
        optimizer = optim.build([("weight", weight)], OptimizerConfig(kind=kind, lr=1e-2))
        for _ in range(200):
            optimizer.zero_grad()
            (weight - target).square().mean().backward()
            optimizer.step()
        moment = optimizer.state[weight]["state1" if kind == "adamw8bit" else "exp_avg"]
        assert (moment.dtype == torch.uint8) == (kind == "adamw8bit")
        return (weight - target).detach().square().mean()

    assert trained("adamw8bit").item() == pytest.approx(trained("adamw").item(), abs=0.05)
