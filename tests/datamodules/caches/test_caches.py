"""Caches of the mini world's own models: the same training as online, and nothing stale or foreign accepted."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import LightningEnvironment

from datamodules.caches import __main__ as command
from datamodules.caches import stamp
from datamodules.caches.make import CacheConfig, CacheMaker, finished
from datamodules.caches.stamp import CacheStamp
from datamodules.pictures import open_mask
from datamodules.samples import BadSamples, read_shards, to_subject_mask
from datamodules.squares import as_bytes
from experiments.mini.models import mini_foundation
from moma_lightning.__main__ import main
from moma_lightning.batch import OF_THE_SUBJECT
from moma_lightning.foundation import load_image_encoder
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.models.latents import scaled
from moma_lightning.models.masks import MaskPyramid
from moma_lightning.modules.base import TrainedPartModule
from moma_lightning.modules.stage2 import GridConfig, Stage2, Stage2Config
from moma_lightning.optim import OptimizerConfig
from moma_lightning.training.guards import Preempted
from moma_lightning.training.options import TrainingOptions
from tests.datamodules.caches.running import config, copied, losses, make, opened


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    folder, foundation = tmp_path_factory.mktemp("decoder"), mini_foundation()
    torch.manual_seed(0)
    ImageFeatureDecoder.from_foundation(foundation, DecoderConfig(), load_image_encoder(foundation).embed_dim).save_pretrained(folder)
    return str(folder)


def stage2(decoder: str | None, **options) -> Stage2:
    seed_everything(0, verbose=False)
    return Stage2(mini_foundation(), Stage2Config(**options), OptimizerConfig(lr=1e-3), decoder, GridConfig(pictures=1, num_inference_steps=1))


@pytest.fixture(scope="module")
def cache(data, decoder, tmp_path_factory) -> Path:
    return make(data, tmp_path_factory.mktemp("cache"), stage2(decoder))


def test_training_from_the_cache_is_the_training_online(data, decoder, cache, tmp_path):
    online = losses(stage2(decoder), data, tmp_path / "online")
    module = stage2(decoder, cached=True)
    assert module.decoder is None and module.image_encoder is None
    offline = losses(module, cache, tmp_path / "offline")
    assert len(online) == 6 + 1
    torch.testing.assert_close(torch.tensor(offline), torch.tensor(online), rtol=1e-4, atol=1e-5)
    unmirrored = losses(stage2(decoder, cached=True), cache, tmp_path / "unmirrored", flip=False)
    assert max(abs(a - b) for a, b in zip(unmirrored, online, strict=True)) > 1e-3, "the mirrored views count"
    assert list((tmp_path / "offline/pictures").glob("*.png")), "validation draws its grid from a cache too"


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_training_from_a_cache_with_the_reference_is_the_training_online_on_its_mean(data, decoder, tmp_path, monkeypatch, variant):
    """No reference pass is run; the random numbers that its latents took online are drawn all the same."""
    offline = tmp_path / "cache"
    make(data, offline, stage2(decoder, variant=variant, cache_reference=True))
    latents = Stage2.latents

    def of_the_mean(self, batch, generator=None):
        target, _ = latents(self, batch, generator)
        return target, scaled(self.vae, DiagonalGaussianDistribution(self.moments(batch)[1].float()).mode())

    with monkeypatch.context() as patch:
        patch.setattr(Stage2, "latents", of_the_mean)
        online = losses(stage2(decoder, variant=variant), data, tmp_path / "online")
    module = stage2(decoder, variant=variant, cached=True, cache_reference=True)
    monkeypatch.setattr(module.adapter, "reference_features", lambda *_: pytest.fail("a reference pass"))
    module.grid.pictures = 0  # validation's pictures are drawn with one
    torch.testing.assert_close(torch.tensor(losses(module, offline, tmp_path / "offline")), torch.tensor(online), rtol=1e-4, atol=1e-5)


def test_the_reference_is_kept_where_the_subject_is(data, decoder, cache, tmp_path):
    with_reference = make(data, tmp_path / "cache", stage2(decoder, cache_reference=True), dtype="float16")
    sizes = []
    for sample in read_shards([str(with_reference / "val-00000.tar")], BadSamples(tmp_path / "bad", "raise")):
        features = safetensors.torch.load(sample["safetensors"])
        mask = MaskPyramid(to_subject_mask(as_bytes(open_mask(sample["mask.png"])))[None], (8, 8))
        kept = {name: feature.shape for name, feature in features.items() if name.startswith(OF_THE_SUBJECT)}
        assert len(kept) == 7 * 2
        for name, (views, positions, _) in kept.items():
            layer_positions = int(name.split(".")[2])
            assert (views, positions) == (2, int((mask.weight(layer_positions) > 0).sum())) and positions < layer_positions
        sizes.append(sum(shape.numel() for shape in kept.values()))
    assert len(set(sizes)) > 1, "subjects of different sizes"
    for folder, options, named in (
        (cache, {"cache_reference": True}, r"base \(none, not .*\), reference_features \(none, not released\)"),
        (with_reference, {}, r"base \(.*, not none\), reference_features \(released, not none\)"),
        (with_reference, {"cache_reference": True, "variant": "paper"}, r"reference \(whole, not white\), reference_features \(released, not paper\)"),
    ):
        with pytest.raises(ValueError, match=f"was made with another {named}"):
            losses(stage2(decoder, cached=True, **options), folder, tmp_path / "refused")


def test_a_reference_is_kept_for_who_reads_it(data, decoder, tmp_path):
    with pytest.raises(ValueError, match="stage2.subject is false"):
        stage2(decoder, cache_reference=True, subject=False)
    with pytest.raises(ValueError, match=r"set both, or neither"):
        losses(stage2(decoder, cache_reference=True), data, tmp_path)
    module = stage2(decoder, cached=True, cache_reference=True)
    own = module.cache_identity()
    module.foundation = replace(mini_foundation(), vae=f"{mini_foundation().base}/vae", base_config=mini_foundation().base)
    assert module.cache_identity() != own, "a LoRA changes the models that base_config names"


def test_half_precision_stays_near(data, decoder, tmp_path):
    online = losses(stage2(decoder), data, tmp_path / "online")
    half = losses(stage2(decoder, cached=True), make(data, tmp_path / "cache", stage2(decoder), dtype="float16"), tmp_path / "offline")
    torch.testing.assert_close(torch.tensor(half), torch.tensor(online), rtol=0.02, atol=0.005)


def test_what_a_cache_holds(cache, data, decoder, tmp_path):
    assert finished(config(data), cache) | {"megabytes": 0} == {"shards": 7, "samples": 32, "left_out": 0, "megabytes": 0}
    batch, online = (next(iter(opened(folder).val_dataloader())) for folder in (cache, data))
    assert (batch.key, batch.caption, batch.label, batch.full_caption) == (online.key, online.caption, online.label, online.full_caption)
    assert torch.equal(batch.subject_mask, online.subject_mask)
    wanted = stage2(decoder).features(online)
    for name, feature in wanted.items():
        torch.testing.assert_close(batch.features[name], feature, rtol=1e-4, atol=1e-4)
    paper = make(data, tmp_path / "paper", stage2(decoder, variant="paper"))
    white = next(iter(opened(paper).val_dataloader())).features
    assert not torch.allclose(white["white_moments"], white["moments"])


def test_made_once_and_again_only_where_needed(data, decoder, cache):
    def times():
        return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.tar")}

    first = times()
    make(data, cache, stage2(decoder))
    assert times() == first
    CacheStamp.path(cache / "train-00001.tar").unlink()  # as a kill before the end leaves it
    make(data, cache, stage2(decoder))
    assert {name for name, time in times().items() if time != first[name]} == {"train-00001.tar"}


def test_processes_share_the_shards(data, decoder, tmp_path):
    class Ranks:
        world_size = 3

    maker, seen = CacheMaker(stage2(decoder), config(data), CacheConfig(), tmp_path), []
    for rank in range(3):
        maker._trainer = Ranks()
        maker._trainer.global_rank = rank
        seen += list(maker.predict_dataloader())
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(("rank", "code"), [(0, 143), (1, 0)])
def test_who_is_told_to_end_exits_as_training_does(data, decoder, tmp_path, rank, code):
    """Lightning's launcher, which started rank 1, would kill rank 0 for another code of it."""
    maker = CacheMaker(stage2(decoder, cached=True), config(data), CacheConfig(), tmp_path)
    maker._trainer = Mock(spec=Trainer, received_sigterm=True, local_rank=rank, strategy=Mock(cluster_environment=LightningEnvironment()))
    with pytest.raises(Preempted) as stop:
        maker.predict_step(0, 0)
    assert stop.value.code == code


