"""`python -m experiments.gpu_step --stage experiments/sd15_llava7b/stage2.yaml`: a YAML's training at its own size on one GPU, with random weights.

What can be shown without weights, shards and a cluster: that Lightning trains the stage on the GPU, how long a step takes, and what it holds at its peak,
to set against `make plan GPUS=1` (the paper's stage 1 needs 114 GB by it). The batch lies on the GPU: no time goes into loading.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from experiments.benchmarks.true_models import random_batch, random_stage
from moma_lightning.plan.stages import read_experiment
from moma_lightning.training.options import Checkpointing

#: Steps before the clock counts: kernels are chosen, memory is taken, a compiled UNet is compiled.
WARM_UP = 3


class Clock(Callback):
    """Seconds of each step after the first few, their losses, and the peak of the memory that tensors took, in bytes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.synchronize()
        if batch_idx == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.synchronize()
        self.losses.append(float(outputs["loss"]))
        if batch_idx >= WARM_UP:
            self.seconds.append(time.perf_counter() - self.begun)
            self.peak = torch.cuda.max_memory_allocated()


def main(
    stage: Path, steps: int = 13, strategy: Literal["auto", "sharded"] = "sharded", batch_size: int | None = None,
    activation_checkpointing: Checkpointing | None = None, compile: bool | None = None,
) -> None:
    """Train some steps; print seconds a step, samples a second, peak memory and losses.

    Args:
        stage: The YAML.
        steps: Of them the first three do not count.
        strategy: FSDP2 on the one GPU, as the YAMLs ask for, or no strategy.
        batch_size: In place of the YAML's.
        activation_checkpointing: In place of the YAML's.
        compile: Compile stage 2's UNet, in place of the YAML's.
    """
    if steps <= WARM_UP:
        raise ValueError(f"steps {steps}: the first {WARM_UP} do not count, take more")
    experiment = read_experiment(stage)
    asked = {"activation_checkpointing": activation_checkpointing, "compile": compile}
    training = experiment.model["training"] | {name: value for name, value in asked.items() if value is not None}
    experiment = replace(experiment, batch_size=batch_size or experiment.batch_size, model=experiment.model | {"training": training})
    torch.manual_seed(0)
    device, clock = torch.device("cuda"), Clock()
    module = random_stage(experiment, device)
    loader = DataLoader([random_batch(experiment, device)] * steps, batch_size=None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(fast_dev_run=steps, default_root_dir=folder, accelerator="gpu", devices=1, strategy=strategy, callbacks=[clock],
                          precision="bf16-mixed" if experiment.bf16 else "32-true", gradient_clip_val=1.0,
                          enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, loader)
    middle = statistics.median(clock.seconds)
    print(f"{stage}: {experiment.batch_size} x {experiment.image_size} px, noises a sample: {experiment.draws}, "
          f"{strategy}, {experiment.training.activation_checkpointing}, "
          f"{'compiled, ' if experiment.training.compile else ''}{torch.cuda.get_device_name()}, torch {torch.__version__}: "
          f"{middle:.3f} s a step [{min(clock.seconds):.3f}, {max(clock.seconds):.3f}] of {len(clock.seconds)}, "
          f"{experiment.batch_size / middle:.1f} samples/s; peak {clock.peak / 1e9:.2f} GB; loss {clock.losses[0]:.4f} to {clock.losses[-1]:.4f}", flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
