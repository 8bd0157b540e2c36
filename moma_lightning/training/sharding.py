"""Fully sharded training: which modules FSDP2 gathers together, and whole tensors out of FSDP2's and FSDP1's shards and back."""

import io
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils import _pytree as pytree

from moma_lightning.quantization import refuse_quantized

#: Methods of a stage that read its parameters and are not `forward`.
ENTRIES = ("training_step", "validation_step", "on_validation_epoch_end")


def shard(stage: nn.Module, units: Iterable[nn.Module], mesh: DeviceMesh, *, bf16: bool) -> None:
    """Shard every parameter of a stage over `mesh`; each unit is gathered, used and dropped as one.

    units: inner modules before those that hold them; of transformers' models only those whose hidden states nobody asks for, since
        it knows which it can record by the class, which FSDP2 changes. What no unit holds (stage 2's whole adapter, with lambda) belongs to the
        stage itself and is gathered in float32 whatever `bf16` says; units are gathered in bfloat16 then, and gradients are
        reduced in float32 always. FSDP2 holds gradients by parameter, so frozen ones bring no gradient memory wherever they are.
    """
    refuse_quantized(stage.named_parameters(), "it cannot be sharded; use --trainer.strategy ddp")
    # Inputs are left to autocast: casting them here would also copy the Conditioning, and with it the Recorder that is written to.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        if any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
            for name in getattr(unit, "entries", ()):  # methods beside `forward` that read the unit's own parameters
                register_fsdp_forward_method(unit, name)
    fully_shard(stage, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), reshard_after_forward=True)
    for name in ENTRIES:
        register_fsdp_forward_method(stage, name)


@dataclass(frozen=True)
class Layout:
    """Which part of a parameter each rank holds between passes under FSDP1: rank r the flattened one's [bounds[r], bounds[r + 1])."""

    shape: torch.Size
    bounds: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """This rank's part of what is laid out as a parameter: FSDP1's are plain tensors, which tell nothing of the whole."""

    tensor: Tensor
    layout: Layout

    def full_tensor(self) -> Tensor:
        """[*layout.shape]. Every rank must call it."""
        counts = [end - start for start, end in itertools.pairwise(self.layout.bounds)]
        mine = self.tensor.new_zeros(max(counts))
        mine[: self.tensor.numel()] = self.tensor.flatten()
        parts = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(parts, mine)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).view(self.layout.shape)


def note_layouts(parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size]) -> None:
    """Let each parameter that FSDP1 has just flattened tell its `Layout`; `shapes` are those of before. Every rank must call it."""
    counts = zip(*over_ranks([p.numel() for p in parameters.values()]), strict=True)
    for (name, parameter), of_ranks in zip(parameters.items(), counts, strict=True):
        parameter.flattened = Layout(shapes[name], (0, *itertools.accumulate(of_ranks)))


def piece(tensor: Tensor, parameter: Tensor) -> Tensor | Piece:
    """What is laid out as `parameter` is, as a `Piece` where FSDP1 has flattened that."""
    layout = getattr(parameter, "flattened", None)
    return tensor if layout is None else Piece(tensor, layout)


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "flattened")


def whole_shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "flattened", parameter).shape


def whole_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names with tensors of whole parameters' shapes and types; of those that FSDP1 has flattened, without content."""
    return {name: torch.empty(whole_shape(t), dtype=t.dtype, device="meta") if hasattr(t, "flattened") else t for name, t in tensors.items()}


def plain_name(name: str) -> str:
    """A parameter's name without the modules that FSDP1 puts around others."""
    return name.replace(f"{FSDP_WRAPPED_MODULE}.", "")


def whole(tree: Any) -> Any:
    """The same nested dicts and lists with every sharded tensor gathered on rank 0's CPU, and empty elsewhere. Every rank must call it."""
    return pytree.tree_map_only((DTensor, Piece), _gather, tree)


def _gather(tensor: DTensor | Piece) -> Tensor:
    gathered = tensor.full_tensor()
    return gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0)


@contextmanager
def whole_parameters(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Inside, rank 0's module holds those parameters whole, on the CPU, and by their plain names, to be written. Every rank must enter it."""
    wrapped = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children() if isinstance(child, FullyShardedDataParallel)]
    owners = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    before = [owner._parameters[name] for owner, name in owners]
    try:
        for (owner, name), parameter in zip(owners, before, strict=True):
            if is_sharded(parameter):
                owner._parameters[name] = nn.Parameter(_gather(piece(parameter.detach(), parameter)), parameter.requires_grad)
        for parent, name, child in wrapped:
            parent._modules[name] = child.module
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child
        for (owner, name), parameter in zip(owners, before, strict=True):
            owner._parameters[name] = parameter


def local(tensor: Tensor | Piece) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    if isinstance(tensor, Piece):
        return tensor.tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_by_norm(parameters: Collection[Tensor], limit: float) -> Tensor:
    """torch's `clip_grad_norm_`, of FSDP2's parameters too. The norm from before, of all that was trained, on every rank; every rank must call it."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # as scaling would; asked for later it would be reduced once more
    clip_grads_with_norm_(parameters, limit, norm)
    return norm


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, laid out as `like`; what is sharded already, or no parameter's size, stays."""
    layout = getattr(like, "flattened", None)
    if layout is not None and tensor.shape == layout.shape:
        start, end = layout.bounds[dist.get_rank() :][:2]
        return tensor.flatten()[start:end].view(like.shape).to(like.device)
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole `state_dict`, laid out as its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {i: {k: shard_like(v, parameters[i]) if isinstance(v, Tensor) else v for k, v in entry.items()} for i, entry in state["state"].items()}
    return state | {"state": moments}


def shard_state(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name, each laid out as the one of that name in `like`."""
    return {name: shard_like(tensor, like[name]) if name in like else tensor for name, tensor in state.items()}


def over_ranks(value: Any) -> list[Any]:
    """Every rank's value (plain values and tensors), in the order of ranks. Every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    file = io.BytesIO()
    torch.save(value, file)  # torch's object collectives do not carry tensors such as a generator's state
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, file.getvalue())
    return [torch.load(io.BytesIO(content), map_location="cpu", weights_only=True) for content in values]
