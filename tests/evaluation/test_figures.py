import io
import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from evaluation.dreambooth import write_tables
from evaluation.figures import write_figures
from evaluation.figures.ablations import read_ablation, read_ablations, varying
from evaluation.figures.charts import interval_figure, subject_lines, sweep_figure
from evaluation.figures.grids import GAP, Cell, Grid, Row, draw_grid, from_json, head_of, spread, to_json
from evaluation.figures.scored import comparison, one_method, own_method, settings_of
from evaluation.figures.style import DPI, colors_of, encoded, svg_address
from evaluation.figures.tables import difference_rows
from evaluation.figures.write import charts, made_grids, read_grid, scored_grids
from evaluation.generation import generate
from evaluation.made_with import changed_since, known_identity, made_with, options_of
from evaluation.methods import Moma, RealImages
from evaluation.names import method_name, methods_of
from evaluation.plan import Evaluation
from evaluation.stamps import write_picture
from evaluation.statistics import by_subject, subject_means
from moma_lightning.digests import content_digest
from tests.evaluation.fakes import Painter, fake_config, fake_score, random_picture, write_data


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Scores of two painters, and two ablations: one of a number, one of kinds."""
    methods = {"real_images": RealImages(), "text_only": Painter(0.8), "moma_beta1": Painter(0.6)}
    config = fake_config(tmp_path_factory.mktemp("figures"), methods, adapter=None, decoder=None)
    generate(config)
    with pytest.warns(UserWarning, match="copying its input"):
        write_tables(Evaluation.open(config), fake_score(config))
    config.ablations_folder.mkdir()
    one = {"dino": {"mean": 0.2, "lo": 0.1, "hi": 0.3}}
    difference = {"a": "noise_0.5", "b": "noise_1", "metric": "dino", "mean": 0.0, "lo": -0.1, "hi": 0.1}
    own = {"made_with": made_with(config), "methods": {"noise_1": {"kind": "Painter"}}}
    noise = {"noise_1": one, "noise_0.5": one, "differences": [difference], "title": "More or less noise"} | own
    (config.ablations_folder / "noise.json").write_text(json.dumps(noise))
    (config.ablations_folder / "start.json").write_text(json.dumps({"moma_beta1": one, "from_scratch": one, "differences": []} | own))
    return config


@pytest.fixture(scope="module")
def scores(evaluated) -> pd.DataFrame:
    return pd.read_parquet(evaluated.eval_folder / "scores.parquet")


@pytest.mark.parametrize(
    ("key", "name"),
    [("moma_beta1", "MoMA, beta 1"), ("moma_beta0.5", "MoMA, beta 0.5"), ("moma_masking0", "MoMA, mask strength 0"), ("ip_adapter", "IP-Adapter"),
     ("real_images", "Real images"), ("text_only", "Text only"), ("moma", "MoMA"), ("dreambooth_lora", "DreamBooth LoRA"), ("steps_25", "steps 25"),
     ("my_own_thing", "my own thing")],
)
def test_methods_are_called_what_people_call_them(key, name):
    assert method_name(key) == name


def test_only_tables_of_intervals_are_methods():
    cell = {"mean": 1, "lo": 0, "hi": 2}
    assert list(methods_of({"a": {"dino": cell}, "differences": [], "title": "x", "values": {"a": 1.0}})) == ["a"]


def test_an_ablations_axis_is_the_one_number_in_which_its_pictures_differ():
    shared = {"kind": "Moma", "beta": 1.0}
    assert varying(["moma_beta1", "weak"], [shared | {"mask_strength": 1.0}, shared | {"mask_strength": 0.5}], "masking") == ("mask_strength", [1.0, 0.5])
    assert varying(["a", "b"], [{"adapter": "x"}, {"adapter": "y"}], "start") == ("start", None)
    assert varying(["a", "b"], [{"x": 1, "y": 1}, {"x": 2, "y": 2}], "start") == ("start", None)
    assert varying(["a", "b"], [{"guided": True}, {"guided": False}], "guided") == ("guided", None)
    assert varying(["moma_beta0", "beta_0.5"], [{}, {}], "beta") == ("beta", [0.0, 0.5])
    assert varying(["moma_beta0", "other"], [{}, {}], "beta") == ("beta", None)


def test_an_option_that_only_some_rows_have_is_a_difference_too():
    """One number on two base models is no axis: two rows would have the same value."""
    options = [{"beta": 1.0}, {"beta": 0.0, "base": "pastel"}, {"beta": 1.0, "base": "pastel"}]
    assert varying(["moma_beta1", "pastel_beta0", "pastel_beta1"], options, "community") == ("community", None)


def test_ablations_have_titles_labels_and_differences(evaluated):
    noise, start = read_ablations(evaluated)
    assert (noise.title, list(noise.rows), noise.values) == ("More or less noise", ["noise 1", "noise 0.5"], [1.0, 0.5])
    assert list(noise.differences) == ["noise 0.5 − noise 1"]  # noqa: RUF001
    assert (start.title, list(start.rows), start.values) == ("Start", ["MoMA, beta 1", "from scratch"], None)


def test_two_rows_at_one_number_are_called_by_their_names():
    """As a sweep over [null, 0.5, 1.0] leaves them, null being the protocol's 1."""
    rows = {name: {"dino": {"mean": 0.1, "lo": 0, "hi": 0.2}} for name in ("beta_null", "beta_0.5", "beta_1")}
    options = {"beta_null": {"beta": None}, "beta_0.5": {"beta": 0.5}, "beta_1": {"beta": 1.0}}
    found = read_ablation("beta", rows | {"methods": options, "sampler": {"beta": 1.0, "seed": 0}})
    assert len(found.rows) == 3 and found.values is None


