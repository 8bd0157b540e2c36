import functools
import operator
from typing import get_args

import numpy as np
import pandas as pd
import pytest

from evaluation.protocols import ExtraScore
from evaluation.statistics import (
    ENOUGH_SUBJECTS,
    METRICS,
    RESAMPLES,
    TABLE_1,
    above_oracle,
    by_chance,
    by_subject,
    difference,
    leaves_out_zero,
    method_interval,
    prompt_form,
    prompt_intervals,
    subject_means,
    summarise,
)
from evaluation.tables import difference_table
from evaluation.tasks import PromptKind


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
    found = method_interval(by_subject(frame({"a": values}), "a", "dino"))
    means = np.array([np.mean(v) for v in values.values()])
    half = 1.96 * means.std(ddof=1) / np.sqrt(len(means))
    assert found["mean"] == pytest.approx(means.mean())
    assert found["mean"] - found["lo"] == pytest.approx(half, rel=0.15)
    assert found["hi"] - found["mean"] == pytest.approx(half, rel=0.15)


def test_interval_is_the_plain_bootstrap():
    values = {"x": [0.1, 0.3], "y": [0.5], "z": [0.9, 0.7, 0.8]}
    found = method_interval(by_subject(frame({"a": values}), "a", "dino"))
    rng, keys = np.random.default_rng(0), list(values)
    means = [np.mean(functools.reduce(operator.iadd, (values[keys[i]] for i in row), [])) for row in rng.integers(0, 3, (RESAMPLES, 3))]
    assert found["lo"] == pytest.approx(np.quantile(means, 0.025))
    assert found["hi"] == pytest.approx(np.quantile(means, 0.975))
    assert found["mean"] == pytest.approx(np.mean([0.1, 0.3, 0.5, 0.9, 0.7, 0.8]))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(100):
        found = method_interval(by_subject(frame({"a": normal(seed, pictures=1)}), "a", "dino"))
        hits += found["lo"] <= 0.5 <= found["hi"]
    assert 85 <= hits <= 100


def test_differences_are_paired_over_common_subjects():
    base = normal(1)
    better = {name: [v + 0.02 for v in values] for name, values in base.items()}
    better["only_here"] = [9.0]
    scores = frame({"a": better, "b": base})
    found = difference(by_subject(scores, "a", "dino"), by_subject(scores, "b", "dino"))
    for end in ("mean", "lo", "hi"):  # every pair differs by the same, so pairing leaves no width
        assert found[end] == pytest.approx(0.02)


def test_summary_has_the_published_form():
    scores = pd.concat([frame({"weak": normal(0), "strong": normal(0, shift=0.1)}), frame({"real": normal(2)}, kind="real").assign(clip_t=np.nan)])
    summary = summarise(scores)
    assert set(summary) == {"weak", "strong", "real", "differences"}
    assert set(summary["weak"]) == {"dino", "clip_i", "clip_t_context"}
    assert set(summary["real"]) == {"dino", "clip_i"}
    assert {(d["a"], d["b"], d["metric"]) for d in summary["differences"]} == {("strong", "weak", m) for m in ("dino", "clip_i", "clip_t_context")}
    assert all(set(d) == {"a", "b", "metric", "mean", "lo", "hi", "subjects"} for d in summary["differences"])


def test_texture_prompts_count_for_clip_t_texture_only():
    context, texture = frame({"a": {"x": [0.4]}}), frame({"a": {"x": [0.9]}}, kind="texture").assign(dino=np.nan, clip_i=np.nan, clip_t=0.1)
    scores = pd.concat([context, texture])
    assert by_subject(scores, "a", "dino")["sum"].item() == pytest.approx(0.4)
    assert by_subject(scores, "a", "clip_t_context")["sum"].item() == pytest.approx(0.3)
    assert by_subject(scores, "a", "clip_t_texture")["sum"].item() == pytest.approx(0.1)


@pytest.mark.parametrize(("lo", "hi", "expected"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.2, False), (0.0, 0.2, False), (0.1, 0.1, False)])
def test_a_difference_leaves_out_zero_where_it_has_an_interval_on_one_side(lo, hi, expected):
    assert leaves_out_zero({"lo": lo, "hi": hi}) is expected


@pytest.mark.parametrize(("count", "some"), [(144, "7"), (20, "1"), (4, "0.2")])
def test_tables_say_how_many_differences_would_stand_out_by_chance(count, some):
    enough, few = {"subjects": ENOUGH_SUBJECTS}, {"subjects": ENOUGH_SUBJECTS - 1}
    assert f"Of {count} such differences {some} would by chance" in by_chance([enough] * count + [few] * 9)
    assert by_chance([few]).endswith("subjects or more.")
    summary = summarise(frame({"a": normal(3), "b": normal(4)}))
    assert difference_table(summary).splitlines()[-1] == f"Bold: {by_chance(summary['differences'])}"


