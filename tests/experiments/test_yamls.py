"""Every experiment YAML runs: each training one a step on tiny shards, and the mini ones as the whole line from shards to report."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from safetensors.torch import load_file, save_file

from datamodules.mini.export import export
from datamodules.mini.views import VIEWS
from evaluation import published
from evaluation.cli import main as evaluation
from evaluation.cli import parse
from evaluation.methods import Moma
from evaluation.names import methods_of
from evaluation.protocols import named
from evaluation.sweeps import point_name
from experiments import seeds
from experiments.mini.models import PROTOCOL, mini_foundation
from experiments.mini.recipe.check_views import measure
from experiments.sweep import read, run_grid
from moma_lightning.__main__ import main
from moma_lightning.dotted import flat
from moma_lightning.foundation import load_image_encoder
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.plan.report import plan
from tests.offline_wandb import offline_run

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MINI = EXPERIMENTS / "mini"
YAMLS = sorted(path for path in EXPERIMENTS.glob("*/*.yaml") if path.parent.name not in ("sweeps", "ablations"))
TRAINING = [path for path in YAMLS if "\ntrainer:" in path.read_text()]
#: What full-size YAMLs are run with here: the mini world's base models and pictures, one CPU process.
STAND_INS = ["--model.init_args.foundation", json.dumps(asdict(mini_foundation())), "--trainer.accelerator", "cpu", "--trainer.devices", "1",
             "--trainer.precision", "32-true", "--trainer.strategy", "auto", "--data.init_args.config.image_size", "64",
             "--data.init_args.config.num_workers", "0"]
#: Settings of the paper, of its authors' code, and of this project where those are silent, by YAML.
FULL_SIZE = {
    "sd15_llava7b/foundation.yaml": {"base": "SG161222/Realistic_Vision_V4.0_noVAE", "mllm": "llava-hf/llava-1.5-7b-hf", "mllm_dtype": "bfloat16"},
    "sd15_llava7b/data_stage1.yaml": {"init_args.config.image_size": 512, "init_args.config.batch_size": 16},
    "sd15_llava7b/data_stage2.yaml": {"init_args.config.image_size": 512, "init_args.config.batch_size": 8},
    "sd15_llava7b/stage1.yaml": {"trainer.strategy.init_args.save_distributed_checkpoint": True, "trainer.precision": "bf16-mixed",
                                 "trainer.devices": 8, "trainer.max_steps": 6600, "model.init_args.optimizer.lr": 1e-4},
    "sd15_llava7b/stage2.yaml": {"model.init_args.stage2.variant": "released", "model.init_args.stage2.context_dropout": 0.1, "trainer.precision": "bf16-mixed",
                                 "trainer.devices": 8, "trainer.max_steps": 40_000, "model.init_args.optimizer.lr": 1e-4},
    "sd15_llava7b/eval.yaml": {"protocol": "moma-paper"},
    "openimages/data.yaml": {"captions.captioner": "datamodules.openimages.captioners.Blip2Captioner", "captions.init_args.model": "Salesforce/blip2-opt-6.7b",
                             "shards.samples_per_shard": 250},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    export(folder, train_count=64, val_count=32, samples_per_shard=32)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    folder, foundation = tmp_path_factory.mktemp("decoder"), mini_foundation()
    ImageFeatureDecoder.from_foundation(foundation, DecoderConfig(), load_image_encoder(foundation).embed_dim).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fit(data):
    """A function that runs `fit` on the tiny shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")

        def run(path: Path, folder: Path, *options: str) -> None:
            shards = "--data.init_args.config"
            arguments = ["fit", "--config", str(path), "--trainer.default_root_dir", str(folder), f"{shards}.train", f"{data}/shards/train-*.tar",
                         f"{shards}.val", f"{data}/shards/val-*.tar", f"{shards}.batch_size", "2", *options]
            patch.setattr(sys, "argv", ["moma_lightning", *arguments])
            assert main(arguments) == 0

        yield run
    wandb.finish()
    wandb.teardown()


@pytest.fixture(scope="module")
def trained(fit, tmp_path_factory) -> Path:
    """Two steps of each stage; lambda, which two steps hardly move, is set to 1 so that beta and masks show."""
    folder, short = tmp_path_factory.mktemp("run"), ("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false")
    fit(MINI / "stage1.yaml", folder / "stage1", *short)
    fit(MINI / "stage2.yaml", folder / "stage2", *short, "--model.init_args.decoder", str(folder / "stage1/image_feature_decoder"))
    weights = load_file(folder / "stage2/adapter/moma.safetensors")
    save_file({name: torch.ones_like(w) if name.endswith("lambda_") else w for name, w in weights.items()}, folder / "stage2/adapter/moma.safetensors")
    return folder


