"""Every experiment YAML runs: training ones one step on tiny shards with the shipped models, the evaluation's is parsed whole."""

import sys
from pathlib import Path

import pytest

from datamodules.mini.export import export
from evaluation.cli import parse
from moma_lightning.__main__ import main
from moma_lightning.foundation import FoundationConfig, load_image_encoder
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
YAMLS = sorted(path for path in EXPERIMENTS.glob("*/*.yaml") if path.parent.name != "sweeps")
TRAINING = [path for path in YAMLS if path.name != "eval.yaml"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    export(folder, train_count=64, val_count=32, samples_per_shard=32)
    return folder / "shards"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    folder, foundation = tmp_path_factory.mktemp("decoder"), FoundationConfig()
    ImageFeatureDecoder.from_foundation(foundation, DecoderConfig(), load_image_encoder(foundation).embed_dim).save_pretrained(folder)
    return folder


def test_there_are_yamls_of_each_kind():
    assert {path.name for path in YAMLS} >= {"stage1.yaml", "stage2.yaml", "ip_adapter.yaml", "eval.yaml"}


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_training_takes_a_step(path, shards, decoder, tmp_path, monkeypatch):
    data = "--data.init_args.config"
    arguments = ["fit", "--config", str(path), "--trainer.fast_dev_run", "1", "--trainer.default_root_dir", str(tmp_path),
                 f"{data}.train", f"{shards}/train-*.tar", f"{data}.val", f"{shards}/val-*.tar", f"{data}.batch_size", "2"]  # fmt: skip
    if path.name == "stage2.yaml":
        arguments += ["--model.init_args.decoder", str(decoder)]
    monkeypatch.setattr(sys, "argv", ["moma_lightning", *arguments])
    assert main(arguments) == 0


@pytest.mark.parametrize("path", [p for p in YAMLS if p.name == "eval.yaml"], ids=lambda p: p.parent.name)
def test_evaluation_is_parsed(path):
    command, config = parse(["dreambooth", "--config", str(path)])
    assert command == "dreambooth"
    assert {"real_images", "text_only", "ip_adapter", "moma_beta0", "moma_beta1"} <= set(config.methods)
    assert config.resolved_protocol().name == "mini"