def test_intervals_are_repeatable():
    scores = frame({"a": normal(3)})
    assert method_interval(by_subject(scores, "a", "dino")) == method_interval(by_subject(scores, "a", "dino"))


def test_a_method_above_the_oracle_is_named():
    scores = pd.concat([frame({"copy": {"x": [0.95]}, "fair": {"x": [0.5]}}), frame({"real": {"x": [0.8]}}, kind="real")])
    found = above_oracle(scores, summarise(scores))
    assert len(found) == 2
    assert all(sentence.startswith("copy passes real") for sentence in found)


def test_the_oracle_is_passed_over_the_subjects_that_it_has():
    """y has one picture, so that nothing is known of its real ones."""
    real = frame({"real": {"x": [0.6]}}, kind="real")
    copies, fair = ({"copies": {"x": [0.7], "y": [0.2]}}, {"fair": {"x": [0.55], "y": [0.95]}})
    found = [above_oracle(scores, summarise(scores)) for scores in (pd.concat([frame(made), real]) for made in (copies, fair))]
    assert [sentence.split(" (")[0] for sentence in found[0]] == ["copies passes real in dino", "copies passes real in clip_i"] and not found[1]
    assert "(0.700 > 0.600)" in found[0][0]
    two = pd.concat([frame({"fair": {"x": [0.5]}}), frame({"real": {"x": [0.6]}, "others": {"x": [0.9]}}, kind="real")])
    assert above_oracle(two, summarise(two)) == [], "real pictures are not held against others"


def test_few_subjects_do_not_stand_out():
    """Two subjects' interval reaches from the one to the other: where nothing differs it leaves out zero half of the time."""
    few, enough = ({f"s{i}": [0.1 + i / 100] for i in range(count)} for count in (ENOUGH_SUBJECTS - 1, ENOUGH_SUBJECTS))
    nothing = {name: [0.0] for name in enough}
    for values, expected in ((few, False), (enough, True)):
        scores = frame({"a": values, "b": nothing})
        found = difference(by_subject(scores, "a", "dino"), by_subject(scores, "b", "dino"))
        assert found["subjects"] == len(values) and found["lo"] > 0 and leaves_out_zero(found) is expected
    assert not leaves_out_zero({"lo": -0.1, "hi": 0.1, "subjects": 30})


def of_protocol(name: str, digest: str, shift: float) -> pd.DataFrame:
    return frame({"weak": normal(0, shift=shift), "strong": normal(0, shift=shift + 0.1)}).assign(protocol=name, protocol_digest=digest)


def test_table_1_comes_first_and_extras_only_where_they_were_made():
    assert list(METRICS)[:4] == list(TABLE_1) == ["dino", "clip_t_context", "clip_i", "clip_t_texture"]
    plain = frame({"a": normal(0)})
    assert list(summarise(plain)["a"]) == ["dino", "clip_t_context", "clip_i"]
    more = plain.assign(dino_masked=plain["dino"] - 0.1, diversity=np.nan)
    summary = summarise(more)
    assert list(summary["a"]) == ["dino", "clip_t_context", "clip_i", "dino_masked"]
    assert summary["a"]["dino_masked"]["mean"] == pytest.approx(summary["a"]["dino"]["mean"] - 0.1)


def test_other_kinds_of_prompt_never_enter_table_1():
    context = frame({"a": {"x": [0.4]}})
    scores = pd.concat([context, frame({"a": {"x": [0.9]}}, kind="pose"), frame({"a": {"x": [0.8]}}, kind="accessory")])
    summary = summarise(scores)["a"]
    assert {metric: round(cell["mean"], 6) for metric, cell in summary.items() if metric.startswith("dino")} == {
        "dino": 0.4, "dino_accessory": 0.8, "dino_pose": 0.9}


def test_metrics_are_named_after_their_column_and_kind():
    for metric, (column, kinds, _) in METRICS.items():
        name, _, kind = metric.rpartition("_")
        if kind in get_args(PromptKind):
            assert (column, kinds) == (name, (kind,))
        else:
            assert column == metric and set(kinds) <= {"context", "real"}


def test_every_score_that_a_protocol_may_ask_for_has_a_column_in_tables():
    assert set(get_args(ExtraScore)) <= {column for column, _, _ in METRICS.values()}


