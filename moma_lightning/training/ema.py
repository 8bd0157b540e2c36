"""An exponential moving average of the trained parameters."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moma_lightning.training.sharding import local, shard_state


class EMA(Callback):
    """Keeps average <- decay * average + (1 - decay) * parameter after every optimizer step, sharded where parameters are.

    The average is what validation judges and what is exported at the end; training goes on with the parameters themselves, and
    checkpoints hold both. decay is lower in the beginning: min(decay, (1 + step) / (10 + step)), so that a short training is
    not an average of its start. Lightning's own callback averages the frozen part too and does not shard.

    Raises ValueError on resume when the checkpoint's average does not fit the module.
    """

    def __init__(self, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay {decay} is not in [0, 1)")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._step, self._is_swapped = 0, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in _trained(pl_module)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        # Most strategies read a checkpoint before they move the module to its device.
        self.average = {name: self.average[name].to(parameter.device) for name, parameter in _trained(pl_module)}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        weight = 1 - min(self.decay, (1 + self._step) / (10 + self._step))
        averages = [local(self.average[name]) for name, _ in _trained(pl_module)]
        torch._foreach_lerp_(averages, [local(p) for _, p in _trained(pl_module)], weight)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._is_swapped:
            raise RuntimeError("EMA: a checkpoint is being written while the average is in the module's place")
        checkpoint["ema"] = dict(self.average)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        parameters = dict(_trained(pl_module))
        loaded = checkpoint.get("ema") or parameters  # of a training without an average: it starts where that one stood
        if loaded.keys() != parameters.keys():
            raise ValueError("EMA: the checkpoint's average is of other parameters than those that are trained")
        self.average = {n: t.detach().to(parameters[n].device).clone() for n, t in shard_state(loaded, parameters).items()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, False)  # before ModelCheckpoint, which Lightning calls last

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, True)  # the module exports next

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._swap(pl_module, False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap(pl_module, False)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule, wanted: bool) -> None:
        if self._is_swapped == wanted or not self.average:
            return
        for name, parameter in _trained(pl_module):
            mine, theirs = local(self.average[name]), local(parameter)
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
        self._is_swapped = wanted


def _trained(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
