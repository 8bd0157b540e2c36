import pytest
import torch

from moma_lightning.training.options import blocks_of
from tests.moma_lightning.training.sharded_run import build, global_batch


def gradients(module) -> tuple[dict[str, torch.Tensor], int]:
    """Of one step whose random numbers are fixed, and how often layers of the model were run."""
    calls = []
    for layer in [*module.modules()]:
        if type(layer).__name__ in ("BasicTransformerBlock", "LlamaDecoderLayer", "ResnetBlock2D"):
            part = next(child for child in layer.children() if list(child.children()) or list(child.parameters()))
            part.register_forward_hook(lambda *_: calls.append(1))
    module.configure_model()
    module.log = module.log_dict = lambda *_, **__: None
    module.random_draws = lambda latents, generator, drop: (torch.ones_like(latents), torch.tensor([10, 300, 600, 900]), None)
    module._log_bands = lambda *_: None
    torch.manual_seed(0)
    batch = global_batch(0, 0, 1)
    loss = module.sample_losses(batch, drop=True)[0].mean() if hasattr(module, "adapter") else module.loss(module(batch), module.target(batch))
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}, len(calls)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_recomputation_gives_the_same_gradients(foundation, decoder_folder, stage):
    plain, calls = gradients(build(stage, foundation, decoder_folder))
    counts = [calls]
    for policy in ("blocks", "all"):
        again, calls = gradients(build(stage, foundation, decoder_folder, activation_checkpointing=policy))
        counts.append(calls)
        assert all(torch.equal(plain[name], again[name]) for name in plain), policy
    assert counts[0] < counts[1] and (counts[1] < counts[2] if stage == "stage2" else counts[1] == counts[2])


def test_blocks_are_the_layers_of_transformers_models(foundation, decoder_folder):
    module = build("stage2", foundation, decoder_folder)
    names = sorted({type(block).__name__ for block in blocks_of(module)})
    assert names == ["CLIPEncoderLayer", "LlamaDecoderLayer"]
    assert len(blocks_of(module)) == 2 + 2 + 2 + 2, "text encoder, image encoder, vision tower and language model"
