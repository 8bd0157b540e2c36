"""Stage 1 from caches: the same training as on the pictures, and refusals by name of what a cache cannot hold."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from datamodules.caches import __main__ as command
from datamodules.caches.make import finished
from experiments.mini.models import mini_foundation
from moma_lightning.__main__ import main
from moma_lightning.foundation import FoundationConfig
from moma_lightning.models.image_feature_decoder import DecoderConfig
from moma_lightning.modules.stage1 import EditConfig, Stage1
from moma_lightning.modules.stage2 import GridConfig, Stage2, Stage2Config
from moma_lightning.optim import OptimizerConfig
from tests import tiny_mllms
from tests.datamodules.caches.running import config, copied, losses, make, opened


def stage1(foundation: FoundationConfig | None = None, edit_rate: float = 0.0, cached: bool = False, **decoder) -> Stage1:
    seed_everything(0, verbose=False)
    return Stage1(foundation or mini_foundation(), DecoderConfig(**decoder), OptimizerConfig(lr=1e-3), edits=EditConfig(edit_rate), cached=cached)


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory) -> Path:
    return make(data, tmp_path_factory.mktemp("cache"), stage1())


def test_training_from_the_cache_is_the_training_on_pictures(data, cache, tmp_path):
    on_pictures, cached = stage1(), stage1(cached=True)
    assert cached.image_encoder is None
    cached.decoder.load_state_dict(on_pictures.decoder.state_dict())  # loading what a cache saves draws random numbers
    online = losses(on_pictures, data, tmp_path / "online")
    offline = losses(cached, cache, tmp_path / "offline")
    assert len(online) == 6 + 1 and online[0] > 1.01 * online[5]
    torch.testing.assert_close(torch.tensor(offline), torch.tensor(online), rtol=1e-4, atol=1e-5)
    scores = cached.trainer.callback_metrics, on_pictures.trainer.callback_metrics
    for name in ("val/cosine", "val/cosine_white_background", "val/cosine_mean"):
        torch.testing.assert_close(*(score[name] for score in scores), rtol=1e-4, atol=1e-4)
    unmirrored = losses(stage1(cached=True), cache, tmp_path / "unmirrored", flip=False)
    assert max(abs(a - b) for a, b in zip(unmirrored, online, strict=True)) > 1e-3, "the mirrored views count"


def test_half_precision_stays_near(data, tmp_path):
    online = losses(stage1(), data, tmp_path / "online")
    half = losses(stage1(), make(data, tmp_path / "cache", stage1(), dtype="float16"), tmp_path / "offline")
    torch.testing.assert_close(torch.tensor(half), torch.tensor(online), rtol=0.01, atol=0.001)


def test_what_a_cache_holds(cache, data):
    module = stage1()
    offline, online = (next(iter(opened(folder).val_dataloader())) for folder in (cache, data))
    assert set(offline.features) == {"target", "white_background", "vision"}
    for name, feature in module.features(online).items():
        torch.testing.assert_close(offline.features[name], feature, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(offline.features["target"], offline.features["white_background"], atol=0.01)


def test_edits_are_refused_with_what_to_do(cache, data, tmp_path):
    for run in (lambda: make(data, tmp_path / "edited", stage1(edit_rate=0.2)), lambda: losses(stage1(edit_rate=0.2), cache, tmp_path)):
        with pytest.raises(ValueError, match=r"edits.rate 0.2 recolours .* set model.init_args.edits.rate to 0"):
            run()
    assert not list((tmp_path / "edited").glob("*.tar"))


def test_foreign_caches_are_refused_by_name(cache, data, tmp_path):
    module = stage1(cached=True)
    module.foundation = replace(module.foundation, mllm=module.foundation.image_encoder)
    with pytest.raises(ValueError, match=r"00000.tar was made with another mllm \("):
        losses(module, cache, tmp_path)
    context = Stage2Config(context="image_encoder", cached=True)
    with pytest.raises(ValueError, match=r"another mllm .* picture_side .* reference .* stage \(stage1, not stage2\)"):
        losses(Stage2(mini_foundation(), context, OptimizerConfig(), grid=GridConfig(pictures=0)), cache, tmp_path)
    with pytest.raises(ValueError, match="cached is true, but the shards hold pictures"):
        losses(stage1(cached=True), data, tmp_path)


def test_an_option_at_none_is_one_that_a_stamp_does_not_tell_of(cache, data, tmp_path):
    """As caches are that were made before the option was there, or when it was kept as "None"."""
    old = copied(cache, tmp_path / "old")
    for path in old.glob("*-*.json"):
        content = json.loads(path.read_text())
        assert "mllm_quantization" not in content["made_by"]
        path.write_text(json.dumps(content | {"made_by": content["made_by"] | {"mllm_quantization": "None"}}))
    before = {path: path.stat().st_mtime_ns for path in old.glob("*.tar")}
    losses(stage1(cached=True), old, tmp_path)
    make(data, old, stage1())
    assert before == {path: path.stat().st_mtime_ns for path in old.glob("*.tar")}
    module = stage1(cached=True)
    module.foundation = replace(module.foundation, mllm_quantization="4bit")
    with pytest.raises(ValueError, match=r"another mllm_quantization \(none, not 4bit\)"):
        losses(module, old, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_families_with_a_connector_of_its_own(family, tmp_path):
    tiny_mllms.write(family, tmp_path)
    module = stage1(mini_foundation(mllm=str(tmp_path))).eval()
    white = torch.rand(2, 3, 24, 24) * 2 - 1
    texts = ["cat", "mug"], ["a cat on a lake", "a mug in the snow"]
    features = module.decoder.vision_features(white)
    assert torch.equal(module.decoder.from_features(features, *texts), module.decoder(white, *texts))
    assert not torch.equal(module.decoder.from_features(features.flip(0), *texts), module.decoder(white, *texts))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_other_families_say_so(family, data, tmp_path):
    tiny_mllms.write(family, tmp_path / "mllm")
    module = stage1(mini_foundation(mllm=str(tmp_path / "mllm")), image_size=tiny_mllms.image_size(family))
    with pytest.raises(ValueError, match=rf"cannot be cached for MLLMs of the family '{family}', only for llava, idefics3, smolvlm"):
        make(data, tmp_path / "cache", module)


def test_a_trained_vision_tower_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="trainable names the vision tower"):
        make(data, tmp_path, stage1(trainable=["mapping", "vision_tower"]))


@pytest.mark.parametrize("experiment", ["mini", "sd15_llava7b"])
def test_the_commands_of_the_docs(data, tmp_path, monkeypatch, capsys, experiment):
    """`make cache-stage1`, then `make stage1` with the experiment's cached YAML; full size with the mini world's models."""
    shards, folder = "--data.init_args.config", Path("experiments") / experiment
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = ["--config", str(folder / "stage1.yaml"), "--model.init_args.foundation", json.dumps(asdict(mini_foundation())),
                 "--model.init_args.clip", "experiments/mini/foundation/clip", "--trainer.default_root_dir", str(tmp_path),
                 "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.precision", "32-true",
                 f"{shards}.image_size", "64", f"{shards}.batch_size", "2", f"{shards}.num_workers", "0"]
    pictures = [f"{shards}.train", f"{data}/train-*.tar", f"{shards}.val", f"{data}/val-*.tar"]
    monkeypatch.setattr(sys, "argv", ["caches", *arguments, *pictures, "--model.init_args.edits.rate", "0"])
    command.main()
    assert "'shards': 7, 'samples': 32, 'left_out': 0" in capsys.readouterr().out
    assert finished(config(data), tmp_path / "cache")["samples"] == 32
    cached = [f"{shards}.train", f"{tmp_path}/cache/train-*.tar", f"{shards}.val", f"{tmp_path}/cache/val-*.tar", "--trainer.fast_dev_run", "true"]
    monkeypatch.setattr(sys, "argv", ["moma_lightning", "fit", *arguments, "--config", str(folder / "cached/stage1.yaml"), *cached])
    assert main(sys.argv[1:]) == 0
