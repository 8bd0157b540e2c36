"""`python -m moma_lightning plan`: does a training fit, and how long does it take, before a GPU is booked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moma_lightning.plan.measure import Measured, count_flops, count_parameters, measure
from moma_lightning.plan.stages import Experiment, read_experiment
from moma_lightning.training.options import Checkpointing

GB = 1e9
POLICIES: tuple[Checkpointing, ...] = get_args(Checkpointing)
#: Of a GPU's memory, what CUDA, NCCL and holes between allocations are left: a rule of thumb, not a measurement.
RESERVED_GB, FRAGMENTATION = 2.0, 0.08


@dataclass
class Gpu:
    """memory in GB (1e9 bytes); tflops: its peak in bf16 (989 is an H100's, 312 an A100's); mfu: the part of it that is reached."""

    memory: float
    tflops: float
    mfu: float

    def fits(self, measured: Measured) -> bool:
        return measured.peak / GB * (1 + FRAGMENTATION) + RESERVED_GB <= self.memory

    def seconds(self, flops: float) -> float:
        return flops / (self.tflops * 1e12 * self.mfu)


def plan(
    stage: Path, gpus: int | list[int] = 8, gpu_mem: float = 80.0, tflops: float = 989.0, mfu: float = 0.25, samples: int = 282_000,
    shard_size: int | None = None,
) -> None:
    """Print what a training YAML needs on `gpus` GPUs, sharded over all of them: no GPU and no weights are used.

    gpus: one number, or several ('[8,64,512]') for a table with a line each.
    gpu_mem: GB of one GPU. tflops, mfu: its peak in bf16 and the part of it that is reached; times follow from these two and are
    estimates (.26 was measured for stage 2 of the paper's models on one H200, docs/performance.md). samples: of one pass over the data.
    shard_size: as `ShardedStrategy`'s.
    """
    for count in gpus if isinstance(gpus, list) else [gpus]:
        if count < 1 or (shard_size is not None and (shard_size < 1 or count % shard_size)):
            raise ValueError(f"{count} GPUs in copies of {shard_size}: the number must be positive, and a multiple of shard_size")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu {mfu} is not in (0, 1]")
    experiment, gpu = read_experiment(stage), Gpu(gpu_mem, tflops, mfu)

    def policies(count: int) -> dict[Checkpointing, Measured]:
        return needed(lambda policy: measure(experiment.with_checkpointing(policy), count, shard_size), experiment, gpu)

    if isinstance(gpus, list):
        print(f"{stage}: sharded over GPUs of {gpu.memory:g} GB, {experiment.image_size} px; of a rank, in GB (1e9 bytes)")
        print(parameters(experiment), flush=True)
        print("  GPUs  parameters  gradients  optimizer    peak  checkpointing   sent  samples a step  samples/s   hours", flush=True)
        flops = count_flops(experiment)
        for count in gpus:
            print(row(experiment, count, gpu, samples, policies(count), flops), flush=True)
        print(f"  samples/s and hours at {gpu.mfu:.0%} of {gpu.tflops:g} TFLOP/s (assumed, not measured), for {samples:,} triplets")
        return
    print(heading(stage, experiment, gpus, gpu), flush=True)
    print(parameters(experiment), flush=True)
    measured = policies(gpus)
    print(memory(measured, gpu, experiment))
    print(time(experiment, gpus, gpu, samples, measured[experiment.training.activation_checkpointing]))


def row(experiment: Experiment, gpus: int, gpu: Gpu, samples: int, policies: dict[Checkpointing, Measured], flops: int) -> str:
    """A line of the table: with the first checkpointing policy that fits, or with the last."""
    policy = next((policy for policy in policies if gpu.fits(policies[policy])), list(policies)[-1])
    m, batch = policies[policy], gpus * experiment.batch_size * experiment.accumulate
    rate = batch / gpu.seconds(flops * experiment.accumulate)
    held = f"{m.parameters / GB:11.2f} {m.gradients / GB:10.2f} {m.optimizer / GB:10.2f} {m.peak / GB:7.1f}"
    told, sent = policy if gpu.fits(m) else "does not fit", m.sent * experiment.accumulate / GB
    return f"{gpus:6,} {held}  {told:<13} {sent:6.1f} {batch:15,} {rate:10,.0f} {samples / rate / 3600:7.3f}"


def needed(measured: Callable[[Checkpointing], Measured], experiment: Experiment, gpu: Gpu) -> dict[Checkpointing, Measured]:
    """The policies up to the first that fits, and the YAML's own. The others say nothing more, and each takes as long again."""
    policies: dict[Checkpointing, Measured] = {}
    for policy in POLICIES:
        policies[policy] = measured(policy)
        if gpu.fits(policies[policy]):
            break
    chosen = experiment.training.activation_checkpointing
    return policies if chosen in policies else policies | {chosen: measured(chosen)}


def heading(stage: Path, experiment: Experiment, gpus: int, gpu: Gpu) -> str:
    batch = experiment.batch_size * experiment.accumulate
    precision = "bf16" if experiment.bf16 else "float32"
    samples = f"{gpus} x {batch} = {gpus * batch} samples{f' x {experiment.draws} noises' if experiment.draws > 1 else ''} a step"
    return f"{stage}: {gpus} GPUs of {gpu.memory:g} GB, sharded; {samples}, {experiment.image_size} px, {precision}"


def parameters(experiment: Experiment) -> str:
    trained, fixed = count_parameters(experiment)
    return f"parameters       {trained / 1e6:,.1f} M trained, {fixed / 1e6:,.1f} M frozen"


def memory(policies: dict[Checkpointing, Measured], gpu: Gpu, experiment: Experiment) -> str:
    held = next(iter(policies.values()))
    lines = [f"a rank holds     parameters {held.parameters / GB:.2f} GB, gradients {held.gradients / GB:.2f} GB, optimizer {held.optimizer / GB:.2f} GB",
             "peak of a step   checkpointing      peak   activations   gathered"]
    for policy, m in policies.items():
        verdict = "fits" if gpu.fits(m) else "does not fit"
        lines.append(f"                 {policy:<13} {m.peak / GB:6.1f} GB {m.activations / GB:10.1f} GB {m.gathered / GB:7.1f} GB   {verdict}")
    lines += [f"                 {policy:<13} not needed, not measured" for policy in POLICIES if policy not in policies]
    fitting = [policy for policy in policies if gpu.fits(policies[policy])]
    chosen = experiment.training.activation_checkpointing
    if not fitting:
        advice = "nothing here fits: take more GPUs, a smaller data.init_args.config.batch_size, or train less (decoder.trainable)"
    elif fitting[0] == chosen:
        advice = f"keep activation_checkpointing: {chosen}, as the YAML has it"
    else:
        advice = f"set model.init_args.training.activation_checkpointing: {fitting[0]} (the YAML has {chosen})"
    return "\n".join([*lines, f"advice           {advice}",
                      f"                 fits: peak + {FRAGMENTATION:.0%} for holes + {RESERVED_GB:g} GB for CUDA and NCCL"])


def time(experiment: Experiment, gpus: int, gpu: Gpu, samples: int, measured: Measured) -> str:
    flops = count_flops(experiment) * experiment.accumulate
    seconds = gpu.seconds(flops)
    rate = gpus * experiment.batch_size * experiment.accumulate / seconds
    sent = measured.sent * experiment.accumulate
    lines = [f"a step           {flops / 1e12:,.1f} TFLOP a GPU without recomputation; {sent / GB:.2f} GB through each GPU's collectives",
             f"at {gpu.mfu:.0%} of {gpu.tflops:g} TFLOP/s (assumed, not measured): {seconds:.2f} s a step, {rate:,.0f} samples/s",
             f"hours            {samples / rate / 3600:,.1f} for {samples:,} triplets"]
    if experiment.max_steps > 0:
        lines[-1] += f", {experiment.max_steps * seconds / 3600:,.1f} for the YAML's {experiment.max_steps:,} steps"
    return "\n".join(lines)
