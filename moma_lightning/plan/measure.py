"""One training step of one rank on tensors without data: memory by kind, communication, floating-point operations.

torch's own estimators do the counting (torch.distributed._tools, torch.utils.flop_counter), on a process group that only
pretends: no GPU, no other process, no weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moma_lightning import optim
from moma_lightning.modules.base import TrainedPartModule
from moma_lightning.modules.stage1 import Stage1
from moma_lightning.modules.stage2 import Stage2
from moma_lightning.plan.stages import Experiment, batch_of, build, loss_of
from moma_lightning.training.sharding import local, shard


@dataclass
class Measured:
    """Of one rank. Bytes; parameters, gradients and optimizer are what is held between the steps, the rest is at the peak.

    gathered: whole parameters of the units at work, and gradients before they are reduced. sent: what collectives move a step.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    peak: int
    sent: int


class PeakTracker(FSDPMemTracker):
    """torch's tracker with the peak of the whole alone.

    Torch's own looks after every operation at every module it has met, for a peak of each: with SDXL's 4,266 modules that takes many minutes.
    """

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, kinds in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < kinds["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = kinds["Total"], dict(kinds)

    def get_tracker_snapshot(self, type: str = "current") -> dict[torch.device, dict[str, int]]:
        """A copy; torch's deep one is slow, and there is one at every module's begin and end."""
        snapshot = self._curr_mem_snap if type == "current" else self._peak_mem_snap
        return {device: dict(kinds) for device, kinds in snapshot.items()}


class Sent(TorchDispatchMode):
    """Sums up the bytes of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in collective_ops and "wait" not in str(func) and "barrier" not in str(func):
            self.bytes += CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
        return result


@contextmanager
def pretended_ranks(ranks: int, shard_size: int | None) -> Iterator[DeviceMesh]:
    """A mesh as `ShardedStrategy` makes it, on rank 0 of a group that answers every collective at once."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        shape = (ranks,) if shard_size is None else (ranks // shard_size, shard_size)
        with patch.object(_fsdp_param, "_chunk_with_empty", first_chunk):
            yield init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    finally:
        dist.destroy_process_group()


def first_chunk(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
    """What rank 0 holds of a parameter: torch's own makes a tensor for every rank, and mini's plan for 512 took 112 s with it, 10 without."""
    return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // num_chunks))]


def measure(experiment: Experiment, ranks: int, shard_size: int | None = None) -> Measured:
    """Memory and communication of one rank in a training step, sharded over `ranks`.

    The optimizer is given its state first, as every step but the first has it. On the CPU's kernels; those of a GPU keep about the
    same (both attend without a matrix of probabilities), and what a GPU's allocator and NCCL take besides is not counted.
    """
    with pretended_ranks(ranks, shard_size) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        module = build(experiment)
        idle = take_out_idle(module)
        module.configure_model()
        module.step_loss = loss_of(module)
        shard(module, module.units(), mesh, bf16=experiment.bf16)
        register_fsdp_forward_method(module, "step_loss")
        optimizer = optim.build(module.named_parameters(), module.optimizer_config)
        give_state(optimizer)
        tracker, sent = PeakTracker(module, optimizer), Sent()
        with tracker, sent:
            _step(module, optimizer, experiment)
        return _measured(module, optimizer, idle // (shard_size or ranks), _by_kind(tracker), sent.bytes)


def take_out_idle(module: TrainedPartModule) -> int:
    """Take out what no training step runs, which the tracker cannot follow; returns its bytes. Sharded, it is held all the same."""
    idle: list[nn.Module] = []
    if isinstance(module, Stage1) and module.caption_encoder is not None:
        idle.append(module.caption_encoder)
        module.caption_encoder = None
    if isinstance(module, Stage2):
        idle.append(module.vae.decoder)
        module.vae.decoder = nn.Identity()
    return sum(_bytes(list(part.parameters())) for part in idle)


def give_state(optimizer: torch.optim.Optimizer) -> None:
    """The state that an optimizer makes in its first step."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _step(module: TrainedPartModule, optimizer: torch.optim.Optimizer, experiment: Experiment) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=experiment.bf16):
        loss = module.step_loss(batch_of(experiment))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _by_kind(tracker: FSDPMemTracker) -> dict[str, int]:
    snapshot = tracker.get_tracker_snapshot("peak")
    (kinds,) = (kinds for device, kinds in snapshot.items() if device.type == "cpu")
    return {getattr(kind, "value", str(kind)): size for kind, size in kinds.items()}


def _measured(module: nn.Module, optimizer: torch.optim.Optimizer, idle: int, peak: dict[str, int], sent: int) -> Measured:
    parameters = list(module.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return Measured(
        parameters=_bytes(parameters) + _bytes(list(module.buffers())) + idle, gradients=_bytes([p for p in parameters if p.requires_grad]),
        optimizer=_bytes(states), activations=peak.get("Activation", 0) + peak.get("Temp", 0) + peak.get("Inputs", 0),
        gathered=sum(peak.get(kind, 0) for kind in ("Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter")),
        peak=peak["Total"] + idle, sent=sent,
    )


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)


def count_flops(experiment: Experiment) -> int:
    """Floating-point operations of one rank's forward and backward pass over one micro-batch, recomputation not counted."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = build(experiment.with_checkpointing("none"))
        # The counter knows no formula for the CPU's fused attention, but those of the matrix products that it stands for.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss_of(module)(batch_of(experiment)).backward()
    return counter.get_total_flops()


def count_parameters(experiment: Experiment) -> tuple[int, int]:
    """Trained and frozen parameters of the whole model."""
    with torch.device("meta"):
        parameters = list(build(experiment).parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters) - trained
