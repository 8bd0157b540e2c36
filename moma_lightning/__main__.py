"""`python -m moma_lightning fit|validate|test|predict|generate ...`."""

import sys

USAGE = """usage: python -m moma_lightning <command> ...

  fit | validate | test | predict   train or judge a stage: --config experiments/<experiment>/stage1.yaml
  generate                          pictures of a subject from one picture of it and prompts

python -m moma_lightning <command> --help lists a command's options."""


def main(arguments: list[str]) -> int:
    """Dispatch on the first argument; what a command needs is imported only then, so that usage comes at once."""
    command = arguments[0] if arguments else None
    if command == "generate":
        from jsonargparse import auto_cli

        from moma_lightning.generate import generate

        try:
            auto_cli(generate, args=arguments[1:], as_positional=False, prog="python -m moma_lightning generate")
        except (ValueError, OSError) as error:  # what a person can mend is one line; everything else keeps its traceback
            sys.exit(f"generate: {error}")
    elif command in ("fit", "validate", "test", "predict"):
        from moma_lightning.cli import MoMACLI

        MoMACLI()
    else:
        print(USAGE)
        return 0 if command in ("-h", "--help") else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
