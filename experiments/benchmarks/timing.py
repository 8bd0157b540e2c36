"""Two things timed alternately, and their ratio."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

#: What each is sampled and trained with; where only the CPU's is meant, `shape` says so.
PRECISION = "fp32, on a GPU bf16"

Run = Callable[[], object]


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@dataclass
class Case:
    """One figure: the time of `a` over that of `b` (each makes one run), what is aimed at ("<= 1.05"; "": nothing), and at which sizes.

    prepare: builds models and data and returns a and b. pairs: fewer runs than asked for, where one takes long on a CPU.
    by_the_clock: on a CPU too, where other processes do the work.
    """

    name: str
    goal: str
    shape: str
    prepare: Callable[[torch.device], tuple[Run, Run]]
    pairs: int | None = None
    by_the_clock: bool = False


def seconds(run: Run, device: torch.device, by_the_clock: bool = False) -> float:
    """What one run takes: processor time on a CPU, which other programs hardly move, time on the clock on a GPU."""
    gc.collect()  # before each, since a run after it finds the processor's caches cold
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" or by_the_clock else time.process_time
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def peak_mb(run: Run, device: torch.device) -> float | None:
    """The most memory held in one run, in MiB: of the GPU; on a CPU of the whole process, models, libraries and caches included.

    None where the system does not let a process reset its high-water mark (Linux: `man proc`, clear_refs).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        run()
        return None
    run()
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak) / 2**10


def alternate(a: Run, b: Run, pairs: int, device: torch.device, by_the_clock: bool = False) -> dict:
    """Median ratio of the pairs, their quartiles `lo` and `hi`, and the medians of a and b in seconds; every other pair in reverse order.

    One pair before does not count; it gives the peak memory of each, `a_mb` and `b_mb`.
    """
    memory = {name: peak_mb(run, device) for name, run in (("a_mb", a), ("b_mb", b))}
    times = []
    for i in range(pairs):
        first, second = (seconds(run, device, by_the_clock) for run in ((a, b) if i % 2 == 0 else (b, a)))
        times.append((first, second) if i % 2 == 0 else (second, first))
    ratios = [x / y for x, y in times]
    lo, middle, hi = statistics.quantiles(ratios, n=4, method="inclusive") if pairs > 1 else ratios * 3
    return {"ratio": middle, "lo": lo, "hi": hi, "a": statistics.median(x for x, _ in times), "b": statistics.median(y for _, y in times), **memory}


def measure(case: Case, pairs: int, device: torch.device) -> dict:
    """A case's entry of bench.json."""
    torch.manual_seed(0)
    torch.compiler.reset()  # what the case before has held: compiled UNets, memory
    gc.collect()
    torch.cuda.empty_cache()
    a, b = case.prepare(device)
    pairs = min(pairs, case.pairs or pairs) if device.type == "cpu" else pairs
    clock = f"{device}, {torch.get_num_threads()} threads, {pairs} pairs{', by the clock' if case.by_the_clock else ''}"
    return {**alternate(a, b, pairs, device, case.by_the_clock), "goal": case.goal, "shape": f"{case.shape}; {clock}"}


def reached(entry: dict) -> bool | None:
    """Whether the median ratio meets the goal, None without one."""
    if not entry["goal"]:
        return None
    sign, bound = entry["goal"].split()
    return entry["ratio"] <= float(bound) if sign == "<=" else entry["ratio"] >= float(bound)
