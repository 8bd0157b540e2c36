"""`python -m evaluation`: usage comes at once; what a command needs, PyTorch first of all, is imported only for one."""

import sys

from evaluation.commands import HELP

LISTED = "\n".join(f"  {name:<12} {text}" for name, text in HELP.items())
USAGE = f"""usage: python -m evaluation <command> --config experiments/<experiment>/eval.yaml ...

{LISTED}

Several run in one process, which imports once: python -m evaluation dreambooth --config X then report --config X
python -m evaluation <command> --help lists a command's options."""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    from evaluation.cli import main as run

    run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
