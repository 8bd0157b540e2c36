import html
import io
import json
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from evaluation.dreambooth import write_tables
from evaluation.figures import write_figures
from evaluation.figures.ablations import read_ablation
from evaluation.figures.grids import GAP, Cell, Grid, Row, to_json
from evaluation.figures.style import DPI
from evaluation.figures.tables import difference_rows, read_scores
from evaluation.figures.write import figures_folder, read_grid
from evaluation.generation import generate
from evaluation.made_with import made_with
from evaluation.methods import Moma, RealImages
from evaluation.plan import Evaluation
from evaluation.report import write_report
from evaluation.report.page import ablation_section, grids, stage_charts, stale
from evaluation.report.pictures import as_data, narrow
from evaluation.report.tables import difference_tables, published_table, score_tables, short, value_of
from evaluation.stamps import stamp_path
from evaluation.statistics import METRICS, by_chance
from tests.evaluation.fakes import Painter, fake_config, fake_score, random_picture


class Page(HTMLParser):
    """Tags with their attributes, and unbalanced ones."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert (opened := self.open.pop()) == tag, (opened, tag, self.getpos())

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    methods = {"real_images": RealImages(), "text_only": Painter(0.8), "moma_beta1": Painter(0.4)}
    config = fake_config(tmp_path_factory.mktemp("report"), methods, adapter=None, decoder=None)
    generate(config)
    with pytest.warns(UserWarning, match="copying its input"):
        write_tables(Evaluation.open(config), fake_score(config))
    stage = config.eval_folder.parent / "stage1" / "version_0"
    stage.mkdir(parents=True)
    logged = {"step": [1, 2, 3], "train/loss": [3.0, float("nan"), 1.0], "train/data_wait": [0.2, 0.1, 0.1], "lr": [1, 1, 1]}
    pd.DataFrame(logged).to_csv(stage / "metrics.csv", index=False)
    config.ablations_folder.mkdir()
    for name, values in (("beta", (0.5, 1.0)), ("steps", (6, 12))):
        rows = {f"{name}_{value:g}": {"dino": {"mean": value / 7, "lo": 0.1, "hi": 0.2}} for value in values}
        about = {"title": f"About {name}", "differences": [], "made_with": made_with(config), "methods": {key: {"kind": "Painter"} for key in rows}}
        (config.ablations_folder / f"{name}.json").write_text(json.dumps(rows | about))
    write_figures(config)
    write_report(config)
    return config


@pytest.fixture(scope="module")
def text(evaluated) -> str:
    return (evaluated.report_folder / "index.html").read_text()


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_the_page_says_how_many_differences_would_stand_out_by_chance(evaluated, text):
    differences = json.loads((evaluated.eval_folder / "summary.json").read_text())["differences"]
    assert differences and f"Blue: {by_chance(differences)}" in text


def test_page_is_well_formed_and_self_contained(text, page):
    assert page.open == []
    assert page.all("link") == []
    assert all(image.get("src", "data:").startswith("data:") for image in page.all("img"))
    assert all("src" not in script for script in page.all("script"))
    assert not re.search(r"https?://|url\(|@import", text)


def test_a_page_whose_scores_are_older_than_its_weights_says_so(evaluated, text, tmp_path):
    assert "The scores were made with another" not in text and "those that were scored" not in text
    (tmp_path / "adapter").mkdir()
    about, scores = json.loads((evaluated.eval_folder / "protocol.json").read_text()), read_scores(evaluated)
    other = replace(evaluated, adapter=str(tmp_path / "adapter"))
    assert stale(other, about, scores) == ["The scores were made with another adapter than there is now: score again"]
    assert stale(evaluated, about | {"made_with": about["made_with"] | {"judges": {}}}, scores) == [
        "The scores were made with another judges than there is now: score again"]
    methods = evaluated.methods | {"moma_beta1": Painter(0.1)}
    assert stale(replace(evaluated, methods=methods), about, scores) == ["The scores were made with another moma_beta1 than there is now: score again"]
    for unsaid in (({}, scores), (about, scores.drop(columns="picture_sha256"))):
        assert stale(evaluated, *unsaid) == ["The scores do not say what they were made with: score again"]


def test_a_page_that_shows_other_pictures_than_were_scored_says_so(evaluated):
    """As where another command has drawn a method's pictures anew, with another sampler."""
    about, scores = json.loads((evaluated.eval_folder / "protocol.json").read_text()), read_scores(evaluated)
    path = stamp_path(Path(scores[scores["method"] == "moma_beta1"]["path"].iloc[0]))
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"sha256": "another"}))
    try:
        assert stale(evaluated, about, scores) == ["1 of the 18 pictures that figures choose from are not those that were scored: score again"]
    finally:
        path.write_text(before)


