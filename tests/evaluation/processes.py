"""A run of `generate` for tests that start and kill it: python -m tests.evaluation.processes <folder> <seconds a batch> [point].

With `point` it is a sweep's point of that painter.

By hand two processes are spawned. Under torchrun the config of every rank but 0 is another one, which must not count.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from evaluation.config import EvalConfig
from evaluation.generation import generate
from evaluation.sweeps import run_point
from tests.evaluation.fakes import Painter, fake_config

PICTURES = 3 * 6


@dataclass
class SlowPainter(Painter):
    """Takes its time, and says which process draws a subject."""

    seconds: float = 0.0

    def generate(self, subject, reference, tasks):
        Path(f"{self.log}.{subject.name}").write_text(str(os.getpid()))
        time.sleep(self.seconds)
        return super().generate(subject, reference, tasks)


def config(folder: Path, seconds: float = 0.0, noise: float = 0.5) -> EvalConfig:
    painter = SlowPainter(noise, str(folder / "log"), seconds=seconds)
    return fake_config(folder, {"a": painter}, {"context_prompts": 5}, num_processes=2)


if __name__ == "__main__":
    is_first = os.environ.get("RANK", "0") == "0"
    told = config(Path(sys.argv[1]), float(sys.argv[2]), 0.5 if is_first else 0.9)
    if sys.argv[3:] == ["point"]:
        told.moma = told.methods.pop("a")
        run_point(told)
    else:
        generate(told)
