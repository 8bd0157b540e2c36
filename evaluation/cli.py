"""`python -m evaluation <command> --config experiments/<family>/eval.yaml`, or several, with `then` between them."""

import builtins
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.multiprocessing import ProcessRaisedException

from evaluation.ablations import run_ablation
from evaluation.commands import HELP
from evaluation.config import EvalConfig
from evaluation.dreambooth import run_dreambooth, run_scoring
from evaluation.figures import write_figures
from evaluation.generation import generate
from evaluation.mask_iou import run_mask_iou
from evaluation.metrics.configs import hub_names
from evaluation.protocols import Protocol, changes, preset
from evaluation.report import write_report
from evaluation.sweeps import run_point
from evaluation.tracking import log_evaluation
from moma_lightning.mendable import MENDABLE

logger = logging.getLogger(__name__)


def report(config: EvalConfig) -> None:
    """Figures and page, then all of it to wandb."""
    figures = write_figures(config)
    write_report(config)
    log_evaluation(config, figures)


def models(config: EvalConfig) -> None:
    """The protocol's encoders as `moma_lightning fetch --models` takes them."""
    print(json.dumps(hub_names(config.resolved_protocol().encoders.values())))


COMMANDS: dict[str, Callable[[EvalConfig], object]] = {
    "generate": generate,
    "score": run_scoring,
    "dreambooth": run_dreambooth,
    "ablate": run_ablation,
    "point": run_point,
    "masks": run_mask_iou,
    "figures": write_figures,
    "models": models,
    "report": report,
}

#: Commands that no second process shares in: of those that torchrun or srun started, the first runs them.
ALONE = ("masks", "figures", "models", "report")


def build_parser(protocol: str = "dreambooth") -> ArgumentParser:
    """protocol: the preset that `overrides` are of, so that `--overrides.sampler.seed 1` changes one field of whatever a YAML has changed."""
    parser = ArgumentParser(prog="python -m evaluation", parser_mode="omegaconf", description="DreamBooth-style evaluation.")
    commands = parser.add_subcommands(required=True)
    for name, text in HELP.items():
        command = ArgumentParser(parser_mode="omegaconf", description=text)
        command.add_argument("--config", action="config", help="YAML of EvalConfig's fields")
        command.add_class_arguments(EvalConfig, skip={"overrides"})
        command.add_argument("--overrides", type=Protocol, default=preset(protocol))
        commands.add_subcommand(name, command, help=text)
    return parser


def parse(args: Sequence[str] | None = None) -> tuple[str, EvalConfig]:
    """The command and its config. Exits with a message for unknown keys and wrong types."""
    words, parser = list(sys.argv[1:] if args is None else args), build_parser()
    parsed = parser.parse_args([word for word in words if not word.startswith("--print_config")])  # which tells of the second parser
    try:
        parser = build_parser(parsed[parsed.subcommand].protocol)
        parsed = parser.parse_args(words)
        given = parser.instantiate(parsed)[parsed.subcommand]
        fields = {key: value for key, value in vars(given).items() if key != "config"}
        fields["overrides"] = changes(fields["overrides"], preset(given.protocol))
        return parsed.subcommand, EvalConfig(**fields)
    except ValueError as error:
        parser.error(str(error))


def main(args: Sequence[str] | None = None) -> None:
    """One command, or several with `then` between them: all are parsed before the first runs, and one process imports for all.

    Errors that a person can mend are one line, with LOGLEVEL=DEBUG in the environment their traceback too; everything else keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.setLevel("DEBUG" if os.environ.get("LOGLEVEL", "").upper() == "DEBUG" else "INFO")
    several = split_at(list(sys.argv[1:] if args is None else args), "then")
    for command, config in [parse(one) for one in several]:
        started = time.monotonic()
        run(command, config)
        if len(several) > 1:
            logger.info("== %s: %.0f s", config.ablation.name if command == "ablate" else command, time.monotonic() - started)
            gc.collect()
            torch.cuda.empty_cache()  # the next one's processes want what this one's judges have held


def split_at(words: Sequence[str], word: str) -> list[list[str]]:
    """The words between every `word`."""
    parts: list[list[str]] = [[]]
    for each in words:
        if each == word:
            parts.append([])
        else:
            parts[-1].append(each)
    return parts


def run(command: str, config: EvalConfig) -> None:
    if command in ALONE and rank_zero_only.rank != 0:
        return
    try:
        COMMANDS[command](config)
    except MENDABLE as error:
        logger.debug("traceback", exc_info=True)
        sys.exit(f"evaluation {command}: {error}")
    except ProcessRaisedException as error:  # of one process of several: its traceback as text
        told = raised(str(error))
        if told is None:
            raise
        sys.exit(f"evaluation {command}: {told}")


def raised(traceback: str) -> str | None:
    """The message at a traceback's end, of one line or several; None for an error that a person cannot mend."""
    lines = traceback.strip().split("\n")
    for number in reversed(range(len(lines))):
        kind, colon, _ = lines[number].partition(": ")
        if colon and isinstance(error := getattr(builtins, kind, None), type) and issubclass(error, BaseException):
            return "\n".join(lines[number:]).removeprefix(f"{kind}: ") if issubclass(error, MENDABLE) else None
    return None