def with_moma(config):
    """A config that Figures 8 to 10 are drawn by."""
    return replace(config, adapter="a", decoder="d", methods=config.methods | {"moma": Moma()})


def test_grids_that_the_config_no_longer_draws_are_not_shown(evaluated):
    folder, cell = figures_folder(evaluated), Cell("a", str(next(evaluated.pictures.rglob("*.png"))))
    (folder / "figure8.json").write_bytes(to_json(Grid("figure8", "Strengths", "", [Row([cell])])))
    try:
        names = [{grid.name for grid in grids(config, read_scores(evaluated), None)} for config in (with_moma(evaluated), evaluated)]
        assert names[0] - names[1] == {"figure8"}
    finally:
        (folder / "figure8.json").unlink()


def test_a_resumed_trainings_curve_has_each_step_once():
    resumed = pd.DataFrame({"step": [10, 20, 30, 20, 30, 40], "train/loss": [1.0, 9.0, 9.0, 2.0, 3.0, 4.0]})
    assert stage_charts(resumed) == stage_charts(pd.DataFrame({"step": [10, 20, 30, 40], "train/loss": [1.0, 2.0, 3.0, 4.0]}))


def test_embedded_pictures_are_whole(page):
    sources = [image["src"] for image in page.all("img") if image.get("src", "").startswith("data:image/webp")]
    # Figures 4 and 5: subjects x (reference + 2 context, reference + 1 texture); 6: subjects x 3 prompts x (reference + 2 methods)
    assert len(sources) == 3 * 3 + 3 * 2 + 3 * 3 * 3
    for source in sources:
        assert Image.open(io.BytesIO(b64decode(source.split(",")[1]))).size == (24, 24)


def test_small_pictures_are_exact_and_large_ones_shrunk(tmp_path):
    picture = random_picture(3, (40, 40))
    picture.save(tmp_path / "small.png")
    shown = Image.open(io.BytesIO(b64decode(as_data(str(tmp_path / "small.png"), 256).split(",")[1])))
    assert shown.convert("RGB").tobytes() == picture.tobytes()
    random_picture(3, (600, 300)).save(tmp_path / "large.png")
    assert Image.open(io.BytesIO(b64decode(as_data(str(tmp_path / "large.png"), 256).split(",")[1]))).size == (256, 128)


def test_each_picture_tells_how_it_was_made(page):
    told = [button for button in page.all("button") if "data-facts" in button]
    own = [button for button in told if button["data-title"] == "MoMA, beta 1"]
    assert len(own) == 6 + 3 + 9
    facts = re.compile(r"CLIP-T -?\d\.\d{3}.*\nPainter \(noise 0.4\)\nUniPCMultistepScheduler, 8 steps, guidance 3.0, seed \d+")
    assert all(facts.search(button["data-facts"]) for button in own)


def test_page_shows_scores_protocol_curves_and_the_paper(evaluated, text, page):
    summary = json.loads((evaluated.eval_folder / "summary.json").read_text())
    value = summary["moma_beta1"]["dino"]
    assert f"{value['mean']:.3f}</b> <small" in text
    assert f"<span>[{value['lo']:.3f}, {value['hi']:.3f}]" in text
    assert evaluated.resolved_protocol().digest in text
    assert "<h3>Stage 1</h3>" in text
    assert {"train/loss", "train/data_wait"} < {image.get("alt") for image in page.all("img")}
    assert "Published, real DreamBooth, not comparable with mini" in text
    assert 'name="viewport"' in text


