"""The tables that scores are written to."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from evaluation import published
from evaluation.dreambooth import write_tables
from evaluation.methods import RealImages
from evaluation.oracle import incomplete
from evaluation.plan import Evaluation
from evaluation.protocols import named
from evaluation.tables import protocol_line
from experiments.mini.models import PROTOCOL
from tests.evaluation.fakes import Painter, fake_config
from tests.evaluation.test_scoring import METHODS, scored, with_extras


def test_written_tables(tmp_path):
    config = fake_config(tmp_path, METHODS)
    evaluation = Evaluation.open(config)
    with pytest.warns(UserWarning, match="copy passes real_images in dino"):
        write_tables(evaluation, scored(config))
    folder, digest = config.eval_folder, config.resolved_protocol().digest
    table = pd.read_parquet(folder / "scores.parquet")
    assert set(table.protocol_digest) == {digest}
    assert {"method", "subject", "prompt", "prompt_kind", "dino", "clip_i", "clip_t", "path"} <= set(table)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["real_images", "copy", "blurred", "differences"]
    assert summary["copy"]["dino"]["mean"] == pytest.approx(table[table.method == "copy"].dino.mean())
    about = json.loads((folder / "protocol.json").read_text())
    assert about["digest"] == digest
    assert about["protocol"]["sampler"]["num_inference_steps"] == 8
    assert "copy passes" in about["warnings"][0]


def test_markdown_keeps_the_papers_rows_apart(tmp_path):
    config = fake_config(tmp_path, METHODS)
    with pytest.warns(UserWarning, match="copying its input"):
        write_tables(Evaluation.open(config), scored(config))
    page = (config.eval_folder / "table.md").read_text()
    ours, paper = page.split("## The paper's Table 1")
    assert "| Method | DINO | CLIP-T(c) | CLIP-I | CLIP-T(t) |" in ours
    assert config.resolved_protocol().digest in ours
    assert "; other than the preset's: `context_prompts: 2`, `texture_prompts: 1`, `extra_scores: []`. Brackets" in ours
    assert "**Warning:** copy passes real_images" in ours
    assert "MoMA | 0.618" not in ours
    assert published.NOTE in paper
    assert "| MoMA | 0.618 | 0.348 | 0.803 | 0.335 |" in paper
    assert "| Real images | 0.774 | - | 0.885 | - |" in paper
    row = next(line for line in ours.splitlines() if line.startswith("| real_images"))
    assert row.split("|")[3].strip() == "-"


def test_a_part_of_the_set_is_told_in_the_table(tmp_path):
    config = fake_config(tmp_path, {"a": Painter(0.3)})
    path = tmp_path / "data/dataset/prompts_and_classes.txt"
    path.write_text(path.read_text().replace("red_mug,", "blue_mug,mug\nred_mug,", 1))
    evaluation = Evaluation.open(config)
    (sentence,) = incomplete(evaluation.data, evaluation.protocol)
    assert sentence.startswith("1 of the 4 subjects have no pictures in") and "(blue_mug)" in sentence
    with pytest.warns(UserWarning, match="1 of the 4 subjects have no pictures"):
        write_tables(evaluation, scored(config))
    assert "> **Warning:** 1 of the 4 subjects" in (config.eval_folder / "table.md").read_text()
    assert incomplete(evaluation.data, replace(evaluation.protocol, subjects=("red_mug",))) == []


def test_few_subjects_are_said_to_be_few():
    few, enough = (protocol_line(named(PROTOCOL), named(PROTOCOL), subjects) for subjects in (7, 8))
    assert "(of fewer than 8 too narrow, and none in bold)" in few and "fewer" not in enough


def test_breakdowns_and_weights_are_written(tmp_path):
    config = fake_config(tmp_path, METHODS)
    with pytest.warns(UserWarning, match="copy passes"):
        write_tables(Evaluation.open(config), scored(config))
    scores = pd.read_parquet(config.eval_folder / "scores.parquet")
    subjects, prompts = (pd.read_csv(config.eval_folder / f"per_{by}.csv") for by in ("subject", "prompt"))
    assert list(subjects) == ["metric", "subject", "real_images", "copy", "blurred"]
    assert list(prompts) == ["metric", "prompt", "copy", "blurred", "copy_lo", "copy_hi", "blurred_lo", "blurred_hi"]
    several = prompts.dropna()
    assert len(several) and (several.blurred_lo <= several.blurred).all() and (several.blurred <= several.blurred_hi).all()
    own = scores[(scores.method == "blurred") & (scores.subject == "tabby") & (scores.prompt_kind == "context")]
    row = subjects[(subjects.metric == "clip_i") & (subjects.subject == "tabby")].iloc[0]
    assert row.blurred == pytest.approx(own.clip_i.mean(), abs=1e-6)
    assert prompts.prompt.str.contains("{}", regex=False).all()
    about = json.loads((config.eval_folder / "protocol.json").read_text())
    assert about["made_with"]["judges"].keys() == {"dino", "clip"}


def test_a_table_of_extras_has_them_after_the_papers_four(tmp_path):
    config = fake_config(tmp_path, {"real_images": RealImages(), "far": Painter(1.0)}, {"extra_scores": ["dino_masked", "diversity"], "pictures_per_prompt": 2})
    write_tables(Evaluation.open(config), with_extras(config))
    page = (config.eval_folder / "table.md").read_text()
    assert "| Method | DINO | CLIP-T(c) | CLIP-I | CLIP-T(t) | DINO, subject | diversity |\n" in page
    assert "dino_masked" in json.loads((config.eval_folder / "summary.json").read_text())["far"]
