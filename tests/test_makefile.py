"""The Makefile: its help lists every target, and targets pass EXP and ARGS on."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ["fetch", "plan", "data", "validate-data", "inspect", "stage1", "stage2", "cache-stage1", "cache-stage2", "eval-dreambooth", "tables", "report",
           "reproduce", "ablate", "ablate-beta", "ablate-masking", "sweep-beta", "sweep-masking", "seeds", "test", "lint", "bench",
           "mini-foundation", "clean", "help"]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key not in ("EXP", "ARGS", "MFLAGS")}
    return subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT, env=outside, capture_output=True, text=True, check=False)


def commands_of(*arguments: str) -> str:
    """What make would run, with the virtual environment taken as set up."""
    done = make("--dry-run", "--assume-old=.venv/.installed", *arguments)
    assert done.returncode == 0, done.stderr
    return re.sub("  +", " ", done.stdout)


@pytest.mark.parametrize("arguments", [(), ("help",)])
def test_help_lists_every_target_with_a_sentence(arguments):
    listed = dict(re.findall(r"^  (\S+) +(\S.*)$", make(*arguments).stdout, re.MULTILINE))
    assert sorted(listed) == sorted(TARGETS)


def test_every_rule_in_the_file_is_in_help():
    rules = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(rules) == sorted(TARGETS)


@pytest.mark.parametrize(("target", "command"), [
    ("fetch", "moma_lightning fetch --experiment experiments/other --out runs/other/fetched.json"),
    ("stage1", "moma_lightning fit --config experiments/other/stage1.yaml --trainer.max_steps 3"),
    ("stage2", "moma_lightning fit --config experiments/other/stage2.yaml --trainer.max_steps 3"),
    ("eval-dreambooth", "evaluation dreambooth --config experiments/other/eval.yaml --trainer.max_steps 3"),
    ("report", "evaluation report --config experiments/other/eval.yaml --trainer.max_steps 3"),
])
def test_targets_pass_the_experiment_and_extra_arguments(target, command):
    assert command in commands_of(target, "EXP=other", "ARGS=--trainer.max_steps 3")


def test_tables_are_four_commands_in_one_process():
    command = " ".join(commands_of("tables", "ARGS=--num_processes 3").replace("\\\n", " ").split())
    axes = [f"--config experiments/mini/eval.yaml {axis}--num_processes 3" for axis in
            ("", "--config experiments/ablations/masking.yaml ", "--config experiments/ablations/beta.yaml ", "")]
    assert command.endswith(" then ".join(f"{name} {axis}" for name, axis in zip(("dreambooth", "ablate", "ablate", "report"), axes, strict=True)))


def test_stages_share_a_batch_between_two_processes_where_the_experiment_has_a_yaml_for_it():
    """`reproduce`, the ablations that train and `make seeds` all train so, and differ in nothing but what they say."""
    for stage in ("stage1", "stage2"):
        both = f"--config experiments/mini/{stage}.yaml --config experiments/mini/two_processes/{stage}.yaml"
        assert both in commands_of(stage, "EXP=mini") and both in commands_of("reproduce")
        assert "two_processes" not in commands_of(stage, "EXP=sd15_llava7b")


def test_clean_removes_one_experiment_only():
    assert commands_of("clean", "EXP=other").split() == ["rm", "-rf", "runs/other"]


def test_data_of_another_experiment_is_a_clear_error():
    done = make("data", "EXP=other", "--assume-old=.venv/.installed")
    assert done.returncode != 0 and "experiments/other" in done.stderr


def test_data_of_openimages_takes_split_and_limit():
    command = " ".join(commands_of("data", "EXP=openimages", "SPLIT=validation", "LIMIT=1000", "ARGS=--seed 3").replace("\\\n", " ").split())
    assert "datamodules.openimages build --config experiments/openimages/data.yaml --split validation --limit 1000 --seed 3" in command


def test_reproduce_goes_from_shards_to_report_by_both_ablations():
    command = " ".join(commands_of("reproduce", "EXP=mini").replace("\\\n", " ").split())
    parts = ["datamodules.mini --out", "fit --config experiments/mini/stage1.yaml", "fit --config experiments/mini/stage2.yaml", "evaluation dreambooth",
             "then ablate --config experiments/mini/eval.yaml --config experiments/ablations/masking.yaml",
             "then ablate --config experiments/mini/eval.yaml --config experiments/ablations/beta.yaml", "then report"]
    assert re.search(".*".join(map(re.escape, parts)), command), command


def test_reproduce_refuses_arguments_it_could_not_place():
    done = make("reproduce", "ARGS=--seed 3", "--assume-old=.venv/.installed")
    assert done.returncode != 0 and "takes no ARGS" in done.stderr