def test_scores_of_two_protocols_are_refused_by_name():
    mixed = pd.concat([of_protocol("mini", "aaa", 0.0), of_protocol("moma-paper", "bbb", 0.2)])
    a_method_each = pd.concat([of_protocol("mini", "aaa", 0.0), of_protocol("moma-paper", "bbb", 0.2).replace({"method": {"weak": "other"}})])
    a_method_each = a_method_each[a_method_each["method"].isin(["weak", "other"])]
    for refused in (lambda: summarise(mixed), lambda: by_subject(mixed, "weak", "dino"), lambda: subject_means(mixed, "dino"),
                    lambda: prompt_intervals(a_method_each, "dino")):
        with pytest.raises(ValueError, match=r"'mini' \(aaa\), 'moma-paper' \(bbb\)"):
            refused()


def test_subjects_count_alike_where_the_protocol_says_so():
    scores = frame({"a": {"x": [0.1, 0.3], "y": [0.8]}})
    assert method_interval(by_subject(scores, "a", "dino"))["mean"] == pytest.approx(0.4)
    assert method_interval(by_subject(scores.assign(aggregation="subjects"), "a", "dino"))["mean"] == pytest.approx(0.5)


def test_breakdown_by_subject_and_prompt():
    rows = [("a", "x", "cat", "a cat in the snow", 0.2), ("a", "x", "cat", "a cat on a lake", 0.4), ("a", "y", "mug", "a mug in the snow", 0.6),
            ("b", "x", "cat", "a cat in the snow", 0.8), ("real", "x", "cat", "", 0.9)]
    scores = pd.DataFrame(rows, columns=["method", "subject", "label", "prompt", "dino"])
    scores["prompt_kind"] = np.where(scores["method"] == "real", "real", "context")
    subjects = subject_means(scores, "dino")
    assert list(subjects.columns) == ["a", "b", "real"]
    assert subjects["a"].to_dict() == pytest.approx({"x": 0.3, "y": 0.6})
    assert subjects.loc["x", "real"] == 0.9 and np.isnan(subjects.loc["y", "b"])
    prompts = prompt_intervals(scores, "dino")
    assert {form: {method: cell["mean"] for method, cell in cells.items()} for form, cells in prompts.items()} == {
        "a {} in the snow": pytest.approx({"a": 0.4, "b": 0.8}), "a {} on a lake": pytest.approx({"a": 0.4})}
    assert subject_means(scores, "dinov2").empty and not prompt_intervals(scores, "dinov2")


def test_subjects_and_prompts_keep_the_order_in_which_they_come():
    rows = [("z", "a cat in the snow", 0.2), ("z", "a cat at home", 0.4), ("a", "a cat in the snow", 0.6), ("a", "a cat at home", 0.8)]
    scores = pd.DataFrame(rows, columns=["subject", "prompt", "dino"]).assign(method="m", label="cat", prompt_kind="context")
    assert list(subject_means(scores, "dino").index) == ["z", "a"]
    assert list(prompt_intervals(scores, "dino")) == ["a {} in the snow", "a {} at home"]


def test_a_prompts_interval_is_over_the_subjects_that_have_it():
    rng = np.random.default_rng(3)
    values = rng.random((6, 4))
    rows = [("a", f"s{i}", "cat", "a cat in the snow", value) for i, row in enumerate(values) for value in row] + [("a", "s0", "cat", "a cat", 0.5)]
    scores = pd.DataFrame(rows, columns=["method", "subject", "label", "prompt", "dino"]).assign(prompt_kind="context")
    found = prompt_intervals(scores, "dino")
    again = values.mean(1)[np.random.default_rng(0).integers(0, 6, (RESAMPLES, 6))].mean(1)
    assert found["a {} in the snow"]["a"] == pytest.approx({"mean": values.mean(), "lo": np.quantile(again, 0.025), "hi": np.quantile(again, 0.975)})
    assert found["a {}"]["a"] == {"mean": 0.5, "lo": 0.5, "hi": 0.5}


def test_the_subject_is_taken_out_of_its_prompt_as_a_word():
    assert prompt_form("a cat in the category of cat", "cat") == "a {} in the category of {}"
    assert prompt_form("a stuffed animal (blue)", "stuffed animal") == "a {} (blue)"
    assert prompt_form("two cats in the snow", "cat") == "two {} in the snow" and prompt_form("snow", "") == "snow"
    assert prompt_form("a scarf on a car", "car") == "a scarf on a {}" and prompt_form("a scar on a car", "car") == "a scar on a {}"
