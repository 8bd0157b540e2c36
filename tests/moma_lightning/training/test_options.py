import subprocess
import sys

import pytest
import torch

from moma_lightning.models.blocks import blocks_of
from tests.moma_lightning.training.sharded_run import build, global_batch


def gradients(module, draws: int = 1) -> tuple[dict[str, torch.Tensor], int]:
    """Of one step whose random numbers are fixed, and how often layers of the model were run. draws: of noise, for each sample of stage 2's."""
    calls = []
    for layer in [*module.modules()]:
        if type(layer).__name__ in ("BasicTransformerBlock", "LlamaDecoderLayer", "ResnetBlock2D"):
            part = next(child for child in layer.children() if list(child.children()) or list(child.parameters()))
            part.register_forward_hook(lambda *_: calls.append(1))
    module.configure_model()
    module.log = module.log_dict = lambda *_, **__: None
    timesteps = torch.tensor([10, 300, 600, 900]).repeat(draws)
    module.random_draws = lambda latents, *_: (torch.ones(len(timesteps), *latents.shape[1:]), timesteps, None)
    module._log_bands = lambda *_: None
    torch.manual_seed(0)
    batch = global_batch(0, 0, 1)
    loss = module.sample_losses(batch, drop=True, draws=draws)[0].mean() if hasattr(module, "adapter") else module.loss(*module.predicted_and_target(batch))
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
    assert len(blocks_of(module)) == 2 + 2 + 2, "text encoder, vision tower and language model"


def compiled_like_plain(foundation, decoder_folder: str, draws: int) -> None:
    """Stage 2's UNet in two graphs (the reference pass and the denoising one) without a break; backend "eager" leaves the kernels as they are."""
    plain, _ = gradients(build("stage2", foundation, decoder_folder), draws)
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module: compile_module(module, backend="eager", fullgraph=True)
    compiled, _ = gradients(build("stage2", foundation, decoder_folder, compile=True), draws)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert all(torch.allclose(plain[name], compiled[name], rtol=1e-4, atol=1e-6) for name in plain)


@pytest.mark.parametrize("draws", [1, 2])
def test_the_unet_compiles_and_computes_the_same(foundation, decoder_folder, draws):
    """In a process of its own: the type checks of the tests' import hook cannot be traced."""
    code = "\n".join([
        "from moma_lightning.foundation import FoundationConfig",
        f"from {__name__} import compiled_like_plain",
        f"compiled_like_plain({foundation!r}, {decoder_folder!r}, {draws})",
    ])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


def test_stage_1_does_not_claim_to_compile(foundation, decoder_folder):
    with pytest.raises(ValueError, match="Stage1 has no part that was seen to compile"):
        build("stage1", foundation, decoder_folder, compile=True).configure_model()
