"""`python -m datamodules.openimages build --config experiments/openimages/data.yaml`, `... validate|inspect --shards runs/openimages/data/shards`."""

import sys
from importlib import import_module

from jsonargparse import ArgumentParser

from moma_lightning.mendable import one_line

#: Of a command: its configuration, in the module and beside the function that have the command's name.
COMMANDS = {"build": "BuildConfig", "validate": "ValidateConfig", "inspect": "InspectConfig"}


def parser_of(config: type, command: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"python -m datamodules.openimages {command}", parser_mode="omegaconf", description=config.__doc__)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config, as_group=False)
    return parser


def main(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    module = import_module(f"datamodules.openimages.{command}")  # one alone: validate brings PyTorch, which a build does without
    config, function = getattr(module, COMMANDS[command]), getattr(module, command)
    parser = parser_of(config, command)
    parsed = parser.instantiate(parser.parse_args(arguments[1:]))
    parsed.pop("config", None)
    with one_line(command):
        result: object = function(config(**parsed.as_dict()))
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