def test_figures_without_moma_among_the_methods_draw_no_moma(evaluated):
    without = replace(evaluated, adapter="runs/mini/stage2/adapter", decoder="runs/mini/stage1/image_feature_decoder", methods={"real_images": RealImages()})
    assert list(made_grids(without)) == []


def test_hidden_files_beside_the_data_do_not_count(tmp_path):
    data = write_data(tmp_path / "data")
    before = content_digest(data)
    (data / ".git").mkdir()
    (data / ".git" / "index").write_text("a fetch changes it")
    (data / "dataset" / ".DS_Store").write_text("a look changes it")
    assert content_digest(data) == before
    (data / "dataset" / "red_mug" / "09.png").write_bytes((data / "dataset" / "red_mug" / "00.png").read_bytes())
    assert content_digest(data) != before


def test_what_is_no_table_beside_the_ablations_is_passed_over(evaluated):
    """As `masks` leaves it there: intervals and differences that are of no metric."""
    interval = {"mean": 0.8, "lo": 0.7, "hi": 0.9}
    told = {"mask 1": interval | {"without_subject": 0}, "differences": [{"a": "mask 1", "b": "mask 0", **interval}]}
    (evaluated.ablations_folder / "mask_iou.json").write_text(json.dumps(told))
    try:
        assert [ablation.key for ablation in read_ablations(evaluated)] == ["noise", "start"]
    finally:
        (evaluated.ablations_folder / "mask_iou.json").unlink()


@pytest.mark.parametrize("change", [{"overrides": {"seed": 1}}, {"adapter": "other"}])
def test_ablations_of_another_protocol_or_other_weights_are_left_out(evaluated, change, tmp_path, caplog):
    (tmp_path / "other").mkdir()
    changed = {key: str(tmp_path / value) if value == "other" else evaluated.overrides | value for key, value in change.items()}
    if "overrides" in changed:
        changed["overrides"]["sampler"] = changed["overrides"].get("sampler", {}) | {"seed": changed["overrides"].pop("seed")}
    assert read_ablations(replace(evaluated, **changed)) == []
    assert "noise is left out: it was made under another protocol or with other weights" in caplog.text


def test_an_ablation_whose_own_weights_have_changed_is_left_out(evaluated, tmp_path):
    (tmp_path / "lora").write_text("one")
    path, one = evaluated.ablations_folder / "community.json", {"dino": {"mean": 0.2, "lo": 0.1, "hi": 0.3}}
    own = {"methods": {"a": {"kind": "Moma"}}, "made_with": made_with(evaluated, [Moma(base=str(tmp_path / "lora"))])}
    path.write_text(json.dumps({"a": one, "b": one} | own))
    try:
        assert "community" in [ablation.key for ablation in read_ablations(evaluated)]
        (tmp_path / "lora").write_text("another")
        known_identity.cache_clear()  # of this process: a command looks once
        assert "community" not in [ablation.key for ablation in read_ablations(evaluated)]
    finally:
        path.unlink()


@pytest.mark.parametrize("change", ["base_config", "sam", "mllm_dtype", "data"])
def test_whatever_draws_or_is_judged_counts(evaluated, change, tmp_path):
    (tmp_path / "other").mkdir()
    before = made_with(evaluated)
    value = "bfloat16" if change == "mllm_dtype" else str(tmp_path / "other")
    changed = {"data": value} if change == "data" else {"foundation": replace(evaluated.foundation, **{change: value})}
    assert changed_since(before, replace(evaluated, **changed)) == [change] and changed_since(before, evaluated) == []


def test_a_branch_that_has_moved_on_is_other_weights(evaluated, monkeypatch):
    config = replace(evaluated, adapter="o/adapter@main")

    def at(commit):
        monkeypatch.setattr("moma_lightning.digests.loaded_commit", lambda name: commit)
        known_identity.cache_clear()

    at("abc")
    before = made_with(config)
    assert before["adapter"] == "o/adapter@main (abc)" and changed_since(before, config) == []
    at("def")
    assert changed_since(before, config) == ["adapter"]
    at(None)  # on a machine without the weights
    assert changed_since(before, config) == []
    known_identity.cache_clear()


