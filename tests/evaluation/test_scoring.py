import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from evaluation import published
from evaluation.dreambooth import write_tables
from evaluation.generation import generate
from evaluation.methods import RealImages
from evaluation.plan import Evaluation
from evaluation.scoring import comparison, score
from tests.evaluation.fakes import ColorEncoder, Painter, fake_config, fake_encoders, write_data

METHODS = {"real_images": RealImages(), "copy": Painter(0.0), "blurred": Painter(0.6)}


def scored(config) -> pd.DataFrame:
    generate(config)
    return score(Evaluation.open(config), config.methods, fake_encoders())


def embeds(paths) -> np.ndarray:
    return ColorEncoder().encode_images([Image.open(path) for path in paths]).numpy()


def test_scores_are_the_plain_formulas(tmp_path):
    config = fake_config(tmp_path, METHODS)
    table = scored(config).set_index("path")
    real = {s.name: embeds(s.images) for s in Evaluation.open(config).subjects}
    made = table[table.prompt_kind == "context"]
    for path, row in made.iterrows():
        picture, text = embeds([path])[0], ColorEncoder().encode_texts([row.prompt])[0].numpy()
        assert row.dino == pytest.approx(np.mean(real[row.subject] @ picture), abs=1e-5)
        assert row.clip_t == pytest.approx(float(text @ picture), abs=1e-5)
    assert len(made) == 2 * 3 * 2


def test_oracle_compares_each_real_picture_to_the_others(tmp_path):
    table = scored(fake_config(tmp_path, {"real_images": RealImages()}))
    assert len(table) == 9
    for name, rows in table.groupby("subject"):
        vectors = embeds(rows.path)
        cosines = vectors @ vectors.T
        expected = [(cosines[i].sum() - cosines[i, i]) / 2 for i in range(3)]
        np.testing.assert_allclose(rows.dino, expected, atol=1e-5, err_msg=name)
    assert table.clip_t.isna().all()


def test_a_subject_with_one_picture_has_no_oracle(tmp_path):
    write_data(tmp_path / "data", pictures=1)
    with pytest.raises(ValueError, match="two pictures"):
        scored(fake_config(tmp_path, {"real_images": RealImages()}))


def test_texture_prompts_have_clip_t_only(tmp_path):
    table = scored(fake_config(tmp_path, METHODS))
    texture = table[table.prompt_kind == "texture"]
    assert len(texture) == 2 * 3
    assert texture.dino.isna().all()
    assert texture.clip_i.isna().all()
    assert texture.clip_t.notna().all()


@pytest.mark.parametrize(("kind", "expected"), [("all", "abc"), ("others", "ac"), ("input", "b")])
def test_comparison_sets(kind, expected):
    assert comparison(kind, list("abc"), 1) == list(expected)


def test_comparison_set_moves_the_score(tmp_path):
    copies = {"copy": Painter(0.0)}
    means = {}
    for kind in ("all", "others", "input"):
        means[kind] = scored(fake_config(tmp_path, copies, {"comparison": kind, "references": "every"})).dino.mean()
    assert means["input"] == pytest.approx(1, abs=1e-5)
    assert means["all"] == pytest.approx((means["input"] + 2 * means["others"]) / 3, abs=1e-5)


@pytest.mark.parametrize("harm", ["missing", "cut", "without stamp", "other settings"])
def test_pictures_that_are_not_whole_are_never_scored(tmp_path, harm):
    config = fake_config(tmp_path, {"a": Painter(0.3)})
    generate(config)
    picture = sorted(config.pictures.rglob("*.png"))[0]
    if harm == "missing":
        picture.unlink()
    elif harm == "cut":
        picture.write_bytes(picture.read_bytes()[:100])
    elif harm == "without stamp":
        picture.with_suffix(".json").unlink()
    else:
        config.methods["a"] = Painter(0.4)
    with pytest.raises(ValueError, match=r"a: \d of 9 pictures are missing.*red_mug|a: 1 of 9 .*old_boot"):
        score(Evaluation.open(config), config.methods, fake_encoders())


def test_a_truncated_real_picture_is_named(tmp_path):
    config = fake_config(tmp_path, {"real_images": RealImages()})
    path = tmp_path / "data" / "dataset" / "tabby" / "01.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OSError, match="tabby/01.png is not a whole picture"):
        score(Evaluation.open(config), config.methods, fake_encoders())


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
    assert about["protocol"]["sampler"]["num_inference_steps"] == 12
    assert "copy passes" in about["warnings"][0]


def test_markdown_keeps_the_papers_rows_apart(tmp_path):
    config = fake_config(tmp_path, METHODS)
    with pytest.warns(UserWarning, match="copying its input"):
        write_tables(Evaluation.open(config), scored(config))
    page = (config.eval_folder / "table.md").read_text()
    ours, paper = page.split("## The paper's Table 1")
    assert "| Method | DINO | CLIP-T(c) | CLIP-I | CLIP-T(t) |" in ours
    assert config.resolved_protocol().digest in ours
    assert "**Warning:** copy passes real_images" in ours
    assert "MoMA | 0.618" not in ours
    assert published.NOTE in paper
    assert "| MoMA | 0.618 | 0.348 | 0.803 | 0.335 |" in paper
    assert "| Real images | 0.774 | - | 0.885 | - |" in paper
    row = next(line for line in ours.splitlines() if line.startswith("| real_images"))
    assert row.split("|")[3].strip() == "-"