@pytest.fixture
def options(trained, data, monkeypatch) -> list[str]:
    """What makes an evaluation small: one subject, two prompts, four denoising steps."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    small = {"subjects": ["cat"], "context_prompts": 1, "texture_prompts": 1, "sampler": {"num_inference_steps": 4}}
    return [f"--run={trained}", f"--data={data}/dreambooth", f"--adapter={trained}/stage2/adapter", f"--decoder={trained}/stage1/image_feature_decoder",
            "--num_processes=1", f"--overrides={json.dumps(small)}"]


def test_there_are_yamls_of_each_kind():
    assert {path.name for path in YAMLS} >= {"stage1.yaml", "stage2.yaml", "ip_adapter.yaml", "eval.yaml"}


@pytest.mark.parametrize("path", FULL_SIZE)
def test_full_size_settings_are_what_the_documents_say(path):
    """Of a training that no test can run."""
    given = flat(yaml.safe_load((EXPERIMENTS / path).read_text()))
    assert {name: value.partition("@")[0] if isinstance(value, str) else value for name, value in given.items() if name in FULL_SIZE[path]} == FULL_SIZE[path]


def test_steps_are_passes_over_the_papers_triplets():
    """Three of stage 1 and nine of stage 2, of 282 k triplets, which `plan` takes for a pass."""
    triplets, sizes, steps = inspect.signature(plan).parameters["samples"].default, "init_args.config.batch_size", "trainer.max_steps"
    samples = [8 * FULL_SIZE[f"sd15_llava7b/data_{stage}.yaml"][sizes] * FULL_SIZE[f"sd15_llava7b/{stage}.yaml"][steps] for stage in ("stage1", "stage2")]
    assert triplets == 282_000 and [round(number / triplets) for number in samples] == [3, 9]


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_training_takes_a_step(path, fit, decoder, tmp_path):
    options = ["--trainer.fast_dev_run", "1", *([] if path.parent == MINI else STAND_INS)]
    if path.name == "stage2.yaml":
        options += ["--model.init_args.decoder", str(decoder)]
    if path.name == "stage1.yaml":
        options += ["--model.init_args.clip", str(MINI / "foundation/clip")]
    fit(path, tmp_path, *options)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_share_the_batch_and_take_a_step(stage, data, decoder, tmp_path):
    """As `make` trains; Lightning starts the second process by the command line, so the first is one of its own as well."""
    whole, half = MINI / f"{stage}.yaml", MINI / f"two_processes/{stage}.yaml"
    one, two = (yaml.safe_load(path.read_text())["data"]["init_args"]["config"]["batch_size"] for path in (whole, half))
    assert one == 2 * two
    shards, given = "--data.init_args.config", "--model.init_args"
    command = [sys.executable, "-m", "moma_lightning", "fit", "--config", str(whole), "--config", str(half), "--trainer.fast_dev_run", "2",
               "--trainer.default_root_dir", str(tmp_path), f"{shards}.train", f"{data}/shards/train-*.tar", f"{shards}.val", f"{data}/shards/val-*.tar",
               *([f"{given}.decoder", str(decoder)] if stage == "stage2" else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"WANDB_MODE": "disabled"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr


@pytest.mark.parametrize(("name", "settings", "rows"), [
    ("beta", {(beta, 1.0) for beta in (0.0, 0.25, 0.5, 0.75, 1.0, 1.2)},
     {1.0: (0.618, 0.348, 0.803, 0.335), 0.5: (0.591, 0.348, 0.788, 0.338), 0.0: (0.583, 0.349, 0.782, 0.319)}),
    ("masking", {(1.0, strength) for strength in (1.0, 0.5, 0.0)},
     {1.0: (0.618, 0.348, 0.803, 0.335), 0.5: (0.603, 0.322, 0.797, 0.231), 0.0: (0.575, 0.298, 0.788, 0.322)}),
])
def test_tables_3_and_4_have_the_papers_settings_and_numbers(name, settings, rows):
    """Beta goes on to 1.2, as in the paper's Figure 8."""
    config = parse(["ablate", "--config", str(MINI / "eval.yaml"), "--config", str(EXPERIMENTS / f"ablations/{name}.yaml")])[1]
    full = config.resolved_protocol().sampler.mask_strength
    given = [(method.beta, full if method.mask_strength is None else method.mask_strength) for method in config.ablation.methods.values()]
    assert set(given) == settings and len(given) == len(settings)
    assert published.ABLATIONS[config.ablation.published] == rows