def other_decoder(tmp_path: Path, decoder: str) -> Stage2:
    torch.manual_seed(1)
    ImageFeatureDecoder.from_foundation(mini_foundation(), DecoderConfig(), load_image_encoder(mini_foundation()).embed_dim).save_pretrained(tmp_path)
    return stage2(str(tmp_path), cached=True)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (other_decoder, "another decoder"),
        (lambda _, decoder: stage2(decoder, cached=True, variant="paper"), r"another reference \(whole, not white\)"),
        (lambda _, decoder: stage2(None, cached=True, context="image_encoder"), "another decoder .* image_encoder .* mllm"),
    ],
)
def test_a_cache_of_other_models_is_refused(cache, decoder, tmp_path, other, named):
    with pytest.raises(ValueError, match=rf"00000.tar was made with {named}"):
        losses(other(tmp_path, decoder), cache, tmp_path)


@pytest.mark.parametrize(("now", "is_refused"), [("o/m@main (abc)", False), ("o/m@main (def)", True), ("o/m@main", False)])
def test_a_cache_of_a_branch_that_has_moved_on_is_refused(now, is_refused):
    """Not where the commit is unknown: training from a cache does without the model, and so may the machine."""
    module = TrainedPartModule(OptimizerConfig(), TrainingOptions())
    module.cache_identity = lambda: {"mllm": now}
    module._trainer = SimpleNamespace(precision="32-true", strategy=None, datamodule=SimpleNamespace(made_by={"a.tar": {"mllm": "o/m@main (abc)"}}))
    with pytest.raises(ValueError, match=r"a.tar was made with another mllm \(o/m@main \(abc\), not o/m@main \(def\)\)") if is_refused else nullcontext():
        module.setup("fit")


