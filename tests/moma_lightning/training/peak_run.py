"""What the planner foretells against the peak of a real step on two gloo processes, with the shipped mini models.

    python -m tests.moma_lightning.training.peak_run --folder runs/peaks

Measured: what a rank holds (parameters with buffers, gradients, optimizer state), and the peak: the first and the last of these, and what
PyTorch's profiler sees allocated on top of them during the third step (activations, gathered parameters, gradients).
"""

import argparse
import itertools
import json
import os
from pathlib import Path

import torch
from lightning.pytorch import Callback

from experiments.mini.models import mini_foundation
from moma_lightning.foundation import image_embed_dim
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.modules.stage1 import Stage1
from moma_lightning.modules.stage2 import Stage2
from moma_lightning.plan.measure import Measured, measure
from moma_lightning.training.strategy import ShardedStrategy
from tests.forked import on_two_processes
from tests.moma_lightning.plan.test_plan import experiment
from tests.moma_lightning.training.sharded_run import Held, Size, build, size_of, train

STAGES = {"stage1": Stage1, "stage2": Stage2}
#: What a rank holds between steps.
KINDS = ("parameters", "gradients", "optimizer")
SIZES = [Size(8, 64), Size(32, 64), Size(8, 128)]


class Peak(Callback):
    """Bytes of the third step at its peak."""

    STEP = 2

    def __init__(self):
        self.bytes: dict[str, int] = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.STEP:
            trainer.optimizers[0].zero_grad()  # the planner's step begins without gradients; Lightning keeps the last step's until the forward pass is done
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self.profile.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.STEP:
            self.profile.stop()
            events = self.profile.profiler.kineto_results.events()
            allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
            states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
            on_top = max(itertools.accumulate(size for _, size in allocations))
            self.bytes = {"on_top": on_top, "peak": on_top + size_of([*module.parameters(), *module.buffers(), *states])}


def decoder_of(folder: Path) -> Path:
    """An untrained image-feature decoder for stage 2."""
    if not (folder / "decoder").exists():
        foundation = mini_foundation()
        ImageFeatureDecoder.from_foundation(foundation, DecoderConfig(), image_embed_dim(foundation)).save_pretrained(folder / "decoder")
    return folder / "decoder"


def measured(folder: Path, stage: str, size: Size) -> dict[str, int]:
    """Train three steps on two processes that this one starts; rank 0's bytes."""
    decoder_of(folder)
    on_two_processes("tests.moma_lightning.training.peak_run", "--folder", str(folder), "--only", stage, str(size.pictures), str(size.side), log=folder / "log")
    return json.loads((folder / "peak.json").read_text())


def planned(stage: str, size: Size) -> Measured:
    return measure(experiment(STAGES[stage], mini_foundation(), size.pictures // 2, size.side), 2)


def main(folder: Path, only: list[str] | None) -> None:
    if only:  # each of the two processes
        stage, size = only[0], Size(int(only[1]), int(only[2]))
        peak, held = Peak(), Held()
        module = build(stage, mini_foundation(), str(decoder_of(folder)))
        train(module, folder, 2, ShardedStrategy(), steps=Peak.STEP + 1, callbacks=[held, peak], size=size)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            (folder / "peak.json").write_text(json.dumps(held.bytes | peak.bytes))
        return
    print("MB of a rank, measured / planned   " + "".join(f"{name:>19}" for name in ("peak", "on top", *KINDS)))
    for stage, size in itertools.product(STAGES, SIZES):
        plan, found = planned(stage, size), measured(folder, stage, size)
        pairs = [(found["peak"], plan.peak), (found["on_top"], plan.peak - plan.parameters - plan.optimizer)]
        pairs += [(found[kind], getattr(plan, kind)) for kind in KINDS]
        told = "".join(f"{a / 1e6:10.2f} /{b / 1e6:7.2f}" for a, b in pairs)
        print(f"{stage}, {size.pictures // 2:2} of {size.side:3} px{'':14}{told}   of it activations planned {plan.activations / 1e6:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs=3)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    main(options.folder, options.only)