def test_a_judge_that_is_gone_makes_scores_stale_and_is_no_error(evaluated, tmp_path):
    gone = replace(evaluated, overrides=evaluated.overrides | {"dino": {"model": str(tmp_path / "no/such/dino")}, "segmenter": str(tmp_path / "no/such/sam")})
    assert changed_since(made_with(evaluated), gone) == ["protocol", "judges"]


def test_labels_are_what_the_table_was_made_with_and_other_options_than_the_main_evaluations_leave_it_out(evaluated, caplog):
    """The fake painters differ in `noise` alone, and their names do not tell it."""
    rows = {name: {"dino": {"mean": 0, "lo": 0, "hi": 0}} for name in ("text_only", "moma_beta1")}
    rows |= {"made_with": made_with(evaluated), "methods": options_of({name: evaluated.methods[name] for name in rows})}
    (evaluated.ablations_folder / "painters.json").write_text(json.dumps(rows))
    try:
        found = next(ablation for ablation in read_ablations(evaluated) if ablation.key == "painters")
        changed = replace(evaluated, methods=evaluated.methods | {"moma_beta1": Painter(0.5)})
        assert "painters" not in [ablation.key for ablation in read_ablations(changed)]
    finally:
        (evaluated.ablations_folder / "painters.json").unlink()
    assert (found.axis, found.values, list(found.rows)) == ("noise", [0.8, 0.6], ["noise 0.8", "noise 0.6"])
    assert "painters is left out" in caplog.text


def test_means_by_subject_are_the_statistics_own(scores):
    frame = subject_means(scores, "dino")
    for method in ("real_images", "text_only", "moma_beta1"):
        table = by_subject(scores, method, "dino")
        assert np.allclose(frame[method].sort_index(), (table["sum"] / table["count"]).sort_index())
    assert list(frame.index) == list(dict.fromkeys(scores["subject"]))
    assert subject_means(scores.drop(columns="dino"), "dino").empty


