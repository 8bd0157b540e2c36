"""`python -m evaluation`: usage comes at once; what a command needs, PyTorch first of all, is imported only for one."""

import sys

USAGE = """usage: python -m evaluation <command> --config experiments/<experiment>/eval.yaml ...

  generate     make the missing pictures
  score        score the pictures; write scores.parquet, summary.json and table.md
  dreambooth   generate, then score
  ablate       one table of settings: add --config experiments/ablations/<axis>.yaml
  point        one setting of MoMA (--moma.beta ...), scored and logged to wandb: what a sweep's agent runs
  masks        is M_gen where the subject is: IoU with SAM at three mask strengths
  figures      the paper's figures as PNG and SVG
  models       names of the protocol's encoders, for `python -m moma_lightning fetch --models`
  report       figures, report/index.html and report/grid.png; log to wandb

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
