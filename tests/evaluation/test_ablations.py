import json
from dataclasses import replace

import pytest

from evaluation import ablations, sweeps
from evaluation.ablations import run_ablation
from evaluation.config import AblationConfig
from evaluation.figures.ablations import read_ablations
from evaluation.made_with import made_with
from evaluation.methods import Moma
from evaluation.scoring import score
from evaluation.sweeps import point_name, run_point
from tests.evaluation.fakes import Painter, fake_config, fake_judges


@pytest.fixture(autouse=True)
def arithmetic_encoders(monkeypatch):
    for module in (ablations, sweeps):
        monkeypatch.setattr(module, "score", lambda evaluation, methods: score(evaluation, methods, fake_judges(evaluation)))


@pytest.mark.parametrize(("name", "row"), [("masking", "| 0.5 | 0.603 | 0.322 | 0.797 | 0.231 |"), ("beta", "| 0.0 | 0.583 | 0.349 | 0.782 | 0.319 |")])
def test_tables_are_written_beside_the_papers(tmp_path, name, row):
    config = fake_config(tmp_path, {})
    config.ablation = AblationConfig(name, "A title", {"full": Painter(0.2), "none": Painter(0.9)}, published=name)
    summary = run_ablation(config)
    written = json.loads((config.ablations_folder / f"{name}.json").read_text())
    assert written["methods"]["none"] == Painter(0.9).options() and written["sampler"]["num_inference_steps"] == 8
    told = {"title": "A title", "made_with": made_with(config), "published": name}
    assert {key: value for key, value in written.items() if key not in ("methods", "sampler")} == told | summary
    assert list(summary) == ["full", "none", "differences"] and summary["full"]["dino"]["mean"] > summary["none"]["dino"]["mean"]
    page = (config.ablations_folder / f"{name}.md").read_text()
    assert page.startswith("# A title") and "| full |" in page and row in page and "not comparable with mini" in page


def test_a_sweeps_point_says_what_it_was_made_by(tmp_path, monkeypatch):
    for name in ("weights", "setup", "generate"):
        monkeypatch.setattr(Moma, name, lambda self, *given, name=name: getattr(Painter(0.2), name)(*given))
    config = fake_config(tmp_path, {})
    config.moma = Moma(beta=0.5)
    summary = run_point(config)
    written = json.loads((config.sweeps_folder / "moma_beta0.5.json").read_text())
    assert written["methods"]["moma_beta0.5"]["beta"] == 0.5 and written["sampler"]["num_inference_steps"] == 8
    told = {"title": "moma_beta0.5", "made_with": made_with(config)}
    assert {key: value for key, value in written.items() if key not in ("methods", "sampler")} == told | summary


def test_the_report_calls_it_what_the_yaml_does(tmp_path):
    config = fake_config(tmp_path, {})
    config.ablation = AblationConfig("steps", "Denoising steps", {"few": Painter(0.2), "many": Painter(0.1)})
    run_ablation(config)
    (found,) = read_ablations(config)
    assert (found.key, found.title, len(found.rows)) == ("steps", "Denoising steps", 2)


def test_without_published_numbers_there_is_no_such_section(tmp_path):
    config = fake_config(tmp_path, {})
    config.ablation = AblationConfig("steps", methods={"few": Painter(0.2), "many": Painter(0.1)})
    run_ablation(config)
    assert "paper" not in (config.ablations_folder / "steps.md").read_text()


def test_one_row_has_no_differences_and_a_table_cut_short_is_named(tmp_path):
    config = fake_config(tmp_path, {})
    config.ablation = AblationConfig("steps", methods={"few": Painter(0.2)})
    run_ablation(config)
    assert "Difference" not in (config.ablations_folder / "steps.md").read_text()
    (config.ablations_folder / "steps.json").write_text('{"a":')
    with pytest.raises(ValueError, match="steps.json cannot be read"):
        read_ablations(config)


@pytest.mark.parametrize("name", ["../evil", "a/b", ".", ""])
def test_an_ablations_name_is_a_files(tmp_path, name):
    with pytest.raises(ValueError, match="an ablation cannot be called"):
        replace(fake_config(tmp_path, {}), ablation=AblationConfig(name, methods={"few": Painter(0.2)}))


def test_settings_of_the_main_evaluation_share_its_pictures_or_are_refused(tmp_path):
    log = str(tmp_path / "log")
    config = fake_config(tmp_path, {"ours": Painter(0.2, log)})
    config.ablation = AblationConfig("beta", methods={"ours": Painter(0.2, log)})
    run_ablation(config)
    config.ablation = AblationConfig("beta", methods={"ours": Painter(0.3, log)})
    with pytest.raises(ValueError, match="'ours' is set otherwise in the main evaluation"):
        run_ablation(config)


def test_a_sweeps_point_that_a_row_of_the_main_evaluation_is_called_as_is_refused(tmp_path):
    """As experiments/mini/seeds.yaml with a grid whose first value is the default."""
    config = fake_config(tmp_path, {"moma": Moma(texture_beta=0.4)})
    assert point_name(config.moma) == "moma"
    with pytest.raises(ValueError, match="'moma' is set otherwise in the main evaluation"):
        run_point(config)
    assert not config.pictures.exists()


def test_an_ablation_has_to_be_named(tmp_path):
    with pytest.raises(ValueError, match="no ablation is configured"):
        run_ablation(fake_config(tmp_path, {}))


def test_points_are_named_by_what_they_change():
    assert [point_name(m) for m in (Moma(), Moma(beta=0.5), Moma(beta=0.0, mask_strength=1.0))] == ["moma", "moma_beta0.5", "moma_beta0.0_mask_strength1.0"]
    words = [point_name(m) for m in (Moma(adapter="runs/a b"), Moma(adapter="runs-a-b"), Moma(adapter="x", base="y"), Moma(adapter="x_basey"))]
    assert words[0].startswith("moma_adapterruns-a-b-") and len(set(words)) == 4
