"""Every experiment YAML runs: each training one a step on tiny shards, and the mini ones as the whole line from shards to report."""

import json
import sys
from pathlib import Path

import pytest
import wandb

from datamodules.mini.export import export
from evaluation.cli import main as evaluation
from evaluation.cli import parse
from moma_lightning.__main__ import main
from moma_lightning.foundation import FoundationConfig, load_image_encoder
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
YAMLS = sorted(path for path in EXPERIMENTS.glob("*/*.yaml") if path.parent.name != "sweeps")
TRAINING = [path for path in YAMLS if path.name != "eval.yaml"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    export(folder, train_count=64, val_count=32, samples_per_shard=32)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    folder, foundation = tmp_path_factory.mktemp("decoder"), FoundationConfig()
    ImageFeatureDecoder.from_foundation(foundation, DecoderConfig(), load_image_encoder(foundation).embed_dim).save_pretrained(folder)
    return folder


@pytest.fixture
def fit(data, monkeypatch):
    """A function that runs `fit` on the tiny shards; a stage stops where it is told."""
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def run(path: Path, folder: Path, *options: str) -> None:
        shards = "--data.init_args.config"
        arguments = ["fit", "--config", str(path), "--trainer.default_root_dir", str(folder), f"{shards}.train", f"{data}/shards/train-*.tar",
                     f"{shards}.val", f"{data}/shards/val-*.tar", f"{shards}.batch_size", "2", *options]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["moma_lightning", *arguments])
        assert main(arguments) == 0

    yield run
    wandb.finish()
    wandb.teardown()


def test_there_are_yamls_of_each_kind():
    assert {path.name for path in YAMLS} >= {"stage1.yaml", "stage2.yaml", "ip_adapter.yaml", "eval.yaml"}


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_training_takes_a_step(path, fit, decoder, tmp_path):
    fit(path, tmp_path, "--trainer.fast_dev_run", "1", *(("--model.init_args.decoder", str(decoder)) if path.name == "stage2.yaml" else ()))


def test_the_line_from_shards_to_report(fit, data, tmp_path):
    """What `make reproduce` does, on one subject after two steps of each stage."""
    mini, short = EXPERIMENTS / "mini", ("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false")
    fit(mini / "stage1.yaml", tmp_path / "stage1", *short)
    fit(mini / "stage2.yaml", tmp_path / "stage2", *short, "--model.init_args.decoder", str(tmp_path / "stage1/image_feature_decoder"))
    subject = sorted(path.name for path in (data / "dreambooth/dataset").iterdir() if path.is_dir())[0]
    small = {"subjects": [subject], "context_prompts": 2, "texture_prompts": 1, "sampler": {"num_inference_steps": 2}}
    options = ["--config", str(mini / "eval.yaml"), f"--run={tmp_path}", f"--data={data}/dreambooth", f"--adapter={tmp_path}/stage2/adapter",
               f"--decoder={tmp_path}/stage1/image_feature_decoder", "--num_processes=1", "--overrides", json.dumps(small)]  # fmt: skip
    for command in ("dreambooth", "ablate", "report"):
        evaluation([command, *options])
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert {"real_images", "text_only", "ip_adapter", "moma_beta0", "moma_beta1"} <= set(summary)
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"eval/scores.parquet", "eval/table.md", "ablations/beta.json", "ablations/masking.md", "report/index.html", "report/grid.png"} <= made


@pytest.mark.parametrize("path", [p for p in YAMLS if p.name == "eval.yaml"], ids=lambda p: p.parent.name)
def test_evaluation_is_parsed(path):
    command, config = parse(["dreambooth", "--config", str(path)])
    assert command == "dreambooth"
    assert {"real_images", "text_only", "ip_adapter", "moma_beta0", "moma_beta1"} <= set(config.methods)
    assert config.resolved_protocol().name == "mini"