def test_what_moves_the_embedding_is_in_the_stamp(decoder):
    """A foundation whose MLLM is quantized predicts other embeddings from the same files."""
    module = stage2(decoder, cached=True)
    own = module.cache_identity()
    for change in ({"mllm_quantization": "4bit"}, {"mllm_dtype": "bfloat16"}):
        module.foundation = replace(mini_foundation(), **change)
        assert module.cache_identity() != own


def test_stale_and_damaged_shards_are_refused(cache, decoder, data, tmp_path):
    opened(cache)
    with pytest.raises(ValueError, match="made of pictures of 64 pixels, training wants 32"):
        opened(cache, image_size=32)
    cut = copied(cache, tmp_path / "cut")
    (cut / "train-00002.tar").write_bytes((cut / "train-00002.tar").read_bytes()[:-512])
    with pytest.raises(ValueError, match="train-00002.tar: is .* bytes long"):
        opened(cut)
    unstamped = copied(cache, tmp_path / "unstamped")
    (unstamped / "train-00000.json").unlink()
    with pytest.raises(ValueError, match="train-00000.tar has no stamp"):
        opened(unstamped)
    unknown = '{"made_by": {}, "source_sha256": ""}'
    for content, told in (("{}", "tar has no stamp"), ("{", "json is beside .* and no JSON"), (unknown, "json is not the stamp")):
        (unstamped / "train-00000.json").write_text(content)
        with pytest.raises(ValueError, match=f"train-00000.{told}"):
            opened(unstamped)
    stale = copied(cache, tmp_path / "stale")
    source = tmp_path / "train-00001.tar"  # a source without a manifest, changed after the cache was made
    source.write_bytes(b"changed")
    replace(CacheStamp.read(stale / "train-00001.tar"), source=str(source)).write(stale / "train-00001.tar")
    with pytest.raises(ValueError, match=r"train-00001.tar: its source .* has changed since"):
        opened(stale)
    plain = make(data, tmp_path / "plain", stage2(decoder), mirrored=False)
    opened(plain, flip=False)
    with pytest.raises(ValueError, match="no mirrored views"):
        opened(plain)
    with pytest.raises(ValueError, match="is a cache itself"):
        make(cache, tmp_path / "twice", stage2(decoder))


def test_a_cache_does_not_overwrite_its_own_sources(data, decoder):
    before = {path: path.read_bytes() for path in data.glob("*.tar")}
    with pytest.raises(ValueError, match="is the folder of the shards themselves"):
        make(data, data / "." , stage2(decoder))
    assert {path: path.read_bytes() for path in data.glob("*.tar")} == before


def test_a_cache_is_whole_and_holds_nothing_of_an_earlier_one(cache, decoder, data, tmp_path):
    half = copied(cache, tmp_path / "half")
    for end in ("tar", "json"):
        (half / f"train-00002.{end}").unlink()  # as a kill between two shards leaves it
    with pytest.raises(ValueError, match=r"half lacks 1 of the 7 shards that it is to hold, train-00002\.tar among them: finish the cache first"):
        opened(half)
    more = copied(cache, tmp_path / "more")
    for end in ("tar", "json"):
        shutil.copy(more / f"train-00002.{end}", more / f"train-00009.{end}")  # as an export of more shards left it
    with pytest.raises(ValueError, match=r"train-00009\.tar is not among the shards in .*shards\.json"):
        opened(more)
    make(data, more, stage2(decoder))
    assert not list(more.glob("train-00009.*"))
    opened(more)


