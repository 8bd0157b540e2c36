import functools
import operator

import numpy as np
import pandas as pd
import pytest

from evaluation.statistics import above_oracle, by_subject, difference, method_interval, summarise


def frame(values: dict[str, dict[str, list[float]]], kind: str = "context") -> pd.DataFrame:
    """{method: {subject: [dino of each picture]}}."""
    rows = [
        {"method": m, "subject": s, "prompt_kind": kind, "dino": v, "clip_i": v / 2, "clip_t": 0.3}
        for m, subjects in values.items()
        for s, given in subjects.items()
        for v in given
    ]
    return pd.DataFrame(rows)


def normal(seed: int, subjects: int = 30, pictures: int = 4, shift: float = 0.0) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    return {f"s{i:02d}": list(rng.normal(0.5 + shift, 0.1) + rng.normal(0, 0.01, pictures)) for i in range(subjects)}


def test_mean_is_over_pictures_and_interval_over_subjects():
    values = normal(0)
    found = method_interval(frame({"a": values}), "a", "dino")
    means = np.array([np.mean(v) for v in values.values()])
    half = 1.96 * means.std(ddof=1) / np.sqrt(len(means))
    assert found["mean"] == pytest.approx(means.mean())
    assert found["mean"] - found["lo"] == pytest.approx(half, rel=0.15)
    assert found["hi"] - found["mean"] == pytest.approx(half, rel=0.15)


def test_interval_is_the_plain_bootstrap():
    values = {"x": [0.1, 0.3], "y": [0.5], "z": [0.9, 0.7, 0.8]}
    found = method_interval(frame({"a": values}), "a", "dino", resamples=500)
    rng, keys = np.random.default_rng(0), list(values)
    means = [np.mean(functools.reduce(operator.iadd, (values[keys[i]] for i in row), [])) for row in rng.integers(0, 3, (500, 3))]
    assert found["lo"] == pytest.approx(np.quantile(means, 0.025))
    assert found["hi"] == pytest.approx(np.quantile(means, 0.975))
    assert found["mean"] == pytest.approx(np.mean([0.1, 0.3, 0.5, 0.9, 0.7, 0.8]))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(100):
        found = method_interval(frame({"a": normal(seed, pictures=1)}), "a", "dino", resamples=400)
        hits += found["lo"] <= 0.5 <= found["hi"]
    assert 85 <= hits <= 100


def test_differences_are_paired_over_common_subjects():
    base = normal(1)
    better = {name: [v + 0.02 for v in values] for name, values in base.items()}
    better["only_here"] = [9.0]
    found = difference(frame({"a": better, "b": base}), "a", "b", "dino")
    for end in ("mean", "lo", "hi"):  # every pair differs by the same, so pairing leaves no width
        assert found[end] == pytest.approx(0.02)


def test_summary_has_the_published_form():
    scores = pd.concat([frame({"weak": normal(0), "strong": normal(0, shift=0.1)}), frame({"real": normal(2)}, kind="real").assign(clip_t=np.nan)])
    summary = summarise(scores, resamples=50)
    assert set(summary) == {"weak", "strong", "real", "differences"}
    assert set(summary["weak"]) == {"dino", "clip_i", "clip_t_context"}
    assert set(summary["real"]) == {"dino", "clip_i"}
    assert {(d["a"], d["b"], d["metric"]) for d in summary["differences"]} == {("strong", "weak", m) for m in ("dino", "clip_i", "clip_t_context")}
    assert all(set(d) == {"a", "b", "metric", "mean", "lo", "hi"} for d in summary["differences"])


def test_texture_prompts_count_for_clip_t_texture_only():
    context, texture = frame({"a": {"x": [0.4]}}), frame({"a": {"x": [0.9]}}, kind="texture").assign(dino=np.nan, clip_i=np.nan, clip_t=0.1)
    scores = pd.concat([context, texture])
    assert by_subject(scores, "a", "dino")["sum"].item() == pytest.approx(0.4)
    assert by_subject(scores, "a", "clip_t_context")["sum"].item() == pytest.approx(0.3)
    assert by_subject(scores, "a", "clip_t_texture")["sum"].item() == pytest.approx(0.1)


def test_intervals_are_repeatable():
    scores = frame({"a": normal(3)})
    assert method_interval(scores, "a", "dino") == method_interval(scores, "a", "dino")


def test_a_method_above_the_oracle_is_named():
    scores = pd.concat([frame({"copy": {"x": [0.95]}, "fair": {"x": [0.5]}}), frame({"real": {"x": [0.8]}}, kind="real")])
    found = above_oracle(scores, summarise(scores, resamples=10))
    assert len(found) == 2
    assert all(sentence.startswith("copy passes real") for sentence in found)
