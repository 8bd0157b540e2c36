"""The strategy of sharded training, on GPUs (NCCL) and, for tests, on CPUs (gloo)."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh

from moma_lightning.models.trained_weights import check_fit
from moma_lightning.training import checkpoint_folder
from moma_lightning.training.checkpoint_io import naming
from moma_lightning.training.sharding import shard_optimizer_state, shard_state, whole

#: The parts of a checkpoint that hold tensors; everything else is small and the same on every rank.
TENSORS = ("state_dict", "optimizer_states", "ema")


class ShardedStrategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state sharded over all ranks by FSDP2; `--trainer.strategy sharded`.

    shard_size: ranks that hold one whole copy, usually those of a node; the copies are then reduced like DDP's (HSDP). None: one
        copy over all ranks.
    save_distributed_checkpoint: False writes one file that any strategy and any number of ranks can read, gathered on rank 0.
        True writes a folder, each rank its part at once: for models of billions of trained parameters. It is read by this
        strategy on any number of ranks.

    Raises ValueError when `shard_size` is not positive or does not divide the number of ranks.
    """

    def __init__(self, shard_size: int | None = None, save_distributed_checkpoint: bool = False, **kwargs: Any):
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)
        self.shard_size = shard_size

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        copy = ranks if self.shard_size is None else self.shard_size
        if copy < 1 or ranks % copy:
            raise ValueError(f"shard_size {copy} does not divide the {ranks} ranks")
        # Lightning's mesh has two dimensions, meant for data and tensor parallelism. Of the second this project has none, so the
        # place is taken by the ranks of a copy.
        self._data_parallel_size, self._tensor_parallel_size = ranks // copy, copy
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()  # still sharded: the module leaves out what is frozen before anything is gathered

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        tensors = {name: checkpoint.pop(name) for name in TENSORS if name in checkpoint}
        if self._save_distributed_checkpoint:
            checkpoint_folder.save(path, tensors, checkpoint, self.global_rank, self.barrier, self.broadcast)
        else:
            checkpoint |= {name: whole(part) for name, part in tensors.items()}
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path)
            self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if not self.broadcast(path.is_dir()):  # rank 0's view: other nodes may see what was there before
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        with naming(path):
            rest = torch.load(path / checkpoint_folder.REST, weights_only=weights_only)
            tensors = self._empty_tensors(path)
            dcp.load(tensors, checkpoint_id=path)
        return rest | tensors

    def _empty_tensors(self, path: Path) -> dict[str, Any]:
        """What a folder's tensors are read into: laid out for the ranks of now, whatever they were at saving."""
        module = self.lightning_module
        kept = module.kept()
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        check_fit(str(path), {name.removeprefix("state_dict."): _like(entry) for name, entry in entries.items() if name.startswith("state_dict.")}, kept)
        parts: dict[str, Any] = {"state_dict": {name: t.detach().clone() for name, t in kept.items()}}
        held = {key.split(".")[0] for key in entries}
        if "ema" in held:
            parts["ema"] = {name: t.detach().clone() for name, t in module.named_parameters() if t.requires_grad}
        if "optimizer_states" in held and self.optimizers:
            for optimizer in self.optimizers:
                get_optimizer_state_dict(module, optimizer)  # gives a fresh optimizer its state
            parts["optimizer_states"] = [optimizer.state_dict() for optimizer in self.optimizers]
        return parts

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        like = self.lightning_module.state_dict()
        self.lightning_module.load_state_dict(shard_state(checkpoint["state_dict"], like), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shard_optimizer_state(state, optimizer))


def _like(entry: Any) -> torch.Tensor:
    """A tensor without content, of the shape and dtype that a folder's metadata tells."""
    return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")


def shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that parameters are sharded over: one dimension for a single copy, else (copies, ranks of a copy)."""
    return mesh["tensor_parallel"] if mesh["data_parallel"].size() == 1 else mesh


StrategyRegistry.register("sharded", ShardedStrategy, "FSDP2: parameters, gradients and optimizer state sharded over all ranks")