def test_the_line_from_shards_to_report(trained, options):
    """What `make tables` does, but for the ablations, which are below."""
    given = ["--config", str(MINI / "eval.yaml"), *options]
    evaluation(["dreambooth", *given, "then", "report", *given])
    summary = json.loads((trained / "eval/summary.json").read_text())
    assert {"real_images", "text_only", "ip_adapter", "moma_beta0", "moma_beta1"} <= set(summary)
    made = {path.relative_to(trained).as_posix() for path in trained.rglob("*")}
    assert {"eval/scores.parquet", "eval/table.md", "report/index.html", "report/grid.png"} <= made
    figures = ("4", "5", "6", "7_clip_t_context", "7_clip_t_texture", "8", "9", "10_settings", "10_community")
    assert {f"figures/figure{name}.{kind}" for name in figures for kind in ("png", "svg")} <= made
    settings, community = (json.loads((trained / f"figures/figure10_{name}.json").read_text()) for name in ("settings", "community"))
    assert "(views)" in settings["about"] and community["columns"] == ["Reference", "Training base", "pastel"]


def test_the_evaluation_of_training_seeds_runs(trained, options, tmp_path):
    path = tmp_path / "seeds.yaml"
    path.write_text(seeds.config_of("mini", "runs/mini-seed0").replace("runs/mini-seed0/stage1-plain", str(trained / "stage1")))
    evaluation(["dreambooth", "--config", str(path), *options, f"--run={tmp_path}"])
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert {"text_only", "ip_adapter", "ip_adapter_0.4", "moma", "beta_0.5", "mask_0", "clip_embedding", "plain_stage1"} <= set(summary)


def test_poses_and_distances_are_drawn_and_measured(trained, options, tmp_path):
    small = {"subjects": ["cat"], "context_prompts": 0, "texture_prompts": 0, "pose_prompts": 2, "camera_prompts": 1, "sampler": {"num_inference_steps": 4}}
    only = [f"--run={tmp_path}", f"--overrides={json.dumps(small)}"]
    for command in ("dreambooth", "report"):
        evaluation([command, "--config", str(MINI / "views.yaml"), *options[:-1], *only])
    rows = json.loads((tmp_path / "figures/figure10_settings.json").read_text())["rows"]
    assert [row["title"] for row in rows] == ["Accessory", "Pose", "Camera"]
    table = measure(parse(["score", "--config", str(MINI / "views.yaml"), *options[:-1], *only])[1])
    assert {"text_only", "ip_adapter", "moma_beta1"} <= set(table)
    assert all(0 < view["share"] < 1 and set(table["moma_beta1"]) <= set(VIEWS) for view in table["moma_beta1"].values())


@pytest.mark.parametrize("path", [*sorted(EXPERIMENTS.glob("ablations/*.yaml")), MINI / "ablations/mask_layers.yaml", MINI / "ablations/community.yaml"],
                         ids=lambda p: p.stem)
def test_ablations_of_sampling_run(path, trained, options):
    evaluation(["ablate", "--config", str(MINI / "eval.yaml"), "--config", str(path), *options, "--ablation.name", path.stem])
    rows = methods_of(json.loads((trained / f"ablations/{path.stem}.json").read_text()))
    assert len(rows) >= 3 and len({json.dumps(cells) for cells in rows.values()}) >= 3, "settings that change nothing"


@pytest.mark.parametrize("path", sorted(MINI.glob("ablations/*.yaml")), ids=lambda p: p.stem)
def test_ablations_that_train_name_what_their_commands_write(path):
    """The folders that methods read are those of the `make` commands in the file's own comment."""
    methods = parse(["ablate", "--config", str(MINI / "eval.yaml"), "--config", str(path)])[1].ablation.methods.values()
    roots = {str(Path(used).parent) for method in methods for used in (getattr(method, "adapter", None), getattr(method, "decoder", None)) if used}
    commands = " ".join(line for line in path.read_text().splitlines() if line.startswith("# make "))
    named = {word.strip("'") for word in commands.split() if word.startswith("runs/mini/") and "image_feature_decoder" not in word}
    assert {root.rstrip("0123456789") for root in roots} == {root.rstrip("0123456789") for root in named}


