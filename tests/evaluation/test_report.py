import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser

import pandas as pd
import pytest
from PIL import Image

from evaluation.dreambooth import write_tables
from evaluation.generation import generate
from evaluation.methods import RealImages
from evaluation.plan import Evaluation
from evaluation.report import write_report
from evaluation.report.pictures import spread
from evaluation.report.svg import interval_chart, line_chart, ticks
from evaluation.scoring import score
from tests.evaluation.fakes import Painter, fake_config, fake_encoders


class Page(HTMLParser):
    """Tags with their attributes, and unbalanced ones."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert (opened := self.open.pop()) == tag, (opened, tag, self.getpos())

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    config = fake_config(tmp_path_factory.mktemp("report"), {"real": RealImages(), "weak": Painter(0.8), "strong": Painter(0.4)})
    generate(config)
    with pytest.warns(UserWarning, match="copying its input"):
        write_tables(Evaluation.open(config), score(Evaluation.open(config), config.methods, fake_encoders()))
    stage = config.eval_folder.parent / "stage1" / "version_0"
    stage.mkdir(parents=True)
    pd.DataFrame({"step": [1, 2, 3], "train/loss": [3.0, float("nan"), 1.0], "lr": [1, 1, 1]}).to_csv(stage / "metrics.csv", index=False)
    config.ablations_folder.mkdir()
    values = {"mean": 0.123, "lo": 0.1, "hi": 0.2}
    (config.ablations_folder / "beta.json").write_text(json.dumps({"moma_beta0.5": {"dino": values}, "differences": []}))
    write_report(config)
    return config


@pytest.fixture(scope="module")
def text(evaluated) -> str:
    return (evaluated.report_folder / "index.html").read_text()


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_page_is_well_formed_and_self_contained(text, page):
    assert page.open == []
    assert page.all("link") == []
    assert all(image.get("src", "data:image/png;base64,").startswith("data:image/png;base64,") for image in page.all("img"))
    assert all("src" not in script for script in page.all("script"))
    assert not re.search(r"https?://|url\(|@import", text)


def test_embedded_pictures_are_pngs(page):
    sources = [image["src"] for image in page.all("img") if "src" in image]
    assert len(sources) == 3 * 3 * 3  # subjects x (2 context + 1 texture) x (reference + 2 methods)
    for source in sources:
        assert Image.open(io.BytesIO(b64decode(source.split(",")[1]))).size == (24, 24)


def test_each_picture_tells_how_it_was_made(page):
    told = [button for button in page.all("button") if "data-facts" in button]
    strong = [button for button in told if button["data-title"] == "strong"]
    assert len(strong) == 9
    assert all(re.search(r"CLIP-T -?\d\.\d{3}\nPainter \(noise 0.4\)\nDDIMScheduler, 12 steps, guidance 3, seed \d+", b["data-facts"]) for b in strong)


def test_page_shows_scores_protocol_curves_ablations_and_the_paper(evaluated, text):
    summary = json.loads((evaluated.eval_folder / "summary.json").read_text())
    value = summary["strong"]["dino"]
    assert f"{value['mean']:.3f}</b> <small>[{value['lo']:.3f}, {value['hi']:.3f}]" in text
    assert evaluated.resolved_protocol().digest in text
    assert "<h3>stage1</h3>" in text
    assert 'aria-label="train/loss"' in text
    assert "0.123" in text
    assert "Published, real DreamBooth, not comparable with mini" in text
    assert 'name="viewport"' in text


def test_per_subject_values_are_means_over_its_pictures(evaluated, page):
    scores = pd.read_parquet(evaluated.eval_folder / "scores.parquet")
    expected = scores[(scores.method == "strong") & (scores.subject == "tabby")].dino.mean()
    assert any(abs(float(cell["data-v"]) - expected) < 1e-9 for cell in page.all("td") if cell.get("data-v"))


def test_grid_picture(evaluated):
    grid = Image.open(evaluated.report_folder / "grid.png")
    assert grid.width == 3 * (128 + 6) + 6
    assert len(grid.getcolors(maxcolors=1 << 20)) > 50


def test_report_before_scores_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="evaluation dreambooth"):
        write_report(fake_config(tmp_path, {"a": Painter()}))


def test_words_of_the_data_cannot_break_the_page():
    chart = line_chart("<script>", [0, 1], [0.0, 1.0])
    assert "<script>" not in chart
    assert "&lt;script&gt;" in chart


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.31, 0.36) == [0.31, 0.32, 0.33, 0.34, 0.35, 0.36]
    assert ticks(5, 5) == [5]


def test_charts_survive_flat_and_infinite_values():
    assert "nan" not in line_chart("flat", [1, 2, 3], [0.0, 0.0, float("inf")])
    assert "nan" not in interval_chart("one", [("a", {"mean": 0.0, "lo": 0.0, "hi": 0.0}, "#000")])


def test_spread():
    assert spread(list(range(10)), 3) == [0, 4, 9]
    assert spread([1, 2], 5) == [1, 2]
