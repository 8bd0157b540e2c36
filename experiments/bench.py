"""How long MoMA's parts take, each as a ratio to something known (`make bench`): docs/performance.md says what each figure is.

Prints a table and writes runs/bench.json: {name: {ratio, lo, hi, goal, a, b, a_mb, b_mb, shape}}; lo and hi are quartiles over the pairs, a and b
medians in seconds, a_mb and b_mb peak memory. One thread on a CPU.
"""

import argparse
import json
from pathlib import Path

import torch

from experiments.benchmarks import growth, guided_step, loading, scoring, training_step, whole_subject
from experiments.benchmarks.timing import Case, measure, reached
from moma_lightning.files import write_json


def all_cases(full: bool, compiled: bool = False) -> list[Case]:
    """full: the paper's models at their own size too, with random weights. compiled: those of compiled UNets too."""
    sizes = [*guided_step.SIZES, *(guided_step.FULL if full else []), *(guided_step.COMPILED if compiled else [])]
    others = (loading, scoring, growth)
    return [*guided_step.cases(sizes), *whole_subject.cases(full, compiled), *training_step.cases(full), *(case for part in others for case in part.cases())]


def line(name: str, entry: dict) -> str:
    verdict = {True: "reached", False: "MISSED", None: ""}[reached(entry)]
    seconds, memory = f"{entry['a']:9.4f} s {entry['b']:9.4f} s", ""
    if entry["a_mb"] is not None:
        memory = f"{entry['a_mb']:8.0f} MiB {entry['b_mb']:8.0f} MiB"
    return f"{name:<52} {entry['ratio']:6.3f} [{entry['lo']:.3f}, {entry['hi']:.3f}]  {entry['goal']:<8} {verdict:<8} {seconds}{memory}"


def save(path: Path, entries: dict[str, dict]) -> None:
    """Entries of other cases, measured before, stay."""
    known = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, known | entries)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="the paper's models at their own size on a CPU too: minutes a pair, up to 35 GB, stage 1 60")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cases = all_cases(args.full or device.type == "cuda", compiled=device.type == "cuda")
    chosen = [case for case in cases if any(part in case.name for part in args.only)]
    if not chosen:
        parser.error("no case's name contains one of these; there are\n  " + "\n  ".join(case.name for case in cases))
    for case in chosen:
        entry = measure(case, args.pairs, device)
        print(line(case.name, entry), flush=True)
        save(args.out, {case.name: entry})


if __name__ == "__main__":
    main()
