import json
from pathlib import Path

import pandas as pd
import pytest

from evaluation.cli import parse
from experiments import seeds


def scores(value: float) -> pd.DataFrame:
    """Two methods, three subjects, two prompts each; only `ours` depends on the training."""
    rows = [
        {"method": method, "subject": subject, "label": "cat", "prompt_kind": "context", "prompt": f"a cat {p}"}
        | {"dino": mean + 0.01 * p, "clip_i": 0.5, "clip_t": 0.5}
        for method, mean in (("text_only", 0.1), ("ours", value))
        for subject in ("a", "b", "c")
        for p in range(2)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def folders(tmp_path):
    made = {seed: tmp_path / f"run{seed}" for seed in (0, 1, 2)}
    for seed, folder in made.items():
        (folder / "eval").mkdir(parents=True)
        scores(0.4 + 0.1 * seed).to_parquet(folder / "eval" / "scores.parquet")
        about = {"made_with": {"adapter": f"of {seed}"}, "methods": {"ours": {"beta": 1.0}}, "protocol": {"sampler": {"seed": 0}}}
        (folder / "eval" / "protocol.json").write_text(json.dumps(about))
    return made


def test_the_pooled_mean_is_the_mean_over_seeds_and_pictures(folders, tmp_path, capsys):
    seeds.write_pooled(tmp_path / "out", folders)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ours"]["dino"]["mean"] == pytest.approx(0.5 + 0.005)
    assert summary["text_only"]["dino"]["mean"] == pytest.approx(0.105)
    assert summary["title"] == "Training seeds 0, 1, 2, pooled" and summary["made_with"] == {f"{seed}": {"adapter": f"of {seed}"} for seed in folders}
    second = json.loads((tmp_path / "out" / "seed2.json").read_text())
    assert second["ours"]["dino"]["mean"] == pytest.approx(0.605)
    told = {"title": "Training seed 2", "made_with": {"adapter": "of 2"}, "methods": {"ours": {"beta": 1.0}}, "sampler": {"seed": 0}}
    assert {key: second[key] for key in told} == told
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| ours | 0.405 / 0.505 / 0.605 | 0.500 / 0.500 / 0.500 |" in page and "| text_only | 0.105 / 0.105 / 0.105 |" in page
    assert "Training seeds 0, 1, 2" in capsys.readouterr().out


def test_each_seed_trains_both_stages_in_its_folder_with_the_options_given(monkeypatch):
    commands = []
    monkeypatch.setattr(seeds, "run", lambda module, *arguments, threads=None: commands.append((module, arguments, threads)))
    seeds.main(["--seeds", "3", "--only-train", "--trainer.max_steps", "2"])
    plain = "--config experiments/mini/seeds/stage1-plain.yaml "
    for (stage, over, folder), (_, arguments, threads) in zip(
            [("stage1", "", "stage1"), ("stage1", plain, "stage1-plain"), ("stage2", "", "stage2")], commands, strict=True):
        joined = " ".join(arguments)
        assert joined.startswith(f"fit --config experiments/mini/{stage}.yaml --config experiments/mini/two_processes/{stage}.yaml {over}--")
        assert "--seed_everything 3" in joined and "--data.init_args.config.seed 3" in joined and "--trainer.max_steps 2" in joined and threads is None
        assert f"--trainer.default_root_dir runs/mini-seed3/{folder} " in joined
        assert (stage == "stage2") == ("--model.init_args.decoder runs/mini-seed3/stage1/image_feature_decoder" in joined)


def test_a_seed_is_evaluated_on_what_it_trained(monkeypatch, tmp_path):
    commands, experiments = [], Path("experiments").resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(experiments)
    monkeypatch.setattr(seeds, "run", lambda module, *arguments, threads=None: commands.append(arguments))
    seeds.evaluate("mini", 3, 0)
    assert commands == [("dreambooth", "--config", "runs/mini-seed3/seeds.yaml")]
    config = parse(list(commands[0]))[1]
    decoders = {name: f"runs/mini-seed3/{name}/image_feature_decoder" for name in ("stage1", "stage1-plain")}
    assert [config.run, config.adapter, config.decoder] == ["runs/mini-seed3", "runs/mini-seed3/stage2/adapter", decoders["stage1"]]
    assert config.methods["plain_stage1"].decoder == decoders["stage1-plain"] and config.methods["moma"].decoder is None


def test_a_step_that_fails_ends_it():
    with pytest.raises(seeds.subprocess.CalledProcessError):
        seeds.run("moma_lightning.there_is_no_such_module")
