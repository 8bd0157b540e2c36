"""`moma fit|validate|generate|fetch|plan|convert ...`, which `python -m moma_lightning` is too."""

import logging
import os
import sys
from collections.abc import Callable

from moma_lightning.mendable import one_line

USAGE = """usage: python -m moma_lightning <command> ...   (or: moma <command> ...)

  fit | validate   train or judge a stage: --config experiments/<experiment>/stage1.yaml
  generate         pictures of a subject from one picture of it and prompts
  fetch            download the models that an experiment names: --experiment experiments/<experiment>
  plan             memory and time of a training, without a GPU: --stage experiments/<experiment>/stage2.yaml --gpus 64 --gpu_mem 80
  convert          adapters between this project's, IP-Adapter's and the released MoMA's files: --from X --to Y

python -m moma_lightning <command> --help lists a command's options."""


#: Where launchers say a process's rank, as Lightning reads them.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def main(arguments: list[str] | None = None) -> int:
    """Dispatch on the first argument; what a command needs is imported only then, so that usage comes at once."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else None
    if all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES):
        logging.basicConfig(format="%(message)s")
        logging.getLogger("moma_lightning").setLevel(logging.INFO)  # what was read of each checkpoint, once
    if command == "generate":
        from moma_lightning.generate import generate

        run(generate, command, arguments[1:])
    elif command == "fetch":
        from moma_lightning.fetch import fetch

        run(fetch, command, arguments[1:])
    elif command == "plan":
        from moma_lightning.plan.report import plan

        run(plan, command, arguments[1:])
    elif command == "convert":
        from moma_lightning.checkpoints.convert import main as convert

        with one_line(command):
            convert(arguments[1:])
    elif command in ("fit", "validate"):
        from moma_lightning.cli import MoMACLI

        MoMACLI()
    else:
        print(USAGE)
        return 0 if command in ("-h", "--help") else 2
    return 0


def run(function: Callable[..., None], command: str, arguments: list[str]) -> None:
    """Call a function with its parameters as options."""
    from jsonargparse import auto_cli

    with one_line(command):
        auto_cli(function, args=arguments, as_positional=False, prog=f"python -m moma_lightning {command}")


if __name__ == "__main__":
    sys.exit(main())