def test_intervals_are_drawn_where_they_are():
    rows = {"a": {"dino": {"mean": 0.5, "lo": 0.4, "hi": 0.7}}, "b": {}, "c": {"dino": {"mean": 0.1, "lo": 0.0, "hi": 0.2}}}
    axes = interval_figure(rows, {"a": "#ff0000"}, ["dino"]).axes[0]
    bar, dot, third, _ = axes.lines
    assert (list(bar.get_xdata()), list(bar.get_ydata()), bar.get_color()) == ([0.4, 0.7], [0, 0], "#ff0000")
    assert list(dot.get_xdata()) == [0.5]
    assert list(third.get_ydata()) == [2, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_a_sweep_is_drawn_in_the_order_of_its_axis():
    rows = [{"dino": {"mean": m, "lo": m - 0.1, "hi": m + 0.2}} for m in (0.9, 0.5, 0.1)]
    axes = sweep_figure([1.0, 0.5, 0.0], rows, "beta", ["dino"]).axes[0]
    assert list(axes.lines[0].get_xdata()) == [0.0, 0.5, 1.0]
    assert list(axes.lines[0].get_ydata()) == [0.1, 0.5, 0.9]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(heights.min(), 0.0) and np.isclose(heights.max(), 1.1)


def test_figure_7_is_the_mean_clip_t_of_each_subject(scores):
    colors = colors_of(scores)
    axes = subject_lines(scores, "clip_t_texture", colors).axes[0]
    assert [line.get_label() for line in axes.lines] == ["Text only", "MoMA, beta 1"]
    own = scores[(scores["method"] == "moma_beta1") & (scores["prompt_kind"] == "texture")].groupby("subject", sort=False)["clip_t"].mean()
    assert np.allclose(axes.lines[1].get_ydata(), own)
    assert subject_lines(scores[scores["prompt_kind"] == "real"], "clip_t_texture", colors) is None
    many = pd.concat([scores[scores["method"] == "moma_beta1"].assign(method=f"m{i}") for i in range(9)])
    lines = subject_lines(many, "clip_t_texture", colors_of(many)).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9


def test_the_papers_own_method_is_the_nearest_to_the_protocols_strength(evaluated, scores):
    config = fake_config(evaluated.eval_folder.parents[1], {"text_only": Moma(beta=0.2), "moma_beta1": Moma(beta=0.0)})
    assert own_method(config, scores) == "text_only"
    assert own_method(evaluated, scores) == "moma_beta1"
    tie = replace(config, methods={"text_only": Moma(), "moma_beta1": Moma(context="image")})
    assert own_method(tie, scores) == "text_only", "the first of them"
    assert scored_grids(evaluated, scores[scores["prompt_kind"] == "real"]) == [], "nothing was generated"


def test_figures_4_and_6(scores):
    grid = one_method(scores, "moma_beta1", "context", "figure4", "New contexts", "", subjects=2, prompts=2)
    assert [len(row.cells) for row in grid.rows] == [3, 3]
    assert grid.rows[0].cells[0].title == "Reference"
    assert all("/moma_beta1/" in cell.path and cell.caption == cell.prompt for row in grid.rows for cell in row.cells[1:])
    compared = comparison(scores, subjects=3, prompts=2)
    assert compared.columns == ["Reference", "Text only", "MoMA, beta 1"]
    kinds = ["texture" in row.cells[1].path for row in compared.rows]
    assert kinds == [False] * 3 + [True] * 3
    assert all(len({cell.prompt for cell in row.cells[1:]}) == 1 for row in compared.rows)
    assert one_method(scores, "moma_beta1", "camera", "figure4", "", "") is None


def test_the_first_reference_is_the_one_the_protocol_names_first(scores):
    other = scores.assign(reference_index=scores["reference_index"].where(scores["prompt_kind"] == "real", 2))
    assert comparison(other, subjects=3, prompts=2) == comparison(scores, subjects=3, prompts=2) is not None


def test_a_drawn_grid_shows_each_picture_in_its_place(tmp_path):
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    for name, color in colors.items():
        Image.new("RGB", (10, 10), color).save(tmp_path / f"{name}.png")
    grid = Grid("figure4", "", "", [Row([Cell("", str(tmp_path / "red.png")), Cell("", str(tmp_path / "blue.png"))])])
    drawn = Image.open(io.BytesIO(encoded(draw_grid(grid, inches=1.0), "png")))
    assert drawn.size == (int((2 + 3 * GAP) * DPI), int((1 + 2 * GAP) * DPI))
    middle = drawn.height // 2
    assert drawn.getpixel((round((GAP + 0.5) * DPI), middle)) == colors["red"]
    assert drawn.getpixel((round((2 * GAP + 1.5) * DPI), middle)) == colors["blue"]
    assert drawn.getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize(("name", "head"), [("Reference", "Reference"), ("MoMA, beta 1", "MoMA,\nbeta 1"), ("DreamBooth LoRA", "DreamBooth\nLoRA")])
def test_heads_are_broken_where_they_would_touch(name, head):
    assert head_of(name, 11) == head and head_of(name, 20) == name


def test_grids_survive_json():
    grid = Grid("figure8", "t", "a", [Row([Cell("x", "y", "z", "p", "f")], "r"), Row([])], ["c"], 4)
    assert from_json(to_json(grid).decode()) == grid
    assert (grid.number, grid.width) == (8, 1)


def test_every_figure_is_written_as_png_and_svg(evaluated):
    paths = write_figures(evaluated)
    names = {path.stem for path in paths}
    assert {"figure4", "figure5", "figure6", "figure7_clip_t_context", "figure7_clip_t_texture", "scores", "differences", "ablation_noise",
            "ablation_start", "sweep_noise"} == names
    assert len(paths) == 2 * len(names)
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert min(Image.open(path).size) > 100
    assert read_grid(evaluated, "figure4").name == "figure4"
    assert read_grid(evaluated, "figure8") is None


def test_figures_are_the_same_bytes_each_time(evaluated, scores):
    first, second = (dict(charts(evaluated, scores)) for _ in range(2))
    for name in ("scores", "sweep_noise"):
        assert svg_address(first[name]) == svg_address(second[name])
        assert encoded(first[name], "png") == encoded(second[name], "png")


def test_figures_before_scores_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="evaluation dreambooth"):
        write_figures(fake_config(tmp_path, {"a": Painter()}))


def test_differences_are_named_by_both_methods():
    row = {"a": "moma_beta1", "b": "ip_adapter", "metric": "dino", "mean": 1.0, "lo": 0.0, "hi": 2.0}
    assert difference_rows({"differences": [row]}) == {"MoMA, beta 1 − IP-Adapter": {"dino": {"mean": 1.0, "lo": 0.0, "hi": 2.0}}}  # noqa: RUF001


def test_spread():
    assert spread(list(range(10)), 3) == [0, 4, 9]
    assert spread([1, 2], 5) == [1, 2]


def test_a_picture_under_no_scheduler_tells_of_its_own(tmp_path):
    settings = {"method": {"kind": "TextOnly"}, "task": {"seed": 7}, "sampler": {"scheduler": None, "num_inference_steps": 8, "guidance_scale": 3.0}}
    write_picture(tmp_path / "0.png", random_picture(1), settings, {})
    assert settings_of(tmp_path / "0.png") == ["TextOnly", "own scheduler, 8 steps, guidance 3.0, seed 7"]
