"""What both stages share: checkpoints that hold trained parameters only, and the optimizer."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from moma_lightning import optim
from moma_lightning.batch import CachedBatch, TripletBatch, counted
from moma_lightning.digests import same_identity
from moma_lightning.metrics import SampleMean
from moma_lightning.models.trained_weights import check_fit
from moma_lightning.training.ema import EMA
from moma_lightning.training.options import TrainingOptions, checkpoint_activations
from moma_lightning.training.sharding import clip_by_norm, plain_name, shard, whole_like
from moma_lightning.training.strategy import FlatShardedStrategy, shard_mesh

logger = logging.getLogger(__name__)


def stated(options: Mapping[str, str | None]) -> dict[str, str]:
    """The options that are not None: a cache made before an option was there is as good as one made with it at None."""
    return {name: value for name, value in options.items() if value is not None}


class TrainedPartModule(LightningModule):
    """A LightningModule most of which is frozen: its checkpoints hold what is trained, and are loaded back strictly."""

    def __init__(self, optimizer: optim.OptimizerConfig, training: TrainingOptions):
        super().__init__()
        self.strict_loading = False  # the frozen weights are not in checkpoints; on_load_checkpoint checks the others
        self.optimizer_config, self.training_options = optimizer, training
        self._is_configured = False
        self.val_loss = SampleMean()

    def units(self) -> list[nn.Module]:
        """What is gathered as one in sharded training (`sharding.shard`), and compiled as one: inner modules first."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Activation checkpointing, compilation, sharding where the strategy brings a mesh, types of what is frozen. Called by the Trainer, often."""
        if self._is_configured:
            return
        self._is_configured = True
        checkpoint_activations(self, self.training_options.activation_checkpointing)
        if self.training_options.compile:
            self.compile_parts()
        bf16 = self._trainer is not None and self._trainer.precision == "bf16-mixed"  # the planner has no Trainer
        if self.device_mesh is not None:
            shard(self, self.units(), shard_mesh(self.device_mesh), bf16=bf16)
        elif bf16:
            self.hold_frozen()

    def hold_frozen(self) -> None:
        """Convert the units' frozen parameters to bfloat16, but for those that a checkpoint keeps. They stay so: build the stage anew for float32.

        Autocast would convert those of every product anew in each step. Sharding's units are gathered so too (`sharding.shard`).
        """
        kept = {id(tensor) for tensor in self.kept().values()}
        for parameter in (p for unit in self.units() for p in unit.parameters()):
            if parameter.dtype == torch.float32 and not parameter.requires_grad and id(parameter) not in kept:
                parameter.data = parameter.data.to(torch.bfloat16)

    def features(self, batch: TripletBatch) -> dict[str, Tensor]:
        """What the frozen models make of a batch, [batch, ...] each, for a cache (`datamodules/caches`)."""
        raise NotImplementedError

    def cache_identity(self) -> dict[str, str]:
        """What `features` depends on: models (`digests.identity`), options that are set (`stated`).

        Raises ValueError where options do not allow a cache.
        """
        raise NotImplementedError

    def own_class(self) -> dict[str, str]:
        """For `cache_identity`: a class that is not this package's, which may make other features."""
        kind = type(self)
        return {} if kind.__module__.startswith("moma_lightning.") else {"class": f"{kind.__module__}.{kind.__qualname__}"}

    def setup(self, stage: str) -> None:
        """Refuses a precision that small steps vanish in, validations by the clocks of several ranks, a strategy that saves what is frozen, and, by name,
        cached shards made by other models or options.
        """
        if stage == "fit" and self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(f"trainer.precision {self.trainer.precision}: the optimizer's small steps vanish in trained weights of 16 bits; "
                             "use bf16-mixed, which holds what is frozen in bfloat16")
        if stage == "fit" and getattr(self.trainer, "_val_check_time_interval", None) is not None and self.trainer.world_size > 1:
            raise ValueError("trainer.val_check_interval is a time, which each rank takes from its own clock: one would validate where another trains on, and "
                             "both wait for each other. With several ranks set it to a number of batches, or to a fraction of an epoch")
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy) and not isinstance(strategy, FlatShardedStrategy):
            raise ValueError("trainer.strategy: Lightning's own FSDPStrategy would gather the frozen models to save; "
                             "`--trainer.strategy fsdp` is the supported variant")
        made_by: dict[str, dict[str, str]] = getattr(getattr(self.trainer, "datamodule", None), "made_by", {})
        own = self.cache_identity() if made_by else {}
        for path, other in made_by.items():
            names = [name for name in sorted(own.keys() | other.keys()) if not same_identity(other.get(name), own.get(name))]
            differing = [f"{name} ({other.get(name, 'none')}, not {own.get(name, 'none')})" for name in names]
            if differing:
                raise ValueError(f"{path} was made with another {', '.join(differing)}: make the cache again, or train on the pictures")

    def compile_parts(self) -> None:
        raise ValueError(f"training.compile: {type(self).__name__} has no part that was seen to compile; set it to false")

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """By the names that they have without a strategy's wrappers."""
        return ((plain_name(name), parameter) for name, parameter in super().named_parameters(*args, **kwargs))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Logs `train/grad_norm`, the norm of all gradients before they are clipped by it, which Lightning's own clipping does not give away."""
        if gradient_clip_val is None or gradient_clip_val <= 0 or gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if isinstance(self.trainer.strategy, FlatShardedStrategy):  # FSDP1's own method is what knows the norm
            norm = self.trainer.model.clip_grad_norm_(gradient_clip_val)
        else:
            norm = clip_by_norm([p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val)
        self.log("train/grad_norm", norm, batch_size=1)

    def log_val_loss(self, loss: Tensor, batch: TripletBatch | CachedBatch) -> None:
        """`val/loss`, the mean over the samples of all ranks, each counted once; Lightning's own mean over ranks rounds their numbers of samples down."""
        self.val_loss.update(loss, counted(batch))
        self.log("val/loss", self.val_loss, prog_bar=True)

    def number_of(self, batch_idx: int) -> int:
        """A validation batch's number in the split, whichever rank reads it."""
        return batch_idx * self.trainer.world_size + self.trainer.global_rank

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the module, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in self.kept()}
        checkpoint["options"] = self.kept_options()

    def kept_options(self) -> dict[str, Any]:
        """Options that what is trained means nothing without, by name: a checkpoint of others is refused, where shapes would let it pass."""
        return {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError, with the file, for a checkpoint of other options, names or shapes."""
        source = self._trainer.ckpt_path if self._trainer is not None and self._trainer.ckpt_path else "the checkpoint"
        now = self.kept_options()
        if other := [f"{key}: {value} in the checkpoint, {now.get(key)} now" for key, value in checkpoint.get("options", now).items() if value != now.get(key)]:
            raise ValueError("\n  ".join([f"{source} was trained with other options: train under another trainer.default_root_dir", *other]))
        logger.info("%s", check_fit(str(source), checkpoint["state_dict"], whole_like(self.kept())))
        if "ema" in checkpoint and self._trainer is not None and not any(isinstance(callback, EMA) for callback in self._trainer.callbacks):
            rank_zero_warn(f"{source} holds an average of the weights (EMA), which is left out: no EMA is among trainer.callbacks")

    def configure_optimizers(self) -> Any:
        """Raises ValueError as `optim.configure`, and for a falling schedule whose last step Lightning does not know."""
        trainer, schedule = self.trainer, self.optimizer_config.schedule
        is_scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)
        if schedule != "constant" and is_scheduled and trainer.max_epochs != -1 and not trainer.fast_dev_run:
            raise ValueError(f"optimizer.schedule {schedule!r} would not fall to its end: how many steps trainer.max_epochs are, Lightning tells before "
                             "GradientAccumulationScheduler has said how many batches a step has. Set trainer.max_steps, and trainer.max_epochs to -1")
        return optim.configure(self.named_parameters(), self.optimizer_config, self.trainer.estimated_stepping_batches)
