"""The strategies of sharded training, on GPUs (NCCL) and, for tests, on CPUs (gloo)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.strategies.fsdp import _move_torchmetrics_to_device
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import CustomPolicy

from moma_lightning.models.blocks import blocks_of
from moma_lightning.models.trained_weights import check_fit
from moma_lightning.quantization import refuse_quantized
from moma_lightning.training import checkpoint_folder
from moma_lightning.training.checkpoint_io import naming
from moma_lightning.training.sharding import note_layouts, over_ranks, piece, shard_optimizer_state, shard_state, whole

#: The parts of a checkpoint that hold tensors; everything else is small and the same on every rank.
TENSORS = ("state_dict", "optimizer_states", "ema")


class WholeOptimizerState:
    """Optimizer state that is read whole and cut to each rank's part."""

    optimizers: list[torch.optim.Optimizer]

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shard_optimizer_state(state, optimizer))


class ShardedStrategy(WholeOptimizerState, ModelParallelStrategy):
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
            parts["optimizer_states"] = [_saved(optimizer.state_dict(), f"optimizer_states.{i}.state.", entries) for i, optimizer in enumerate(self.optimizers)]
        return parts

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        like = self.lightning_module.state_dict()
        self.lightning_module.load_state_dict(shard_state(checkpoint["state_dict"], like), strict=strict)


class FlatShardedStrategy(WholeOptimizerState, FSDPStrategy):
    """Lightning's FSDPStrategy (FSDP1) for these stages; `--trainer.strategy fsdp`. `sharded` (FSDP2) holds less.

    Only what is trained is sharded, in one flat tensor for each block and one for the rest: with frozen parameters in the same one
    FSDP1 would hold gradients for these too. Each rank holds the frozen models whole. Blocks are gathered in bfloat16 under
    bf16-mixed, the rest in float32. Checkpoints are one file, the same that every other strategy writes and reads.
    """

    def __init__(self, timeout: timedelta = default_pg_timeout, process_group_backend: str | None = None):
        super().__init__(timeout=timeout, process_group_backend=process_group_backend)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        module = self.lightning_module
        if any(hasattr(p, "flattened") for p in module.parameters()):
            raise ValueError("strategy fsdp: this stage is sharded already, by an earlier call of the Trainer; build it anew")
        refuse_quantized(module.named_parameters(), "it was not tried with the strategy fsdp; use --trainer.strategy ddp")
        shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        frozen = [p for p in module.parameters() if not p.requires_grad]
        for parameter in frozen:  # FSDP1 leaves those alone that it is told to ignore
            parameter.data = parameter.data.to(self.root_device)
        _move_torchmetrics_to_device(module, self.root_device)
        # Inputs are left to autocast, and gradients reduced in float32, as in `sharding.shard`; Lightning's own would do neither.
        own, blocks = (MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
                       for dtype in (None, torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None))
        units = {block: {"mixed_precision": blocks} for block in blocks_of(module) if any(p.requires_grad for p in block.parameters())}
        wrapped = FullyShardedDataParallel(model, device_id=self.root_device, auto_wrap_policy=CustomPolicy(lambda part: units.get(part, False)),
                                           ignored_states=frozen, mixed_precision=own, use_orig_params=True)
        note_layouts({name: p for name, p in module.named_parameters() if p.requires_grad}, shapes)
        self._gather_in_hook(wrapped)
        return wrapped

    def _gather_in_hook(self, wrapped: nn.Module) -> None:
        """Let `on_validation_epoch_end`, which Lightning does not call through FSDP1, see whole what no block holds."""
        hook = self.lightning_module.on_validation_epoch_end

        @wraps(hook)
        def gathered() -> None:
            with FullyShardedDataParallel.summon_full_params(wrapped, recurse=False, writeback=False):
                hook()

        self.lightning_module.on_validation_epoch_end = gathered

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While gradients are accumulated they are reduced all the same: left for later each rank would hold them whole."""
        yield

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """FSDP1 keeps what no block holds gathered until the next backward pass: the next training step would still read the average (EMA)."""
        output = super().validation_step(*args, **kwargs)
        handle = self.model._handle  # None where blocks hold all that is trained
        if handle is not None and handle.uses_sharded_strategy:  # one process holds everything anyway
            handle.reshard(free_unsharded_flat_param=True)
        return output

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {name: piece(tensor.detach(), tensor) for name, tensor in self.lightning_module.kept().items()}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Moments as pieces. Ranks that hold nothing of a parameter never step it, so that what they know of it does not count."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        told, parameters = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
        held = {i: entry for i, entry in told["state"].items() if parameters[i].numel()}
        entries: dict[int, dict[str, Any]] = {}
        for of_rank in over_ranks({i: {key: None if value.ndim else value for key, value in entry.items()} for i, entry in held.items()}):
            entries |= of_rank

        def moment(i: int, key: str) -> Any:
            return piece(held[i][key] if i in held else torch.zeros_like(parameters[i]), parameters[i])

        state = {i: {key: moment(i, key) if value is None else value for key, value in entries[i].items()} for i in sorted(entries)}
        return told | {"state": state}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        if "ema" in checkpoint:
            parameters = dict(self.lightning_module.named_parameters())
            checkpoint["ema"] = {name: piece(average, parameters[name]) for name, average in checkpoint["ema"].items()}
        checkpoint |= {name: whole(checkpoint[name]) for name in TENSORS if name in checkpoint}
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(Path(self.broadcast(checkpoint_path)), weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        kept = self.lightning_module.kept()
        for name, part in shard_state(checkpoint["state_dict"], kept).items():
            kept[name].data.copy_(part)


def _like(entry: Any) -> torch.Tensor:
    """A tensor without content, of the shape and dtype that a folder's metadata tells."""
    return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")


def _saved(optimizer: dict[str, Any], before: str, entries: Iterable[str]) -> dict[str, Any]:
    """An optimizer's state without that of parameters which the folder has none for: they never had a gradient."""
    known = {key.removeprefix(before).partition(".")[0] for key in entries if key.startswith(before)}
    return optimizer | {"state": {number: state for number, state in optimizer["state"].items() if str(number) in known}}


def shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that parameters are sharded over: one dimension for a single copy, else (copies, ranks of a copy)."""
    return mesh["tensor_parallel"] if mesh["data_parallel"].size() == 1 else mesh


StrategyRegistry.register("fsdp", FlatShardedStrategy, "Lightning's FSDPStrategy: what is trained sharded by FSDP1", override=True)
StrategyRegistry.register("sharded", ShardedStrategy, "FSDP2: parameters, gradients and optimizer state sharded over all ranks")
