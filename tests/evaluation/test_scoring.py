import logging
import os
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from evaluation.config import EvalConfig
from evaluation.dreambooth import breakdowns, write_tables
from evaluation.extra_scores import Group, Judges, column
from evaluation.generation import generate
from evaluation.methods import RealImages, Reference
from evaluation.metrics import CachedEncoder, Masker
from evaluation.metrics.masked import background_alone, subject_alone
from evaluation.oracle import check_oracle, single
from evaluation.plan import Evaluation
from evaluation.protocols import PRESETS, ExtraScore, named
from evaluation.scoring import comparison
from experiments.mini.models import PROTOCOL, mini_foundation
from tests.evaluation.fakes import CentreSam, ColorEncoder, Painter, fake_config, fake_score, random_picture, write_data

METHODS = {"real_images": RealImages(), "copy": Painter(0.0), "blurred": Painter(0.6)}


def scored(config) -> pd.DataFrame:
    generate(config)
    return fake_score(config)


def embeds(paths) -> np.ndarray:
    return ColorEncoder().encode_images([Image.open(path) for path in paths]).numpy()


def test_no_method_at_all_is_told(tmp_path):
    with pytest.raises(ValueError, match="the config names no methods to evaluate"):
        fake_score(fake_config(tmp_path, {}))


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
        fake_score(config)


