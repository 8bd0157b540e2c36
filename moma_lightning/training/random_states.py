"""Random numbers of training that a kill, a restart or a validation does not change."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from moma_lightning.training.sharding import over_ranks


class RandomStates(Callback):
    """Every training batch begins with the generators as the batch before left them, on each rank, and checkpoints keep them.

    Ranks are seeded alike, so that all build the same models; where training starts, each of several takes generators of its own. Else
    noise, timesteps and dropout would be the same on all.
    What draws numbers in between (validation, a loader being set up) then makes no difference to training, so a resumed
    run, which does some of that once more, computes what an undisturbed one does. On another number of ranks the states cannot
    be those of the checkpoint: a warning says so, and each rank draws anew from its own seed and the step.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.state is None and trainer.world_size > 1:
            draw_anew(torch.initial_seed(), trainer.global_rank)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.state is not None:
            restore(self.state)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.state = collect(pl_module.device)

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": over_ranks(self.state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank, ranks = (self._trainer.global_rank, self._trainer.world_size) if self._trainer else (0, 1)
        if len(state_dict["ranks"]) == ranks:
            self.state = state_dict["ranks"][rank]
            return
        rank_zero_warn(f"the checkpoint is of {len(state_dict['ranks'])} processes and these are {ranks}: noise and dropout are drawn anew")
        before = state_dict["ranks"][0]
        draw_anew(torch.initial_seed(), rank, *(before["torch"][:64].tolist() if before else []))
        self.state = None


def draw_anew(*entropy: int) -> None:
    """Seed Python's, numpy's and torch's generators (GPUs' too) by all of these numbers."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries still draw from it
    torch.manual_seed(seed)


def collect(device: torch.device) -> dict[str, Any]:
    """Python's, numpy's and torch's generators (and that of this rank's GPU), as plain values that `torch.load` reads safely."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - libraries still draw from it
    state: dict[str, Any] = {"python": random.getstate(), "numpy": [name, torch.from_numpy(np.asarray(keys).copy()), *rest], "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: dict[str, Any]) -> None:
    """Set the generators to what `collect` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
