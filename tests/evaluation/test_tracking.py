import json
from pathlib import Path

import pytest
import wandb

from evaluation.dreambooth import write_tables
from evaluation.figures import write_figures
from evaluation.generation import generate
from evaluation.made_with import made_with
from evaluation.methods import RealImages
from evaluation.plan import Evaluation
from evaluation.report import write_report
from evaluation.tracking import interval_table, log_evaluation
from tests.evaluation.fakes import Painter, fake_config, fake_score
from tests.offline_wandb import offline_run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = fake_config(tmp_path_factory.mktemp("tracking"), {"real": RealImages(), "moma_beta1": Painter(0.9)}, adapter=None, decoder=None)
    generate(config)
    with pytest.warns(UserWarning, match="copying its input"):
        write_tables(Evaluation.open(config), fake_score(config))
    config.ablations_folder.mkdir()
    rows = {f"beta_{beta}": {"dino": {"mean": beta, "lo": 0.0, "hi": 1.0}} for beta in (0, 1)}
    rows |= {"made_with": made_with(config), "methods": {f"beta_{beta}": {"beta": beta} for beta in (0, 1)}}
    (config.ablations_folder / "beta.json").write_text(json.dumps(rows))
    write_figures(config)
    write_report(config)
    return config


def test_an_offline_run_holds_config_metrics_tables_and_images(config, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    config.wandb.enabled, config.wandb.group, config.wandb.tags = True, "some group", ["a tag"]
    monkeypatch.setattr(config.methods["moma_beta1"], "noise", 0.8)  # since the scoring, which the run tells of
    log_evaluation(config, sorted((Path(config.run) / "figures").iterdir()))
    wandb.teardown()  # its service writes the file behind our back; this waits for it
    (path,) = config.eval_folder.rglob("run-*.wandb")
    run = offline_run(path)
    assert (run["project"], run["group"], run["tags"]) == ("mine", "some group", ["a tag"])
    assert run["config"]["protocol"]["name"] == config.resolved_protocol().name
    assert run["config"]["methods"]["moma_beta1"]["noise"] == 0.9
    assert run["config"]["warnings"][-1] == "The scores were made with another moma_beta1 than there is now: score again"
    summary = json.loads((config.eval_folder / "summary.json").read_text())
    assert run["metrics"]["eval/moma_beta1/dino"] == pytest.approx(summary["moma_beta1"]["dino"]["mean"])
    logged = {key.removesuffix("/_type"): value for key, value in run["metrics"].items() if key.endswith("/_type")}
    pictures = {key for key, kind in logged.items() if kind == "image-file"}
    assert pictures >= {"figures/grid", "figures/figure4", "figures/figure7_clip_t_context", "figures/sweep_beta", "figures/scores"}
    for key in pictures:
        assert stored(run, path, key).stat().st_size == run["metrics"][f"{key}/size"]
    table = json.loads(stored(run, path, "tables/ablation_beta").read_text())
    assert table["columns"] == ["Setting", "DINO", "DINO lo", "DINO hi"]
    assert table["data"] == [["beta 0", 0, 0.0, 1.0], ["beta 1", 1, 0.0, 1.0]]
    scores = json.loads(stored(run, path, "tables/scores").read_text())
    assert [row[0] for row in scores["data"]] == ["real", "MoMA, beta 1"]
    for by, methods in (("subject", ["real", "moma_beta1"]), ("prompt", ["moma_beta1", "moma_beta1_lo", "moma_beta1_hi"])):
        means = json.loads(stored(run, path, f"tables/per_{by}").read_text())
        assert means["columns"] == ["metric", by, *methods] and {row[0] for row in means["data"]} >= {"dino", "clip_i"}


def stored(run: dict, path: Path, key: str) -> Path:
    """The file of an offline run that a logged picture or table points to."""
    return path.parent / "files" / run["metrics"][f"{key}/path"]


def test_nothing_is_logged_when_it_is_off(config):
    config.wandb.enabled = False
    before = set(config.eval_folder.rglob("*"))
    log_evaluation(config, [])
    assert set(config.eval_folder.rglob("*")) == before


def test_missing_values_are_empty_cells():
    table = interval_table("Method", {"a": {"dino": {"mean": 1.0, "lo": 0.0, "hi": 2.0}}, "b": {}})
    assert table.data == [["a", 1.0, 0.0, 2.0], ["b", None, None, None]]