def test_black_pictures_of_before_are_not_scored(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.generation.refuse_black", lambda pictures: None)
    monkeypatch.setattr(Painter, "generate", lambda self, subject, reference, tasks: [Image.new("RGB", (24, 24)) for _ in tasks])
    config = fake_config(tmp_path, {"a": Painter(0.3)})
    generate(config)
    with pytest.raises(ValueError, match=r"red_mug.*\.png: all black"):
        fake_score(config)


def test_a_truncated_real_picture_is_named(tmp_path):
    config = fake_config(tmp_path, {"real_images": RealImages()})
    path = tmp_path / "data" / "dataset" / "tabby" / "01.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="tabby/01.png cannot be read as a picture"):
        fake_score(config)


EXTRAS = ("dino_masked", "clip_i_masked", "clip_t_background", "copy_paste", "diversity")


def with_extras(config) -> pd.DataFrame:
    generate(config)
    return fake_score(config, Masker(CentreSam()))


def test_extra_scores_are_their_formulas(tmp_path):
    config = fake_config(tmp_path, METHODS, {"extra_scores": list(EXTRAS), "pictures_per_prompt": 3})
    table, encoder = with_extras(config), ColorEncoder()
    subjects = {s.name: s for s in Evaluation.open(config).subjects}
    middle = np.pad(np.ones((12, 12), bool), 6)
    for (name, _), rows in table[(table.method == "blurred") & (table.prompt_kind == "context")].groupby(["subject", "prompt"]):
        pictures, real = ([Image.open(path) for path in paths] for paths in (rows.path, subjects[name].images))
        vectors, others = encoder.encode_images(pictures).numpy(), encoder.encode_images(real).numpy()
        cosines = vectors @ vectors.T
        np.testing.assert_allclose(rows.diversity, 1 - (cosines.sum(1) - 1) / 2, atol=1e-5)
        np.testing.assert_allclose(rows.copy_paste, vectors @ others[0] - (vectors @ others[1:].T).mean(1), atol=1e-5)
        cut = encoder.encode_images([subject_alone(picture, middle) for picture in pictures]).numpy()
        np.testing.assert_allclose(rows.dino_masked, (cut @ others.T).mean(1), atol=1e-5)  # the data's own masks are all subject
        text = encoder.encode_texts([rows.prompt.iloc[0]])[0].numpy()
        rest = encoder.encode_images([background_alone(picture, middle) for picture in pictures]).numpy()
        np.testing.assert_allclose(rows.clip_t_background, rest @ text, atol=1e-5)


def test_extra_scores_are_blank_where_they_say_nothing(tmp_path):
    table = with_extras(fake_config(tmp_path, METHODS, {"extra_scores": list(EXTRAS), "pictures_per_prompt": 2}))
    given = table.groupby("prompt_kind")[list(EXTRAS)].agg(lambda column: column.notna().all())
    assert given.loc["context"].all()
    assert given.loc["real"].to_dict() == dict.fromkeys(EXTRAS, False) | {"dino_masked": True, "clip_i_masked": True}
    assert given.loc["texture"].to_dict() == dict.fromkeys(EXTRAS, False) | {"diversity": True}
    oracle = table[table.method == "real_images"]
    np.testing.assert_allclose(oracle.dino_masked, oracle.dino, atol=1e-6)  # masks of these pictures are all subject


def test_copying_shows_in_the_copy_paste_score_and_blur_does_not(tmp_path):
    table = with_extras(fake_config(tmp_path, METHODS, {"extra_scores": ["copy_paste"]}))
    means, real = table.groupby("method").copy_paste.mean(), table[(table.method == "real_images") & (table.reference_index == 0)]
    assert means["copy"] == pytest.approx(1 - real.dino.mean(), abs=1e-5)
    assert means["blurred"] < means["copy"]


def test_each_score_asks_its_own_encoder(tmp_path):
    asked = {"dino": "dino", "clip_i": "clip", "clip_t": "clip", "dino_masked": "dino", "clip_i_masked": "clip", "clip_t_background": "clip",
             "copy_paste": "dino", "diversity": "dino", "siglip2_t": "siglip2", "siglip2_i": "siglip2"}
    asked |= {name: name for name in ("dinov2", "dinov3", "dreamsim")}
    assert set(asked) == {"dino", "clip_i", "clip_t", *get_args(ExtraScore)}
    random_picture(1).save(tmp_path / "real.png")
    real = Reference(tmp_path / "real.png")
    group = Group("context", [random_picture(2)] * 2, ["a"] * 2, [real], real, (real,), per_prompt=2)
    for name, wanted in asked.items():
        encoders = {each: CachedEncoder(ColorEncoder()) for each in asked.values()}
        column(name, group, Judges(PRESETS["dreambooth"], encoders, Masker(CentreSam())))
        assert [each for each, cached in encoders.items() if cached.encoder.seen] == [wanted], name


def test_the_protocols_template_scale_and_background_reach_the_scores(tmp_path):
    settings = {"text_template": "A photo depicts {prompt}", "clip_t_scale": 2.5, "mask_background": "grey"}
    config = fake_config(tmp_path, {"blurred": Painter(0.6)}, settings | {"extra_scores": ["dino_masked", "clip_t_background"]})
    table, real = with_extras(config), {s.name: embeds(s.images) for s in Evaluation.open(config).subjects}
    middle = np.pad(np.ones((12, 12), bool), 6)
    for row in table[table.prompt_kind == "context"].itertuples():
        picture, text = Image.open(row.path), ColorEncoder().encode_texts([f"A photo depicts {row.prompt}"])[0].numpy()
        parts = [picture, background_alone(picture, middle), subject_alone(picture, middle, "grey")]
        whole, rest, cut = ColorEncoder().encode_images(parts).numpy()
        assert [row.clip_t, row.clip_t_background, row.dino_masked] == pytest.approx([2.5 * whole @ text, 2.5 * rest @ text, (real[row.subject] @ cut).mean()])


def test_each_reference_is_the_input_of_its_own_pictures(tmp_path):
    """With one kind of prompts too, as in `dreambooth-all-refs`, where nothing else parts one reference's pictures from the next one's."""
    settings = {"references": "every", "comparison": "input", "texture_prompts": 0, "extra_scores": ["copy_paste"]}
    config = fake_config(tmp_path, {"copy": Painter(0.0)}, settings)
    table, real = with_extras(config), {s.name: embeds(s.images) for s in Evaluation.open(config).subjects}
    np.testing.assert_allclose(table.dino, 1, atol=1e-5)
    cosines = {name: vectors @ vectors.T for name, vectors in real.items()}
    expected = [1 - (cosines[row.subject][row.reference_index].sum() - 1) / 2 for row in table.itertuples()]
    np.testing.assert_allclose(table.copy_paste, expected, atol=1e-5)


def test_prompts_stay_whole_where_pictures_are_scored_by_the_64(tmp_path):
    settings = {"subjects": ["tabby"], "pictures_per_prompt": 13, "context_prompts": 5, "texture_prompts": 0, "extra_scores": ["diversity"]}
    table = with_extras(fake_config(tmp_path, {"a": Painter(0.3)}, settings))
    for _, rows in table.groupby("prompt"):
        cosines = embeds(rows.path) @ embeds(rows.path).T
        np.testing.assert_allclose(rows.diversity, 1 - (cosines.sum(1) - 1) / 12, atol=1e-5)


def test_masks_of_real_pictures_are_sams_where_the_protocol_says_so(tmp_path):
    overrides = {"extra_scores": ["dino_masked"], "sampler": {"masks": "sam"}}
    table = with_extras(fake_config(tmp_path, {"real_images": RealImages()}, overrides))
    middle = np.pad(np.ones((12, 12), bool), 6)
    for _, rows in table.groupby("subject"):
        vectors = ColorEncoder().encode_images([subject_alone(Image.open(path), middle) for path in rows.path]).numpy()
        cosines = vectors @ vectors.T
        np.testing.assert_allclose(rows.dino_masked, (cosines.sum(1) - 1) / 2, atol=1e-5)


def test_a_real_pictures_mask_of_other_pixels_is_scaled_to_it_and_one_of_other_proportions_is_named(tmp_path):
    judges = Judges(named("dreambooth"), {})
    random_picture(0).save(tmp_path / "00.png")
    Image.new("L", (12, 12), 255).save(tmp_path / "half.png")
    Image.new("L", (24, 12), 255).save(tmp_path / "wide.png")
    assert judges.mask_of_real(Reference(tmp_path / "00.png", tmp_path / "half.png")).shape == (24, 24)
    with pytest.raises(ValueError, match=r"wide.png .* does not fit a picture of 24x24"):
        judges.mask_of_real(Reference(tmp_path / "00.png", tmp_path / "wide.png"))


def test_masked_scores_without_a_masker_are_refused(tmp_path):
    config = fake_config(tmp_path, {"a": Painter(0.3)}, {"extra_scores": ["dino_masked"]})
    generate(config)
    with pytest.raises(ValueError, match="need a masker"):
        fake_score(config)


def test_other_kinds_of_prompt_are_scored_like_context_ones(tmp_path):
    table = scored(fake_config(tmp_path, {"a": Painter(0.3)}, {"pose_prompts": 2, "texture_prompts": 0}))
    pose = table[table.prompt_kind == "pose"]
    assert len(pose) == 3 * 2
    assert pose[["dino", "clip_i", "clip_t"]].notna().all(axis=None)


def test_real_pictures_are_scored_first_and_stay_where_the_config_has_them(tmp_path, caplog):
    config = fake_config(tmp_path, {"copy": Painter(0.0), "real_images": RealImages()})
    with caplog.at_level(logging.INFO, "evaluation.scoring"):
        table = scored(config)
    assert [line.split(":")[0] for line in caplog.messages if "pictures scored" in line] == ["real_images", "copy"]
    assert list(dict.fromkeys(table.method)) == ["copy", "real_images"]


@pytest.mark.parametrize(("dino", "clip_i", "missed"), [(0.774, 0.885, []), (0.766, 0.893, []), (0.70, 0.885, ["dino"]), (0.79, 0.87, ["dino", "clip_i"])])
def test_real_pictures_must_score_what_is_published(dino, clip_i, missed):
    scores = pd.DataFrame({"method": "real_images", "subject": ["a", "b"], "prompt_kind": "real", "dino": dino, "clip_i": clip_i})
    found = check_oracle(scores, PRESETS["dreambooth"], 30)
    assert [sentence.split()[2] for sentence in found] == missed
    assert all("believe no score" in sentence for sentence in found)


def test_nothing_is_said_of_other_encoders_or_a_part_of_the_subjects():
    scores = pd.DataFrame({"method": "real_images", "subject": ["a"], "prompt_kind": "real", "dino": 0.1, "clip_i": 0.1})
    assert check_oracle(scores, named(PROTOCOL), 30) == []
    assert check_oracle(scores, PRESETS["dreambooth"], 29) == []


def test_subjects_of_one_picture_are_named(tmp_path):
    config = fake_config(tmp_path, {"a": Painter(0.3), "real_images": RealImages()})
    for path in sorted((tmp_path / "data/dataset/red_mug").glob("*.png"))[1:]:
        path.unlink()
    with pytest.warns(UserWarning, match=r"1 of 3 subjects have one picture, .* \(red_mug\)"):
        write_tables(Evaluation.open(config), scored(config))
    table = scored(config)
    assert single(table[table.prompt_kind != "real"], Evaluation.open(config).subjects) == [], "nothing of the real ones is told"


REAL = os.environ.get("MOMA_DREAMBOOTH")


@pytest.mark.skipif(REAL is None, reason="set MOMA_DREAMBOOTH to a copy of google/dreambooth (or a part of it) to score its real pictures")
def test_real_dreambooth_pictures_are_read_and_scored(tmp_path):
    config = EvalConfig(run=str(tmp_path), data=str(REAL), protocol="dreambooth", foundation=mini_foundation(), methods={"real_images": RealImages()})
    evaluation, table = Evaluation.open(config), fake_score(config)
    assert table.groupby("subject").size().to_dict() == {subject.name: len(subject.images) for subject in evaluation.subjects}
    assert table[["dino", "clip_i"]].notna().all(axis=None)
    planned = evaluation.planned("anything", Painter())
    assert sum(plan.task.kind == "context" for plan in planned) == len(evaluation.subjects) * 25 * 4


def test_a_prompt_of_one_subject_has_no_interval():
    rows = [("tabby", "cat", "a cat in a hat"), ("tabby", "cat", "a cat"), ("rex", "dog", "a dog")]
    scores = pd.DataFrame([{"method": "a", "subject": s, "label": label, "prompt_kind": "context", "prompt": p, "clip_t": 0.1 * i}
                           for i, (s, label, p) in enumerate(rows)])
    table = breakdowns(scores, "prompt").set_index("prompt")
    assert table.a_lo.isna().to_dict() == {"a {} in a hat": True, "a {}": False} and table.a.notna().all()
