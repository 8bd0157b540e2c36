import json

import pytest

from evaluation import ablations
from evaluation.ablations import grid, run_ablations
from evaluation.methods import Moma
from tests.evaluation.fakes import Painter, fake_config, fake_encoders


def test_grids_are_the_papers_settings(tmp_path):
    config = fake_config(tmp_path, {})
    assert grid(config, "beta") == {
        "moma_beta1": Moma(1.0, 1.0),
        "moma_beta0.5": Moma(0.5, 1.0),
        "moma_beta0": Moma(0.0, 1.0),
    }
    assert [m.mask_strength for m in grid(config, "masking").values()] == [1.0, 0.5, 0.0]


def test_settings_of_the_main_evaluation_share_its_pictures(tmp_path):
    config = fake_config(tmp_path, {"ours": Moma(), "off": Moma(beta=0.0)})
    assert list(grid(config, "beta")) == ["ours", "moma_beta0.5", "off"]
    assert list(grid(config, "masking")) == ["ours", "moma_masking0.5", "moma_masking0"]


def test_tables_are_written_beside_the_papers(tmp_path, monkeypatch):
    config = fake_config(tmp_path, {})
    painters = {"masking": {"full": Painter(0.2), "none": Painter(0.7)}, "beta": {"full": Painter(0.2), "off": Painter(0.9)}}
    monkeypatch.setattr(ablations, "grid", lambda config, name: painters[name])
    plain = ablations.score
    monkeypatch.setattr(ablations, "score", lambda evaluation, methods: plain(evaluation, methods, fake_encoders()))
    run_ablations(config)
    for name, methods in painters.items():
        summary = json.loads((config.ablations_folder / f"{name}.json").read_text())
        assert list(summary) == [*methods, "differences"]
        assert summary["full"]["dino"]["mean"] == pytest.approx(json.loads((config.ablations_folder / "beta.json").read_text())["full"]["dino"]["mean"])
        page = (config.ablations_folder / f"{name}.md").read_text()
        assert "| full |" in page
        assert "not comparable with mini" in page
    assert "| 0.5 | 0.603 | 0.322 | 0.797 | 0.231 |" in (config.ablations_folder / "masking.md").read_text()
    assert "| 0.0 | 0.583 | 0.349 | 0.782 | 0.319 |" in (config.ablations_folder / "beta.md").read_text()


def test_a_grid_without_values_is_passed_over(tmp_path, monkeypatch):
    config = fake_config(tmp_path, {})
    config.ablations.masking = ()
    monkeypatch.setattr(ablations, "grid", lambda config, name: {"full": Painter(0.2), "off": Painter(0.9)})
    plain = ablations.score
    monkeypatch.setattr(ablations, "score", lambda evaluation, methods: plain(evaluation, methods, fake_encoders()))
    run_ablations(config)
    assert sorted(path.name for path in config.ablations_folder.iterdir()) == ["beta.json", "beta.md"]
