"""`python -m experiments.true_size`: one stage-2 step of Stable Diffusion 1.5 at its own size, with random weights, in fp32 on the CPU.

What can be shown without weights or GPU: that the step runs at 512 pixels, what it takes, that its loss is finite, and that the
adapter's parameters, and no others, receive gradients. About 12 GB of memory and some minutes on one core.
"""

import resource
import time
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import auto_cli

from experiments.benchmarks.true_models import SD15, random_batch, random_stage
from moma_lightning import optim
from moma_lightning.modules.stage2 import Stage2
from moma_lightning.plan.stages import read_experiment


def main(stage: Path = SD15 / "stage2.yaml", size: int = 512, checkpointing: bool = False) -> None:
    """Print the loss before and after one step, which parameters got gradients, time and peak memory.

    Args:
        stage: The YAML whose models these are. CLIP's embedding is the context: the MLLM would not fit beside the rest.
        size: Pixels.
        checkpointing: Recompute the UNet's activations in the backward pass.
    """
    torch.manual_seed(0)
    experiment, cpu = read_experiment(stage), torch.device("cpu")
    model = experiment.model | {"stage2": experiment.model["stage2"] | {"context": "image_encoder", "context_dropout": 0.0}}
    experiment = replace(experiment, model=model, batch_size=1, image_size=size).with_checkpointing("all" if checkpointing else "none")
    module, batch = random_stage(experiment, cpu), random_batch(experiment, cpu)
    assert isinstance(module, Stage2)
    module.configure_model()
    optimizer, begun = optim.build(module.named_parameters(), optim.OptimizerConfig()), time.perf_counter()
    loss = module.sample_losses(batch, torch.Generator().manual_seed(0), drop=True)[0].mean()
    loss.backward()
    optimizer.step()
    told = time.perf_counter() - begun
    report(module)
    with torch.no_grad():
        after = module.sample_losses(batch, torch.Generator().manual_seed(0), drop=True)[0].mean()
    print(f"loss {loss.item():.6f}, after one AdamW step {after.item():.6f}; step {told:.0f} s on {torch.get_num_threads()} thread(s); "
          f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def report(module: Stage2) -> None:
    """Parameters by part: how many, how many are trained, how many have a finite gradient other than 0."""
    adapter = module.adapter
    frozen_parts = {"UNet": module.unet, "VAE": module.vae, "text encoder": module.text_encoder, "image encoder": module.image_encoder}
    trained_parts = {"projector": adapter.image_proj, "context side": adapter.context, "subject side": adapter.subject}
    for name, part in (frozen_parts | trained_parts).items():
        parameters = list(part.parameters())
        moved = [p for p in parameters if p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any()]
        trained = [p for p in parameters if p.requires_grad]
        print(f"{name:<14} {sum(p.numel() for p in parameters) / 1e6:8.2f} M; tensors: {len(parameters)}, trained {len(trained)}, with gradient {len(moved)}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