def test_names_are_what_people_say(text):
    words = re.sub(r"<(script|style|pre).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL)
    assert "MoMA, beta 1" in words and "Real images" in words
    assert not re.search(r"moma_beta|text_only|real_images|clip_[ti]", words)
    assert "MoMA, beta 1 passes Real images in CLIP-I" in words


def test_every_ablation_has_its_table_and_only_the_papers_have_its_rows(text):
    beta, steps = text.index("<h3>About beta</h3>"), text.index("<h3>About steps</h3>")
    assert beta < steps
    assert "<td>beta 0.5</td>" in text[beta:steps] and "0.071" in text[beta:steps]
    assert "<td>steps 12</td>" in text[steps:] and "1.714" in text[steps:]
    assert "The paper's numbers" in text[beta:steps]
    assert "The paper's numbers" not in text[steps:]
    assert 'alt="DINO over steps"' in text[steps:]


#: Presses what a reader presses, and leaves what it sees then as JSON.
PRESSES = """
const found = {}, column = (table, i) => [...table.tBodies[0].rows].map(row => row.cells[i].dataset.v);
const table = document.querySelector("table"), head = table.querySelectorAll("th button")[1];
found.orders = [1, 2].map(() => { head.click(); return column(table, 1); });
const picture = document.querySelector('.pictures button[data-facts*="seed"]'), dialog = document.querySelector("dialog");
picture.click();
found.picture = { open: dialog.open, told: dialog.querySelector("p").textContent };
found.is_its_own = dialog.querySelector("img").src === picture.querySelector("img").src;
dialog.click();
found.closed = !dialog.open;
const tabs = document.querySelectorAll(".panels [data-tab]");
tabs[1].click();
const panels = tabs[1].closest(".panels").querySelectorAll("[data-panel]");
found.panels = [...panels].filter(panel => !panel.hidden).map(panel => panel.dataset.panel);
found.tab = tabs[1].dataset.tab;
found.wider_than_the_page = document.documentElement.scrollWidth > window.innerWidth;
const left = document.createElement("pre");
left.id = "found";
left.textContent = JSON.stringify(found);
document.body.append(left);
"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [500, 1400])  # headless Chromium draws no narrower than 500
def test_a_browser_sorts_shows_pictures_and_turns_panels(text, tmp_path, width):
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{{{PRESSES}}}</script></body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(html.unescape(done.stdout.rpartition('<pre id="found">')[2].partition("</pre>")[0]))
    down, up = ([float(value) for value in order if value] for order in found["orders"])
    assert down == sorted(down, reverse=True) and up == sorted(up) and len(set(down)) > 1
    assert found["picture"]["open"] and found["is_its_own"] and found["closed"]
    assert all(word in found["picture"]["told"] for word in ("seed", "DINO"))
    assert found["panels"] == [found["tab"]] and not found["wider_than_the_page"]


def test_every_head_of_every_table_is_a_button_that_a_key_can_press(text):
    heads = re.findall(r"<th\b[^>]*>(.*?)</th>", text)
    assert len(heads) > 40
    assert all(re.fullmatch(r'<button type="button">.+</button>', head) for head in heads)


def test_no_table_of_intervals_is_wider_than_four_numbers():
    rows = {"a": {metric: {"mean": 0.5, "lo": 0.4, "hi": 0.6} for metric in METRICS}}
    found = score_tables("Method", rows, list(METRICS))
    assert all(len(table.titles) <= 4 for table in found)
    assert [title for table in found for title in table.titles] == [metric.title for metric in METRICS.values()]
    assert found[0].titles == ["DINO", "CLIP-T(c)", "CLIP-I", "CLIP-T(t)"]
    assert all(len(table.titles) <= 4 for table in difference_tables(rows, list(METRICS)))


def test_the_best_contender_stands_out():
    rows = {name: {"dino": {"mean": mean, "lo": 0.0, "hi": 1.0}} for name, mean in (("Real images", 0.9), ("a", 0.2), ("b", 0.4))}
    table = score_tables("Method", rows, ["dino"], ["a", "b"])[0]
    assert [(name, values[0].stands_out) for name, values in table.rows] == [("Real images", False), ("a", False), ("b", True)]


def test_nothing_is_best_at_copying():
    rows = {name: {"copy_paste": {"mean": mean, "lo": 0.0, "hi": 1.0}} for name, mean in (("a", 0.2), ("b", 0.4))}
    assert not any(values[0].stands_out for _, values in score_tables("Method", rows, ["copy_paste"])[0].rows)


def test_differences_stand_out_where_zero_is_left_out():
    cells = [(-0.2, -0.1), (-0.1, 0.1), (0.1, 0.2)]
    rows = {str(i): {"dino": {"mean": 0.0, "lo": lo, "hi": hi}} for i, (lo, hi) in enumerate(cells)}
    assert [values[0].stands_out for _, values in difference_tables(rows, ["dino"])[0].rows] == [True, False, True]


@pytest.mark.parametrize(("subjects", "stands_out"), [(3, False), (30, True)])
def test_differences_of_few_subjects_do_not_stand_out(subjects, stands_out):
    row = {"a": "x", "b": "y", "metric": "dino", "mean": 0.4, "lo": 0.3, "hi": 0.5, "subjects": subjects}
    ((_, (value,)),) = difference_tables(difference_rows({"differences": [row]}), ["dino"])[0].rows
    assert value.stands_out is stands_out


@pytest.mark.parametrize(("number", "text"), [(0.4912, ".491"), (-0.05, "\u2212.050"), (1.25, "1.250"), (0.9999, "1.000"), (10.0, "10.000")])
def test_short_numbers(number, text):
    assert short(number) == text


def test_signed_numbers_have_a_sign_on_both_ends():
    value = value_of({"mean": 0.1, "lo": -0.1, "hi": 0.3}, signed=True)
    assert (value.text, value.interval, value.short) == ("+0.100", "[\u22120.100, +0.300]", "\u2212.100 … +.300")


@pytest.mark.parametrize(("key", "said", "shown"), [
    ("moma-beta", {"published": "beta"}, True), ("beta", {"published": None}, False), ("beta", {}, True), ("steps", {}, False),
])
def test_an_ablation_stands_beside_the_papers_table_that_it_names(key, said, shown):
    """A sweep is not called as the table; files that do not say go by their name."""
    rows = {name: {"dino": {"mean": 0.5, "lo": 0.4, "hi": 0.6}} for name in ("moma_beta0", "moma_beta1")}
    assert (ablation_section(read_ablation(key, rows | said))["published"] is not None) == shown


def test_published_columns_are_those_of_the_papers_table_1():
    table = published_table("Method", {"a": (0.1, None, 0.3, None)})
    assert table.titles == ["DINO", "CLIP-T(c)", "CLIP-I", "CLIP-T(t)"]
    assert [[value and value.text for value in values] for _, values in table.rows] == [["0.100", None, "0.300", None]]


def test_breakdowns_are_means_over_pictures(evaluated, page):
    scores = pd.read_parquet(evaluated.eval_folder / "scores.parquet")
    own = scores[scores.method == "moma_beta1"]
    told = [float(cell["data-v"]) for cell in page.all("td") if cell.get("data-v")]
    by_subject = own[own.subject == "tabby"].dino.mean()
    prompts = own.assign(form=[prompt.replace(label, "…") for prompt, label in zip(own.prompt, own.label, strict=True)])
    by_prompt = prompts[prompts.prompt_kind == "texture"].groupby("form").clip_t.mean()
    for expected in (by_subject, *by_prompt):
        assert any(abs(value - expected) < 1e-9 for value in told)


def test_grids_of_the_figures_command_are_shown_and_their_words_cannot_break_the_page(evaluated):
    figures = Path(evaluated.run) / "figures"
    random_picture(1).save(figures / "one.png")
    grid = Grid("figure8", "Strength of <script>", "", [Row([Cell("MoMA", str(figures / "one.png"), "beta 0.2")])])
    (figures / "figure8.json").write_bytes(to_json(grid))
    written = write_report(with_moma(evaluated)).read_text()
    assert "<em>Figure 8</em>Strength of &lt;script&gt;" in written and "<figcaption>beta 0.2</figcaption>" in written
    assert written.count("<script>") == 1
    (figures / "one.png").unlink()
    assert read_grid(evaluated, "figure8") is None


def test_grid_picture(evaluated):
    grid = Image.open(evaluated.report_folder / "grid.png")
    assert grid.width == int((3 * (0.8 + GAP) + GAP) * DPI)
    assert len(grid.getcolors(maxcolors=1 << 20)) > 50


def test_wide_rows_wrap_on_a_phone():
    row = Row([Cell("", "")] * 8)
    assert narrow(Grid("figure4", "", "", [row])) == 4
    assert narrow(Grid("figure4", "", "", [row], wrap=3)) == 3
    assert narrow(Grid("figure4", "", "", [Row([Cell("", "")] * 5)])) == 5


def test_report_before_scores_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="evaluation dreambooth"):
        write_report(fake_config(tmp_path, {"a": Painter()}))