def commands(stage: str) -> list[str]:
    """The options of every `make <stage>` that the ablations' comments name."""
    lines = [line for path in sorted(MINI.glob("ablations/*.yaml")) for line in path.read_text().splitlines()]
    return [line.partition("ARGS='")[2].rstrip("'") for line in lines if line.startswith(f"# make {stage} ")]


@pytest.mark.parametrize(("stage", "given"), [(stage, given) for stage in ("stage1", "stage2") for given in commands(stage)])
def test_commands_in_the_comments_of_ablations_train(stage, given, fit, decoder, tmp_path):
    words = given.split()
    if "--model.init_args.decoder" in words:
        words[words.index("--model.init_args.decoder") + 1] = str(decoder)
    elif stage == "stage2":
        words += ["--model.init_args.decoder", str(decoder)]
    fit(MINI / f"{stage}.yaml", tmp_path, *words, "--trainer.fast_dev_run", "1", "--trainer.default_root_dir", str(tmp_path))


@pytest.mark.parametrize("name", ["beta", "masking"])
def test_sweeps_run_offline_and_can_be_read_back(name, trained, options, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = EXPERIMENTS / f"sweeps/{name}.yaml"
    run_grid(read(path), [*options, "--report.subjects=1"])
    option = {"beta": "beta", "masking": "mask_strength"}[name]
    values = yaml.safe_load(path.read_text())["parameters"][f"moma.{option}"]["values"]
    table = methods_of(json.loads((trained / f"ablations/moma-{name}.json").read_text()))
    assert len(table) == len(values) and "## The paper's numbers" in (trained / f"ablations/moma-{name}.md").read_text()
    runs = [offline_run(path) for path in sorted((trained / "sweeps/wandb").rglob("*.wandb"))]
    runs = [run for run in runs if run["group"] == name]
    assert sorted(run["config"]["moma"][option] for run in runs) == sorted(values)
    for run in runs:
        row = table[point_name(Moma(**run["config"]["moma"]))]
        assert {metric: run["metrics"][metric] for metric in row} == {metric: cell["mean"] for metric, cell in row.items()}
        assert run["tags"] == [name] and {"dino", "clip_i", "clip_t_context", "clip_t_texture", "pictures/sha256"} <= set(run["metrics"])


@pytest.mark.parametrize("path", [p for p in YAMLS if p.name == "eval.yaml"], ids=lambda p: p.parent.name)
def test_evaluation_is_parsed(path):
    command, config = parse(["dreambooth", "--config", str(path)])
    assert command == "dreambooth"
    assert {"real_images", "text_only", "ip_adapter", "moma_beta0", "moma_beta1"} <= set(config.methods)
    assert config.resolved_protocol().name == ("dreambooth-mini" if path.parent == MINI else "moma-paper, modified")


def test_the_papers_evaluation_runs_with_stand_ins(trained, options, tmp_path):
    """Its protocol with the mini world's models and encoders in place of the hub's, one subject, two prompts, four steps."""
    path, mini = EXPERIMENTS / "sd15_llava7b/eval.yaml", asdict(named(PROTOCOL))
    own = yaml.safe_load(path.read_text())["overrides"]["sampler"]
    small = {"subjects": ["cat"], "context_prompts": 1, "texture_prompts": 1, "pictures_per_prompt": 1, "dino": mini["dino"], "clip": mini["clip"],
             "segmenter": mini["segmenter"], "sampler": own | {"num_inference_steps": 4}}
    evaluation(["dreambooth", "--config", str(path), *options[:-1], f"--run={tmp_path}", f"--foundation={json.dumps(asdict(mini_foundation()))}",
                f"--overrides={json.dumps(small)}"])
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert {"real_images", "text_only", "ip_adapter", "moma_beta0", "moma_beta1"} <= set(summary)
    pictures = [picture.name for picture in (tmp_path / "eval/pictures/moma_beta1/cat").glob("*.png")]
    assert len({name.partition("-")[0] for name in pictures}) == len(pictures) // 2 > 3, "every real picture is a reference in turn"


def test_the_released_checkpoint_is_sampled_as_its_authors_do(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--config", str(EXPERIMENTS / "sd15_llava7b/released.yaml"), "--prompt", "a cat", "--print_config"])
    given = yaml.safe_load(capsys.readouterr().out)
    assert stop.value.code == 0 and given["foundation"]["mllm"].startswith("llava-hf/llava-1.5-7b-hf@")
    assert (given["prompt_template"], given["guidance_scale"], given["num_inference_steps"]) == ("photo of a {label}. {prompt}", 7.5, 50)