def test_a_source_is_judged_by_its_bytes_and_read_only_where_it_may_have_changed(cache, decoder, data, tmp_path, monkeypatch):
    def unread(path: Path):
        raise AssertionError(f"{path} was read")

    sources, moved = Path(shutil.copytree(data, tmp_path / "sources")), copied(cache, tmp_path / "moved")
    for path in moved.glob("*.tar"):
        replace(CacheStamp.read(path), source=str(sources / path.name), source_mtime_ns=-1).write(path)
    opened(moved)  # another time, and the same bytes
    before = {path: path.stat().st_mtime_ns for path in moved.glob("*.tar")}
    make(sources, moved, stage2(decoder))
    assert before == {path: path.stat().st_mtime_ns for path in moved.glob("*.tar")}, "no reason to make them again"
    with monkeypatch.context() as patch:
        patch.setattr(stamp, "sha256", unread)
        opened(moved)
        make(sources, moved, stage2(decoder))
    shutil.copy(sources / "train-00000.tar", sources / "train-00001.tar")
    assert "train-00001.tar" in (sources / "manifest.json").read_text(), "which still tells of what was there"
    with pytest.raises(ValueError, match=r"train-00001.tar: its source .* has changed since"):
        opened(moved)
    make(sources, moved, stage2(decoder))
    assert [path.name for path, time in before.items() if path.stat().st_mtime_ns != time] == ["train-00001.tar"]
    opened(moved)


def test_pictures_for_a_stage_that_wants_a_cache(data, decoder, tmp_path):
    with pytest.raises(ValueError, match="cached is true, but the shards hold pictures"):
        losses(stage2(decoder, cached=True), data, tmp_path)


@pytest.mark.filterwarnings("ignore:.*It is skipped")
def test_bad_samples_are_left_out_and_counted(data, decoder, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in data.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    with tarfile.open(folder / "train-00000.tar") as tar, tarfile.open(folder / "train-00009.tar", "w") as damaged:
        for number, member in enumerate(tar):
            content = tar.extractfile(member)
            if number >= 3 or member.name.endswith("mask.png"):  # the first sample's three files are gone but for one
                damaged.addfile(member, content)
    (folder / "train-00000.tar").unlink()
    out = make(folder, tmp_path / "cache", stage2(decoder))
    assert finished(config(folder), out)["left_out"] == 1 and finished(config(folder), out)["samples"] == 31
    assert "json is missing" in (folder / "bad.log").read_text()


@pytest.mark.parametrize("experiment, training", [("mini", "stage2"), ("mini", "stage2_reference"), ("sd15_llava7b", "stage2")])
def test_the_commands_of_the_docs(data, decoder, tmp_path, monkeypatch, capsys, experiment, training):
    """`make cache-stage2`, then `make stage2` with the experiment's cached YAML; full size with the mini world's models."""
    shards, folder = "--data.init_args.config", Path("experiments") / experiment
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = ["--config", str(folder / "stage2.yaml"), "--model.init_args.decoder", decoder,
                 "--model.init_args.foundation", json.dumps(asdict(mini_foundation())),
                 "--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto",
                 "--trainer.precision", "32-true", f"{shards}.image_size", "64", f"{shards}.batch_size", "2", f"{shards}.num_workers", "0"]
    pictures = [f"{shards}.train", f"{data}/train-*.tar", f"{shards}.val", f"{data}/val-*.tar"]
    reference = ["--model.init_args.stage2.cache_reference", str(training == "stage2_reference").lower()]
    monkeypatch.setattr(sys, "argv", ["caches", *arguments, *reference, *pictures])
    command.main()
    assert "'shards': 7, 'samples': 32, 'left_out': 0" in capsys.readouterr().out
    assert json.loads((tmp_path / "cache/train-00000.json").read_text())["dtype"] == "float16"
    cached = [f"{shards}.train", f"{tmp_path}/cache/train-*.tar", f"{shards}.val", f"{tmp_path}/cache/val-*.tar", "--trainer.fast_dev_run", "true"]
    monkeypatch.setattr(sys, "argv", ["moma_lightning", "fit", *arguments, "--config", str(folder / f"cached/{training}.yaml"), *cached])
    assert main(sys.argv[1:]) == 0


def test_the_first_process_tells_of_all_shards_when_the_others_are_done(data, decoder, tmp_path):
    shards = "--data.init_args.config"
    arguments = ["--config", "experiments/mini/stage2.yaml", "--model.init_args.decoder", decoder, "--trainer.default_root_dir", str(tmp_path),
                 "--trainer.accelerator", "cpu", "--trainer.devices", "2", f"{shards}.batch_size", "2",
                 f"{shards}.train", f"{data}/train-*.tar", f"{shards}.val", f"{data}/val-*.tar"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "datamodules.caches", *arguments], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'shards': 7, 'samples': 32, 'left_out': 0") == 1
