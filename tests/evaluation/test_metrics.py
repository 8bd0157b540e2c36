import numpy as np
import pytest

from evaluation.metrics import SubjectSimilarity, TextAlignment
from tests.evaluation.fakes import ColorEncoder, random_picture


def plain_vector(picture) -> np.ndarray:
    """ColorEncoder written out: block means of a 24 x 24 picture."""
    blocks = np.asarray(picture, np.float64).reshape(3, 8, 3, 8, 3).mean((1, 3))
    return (blocks.transpose(2, 0, 1) / 127.5 - 0.9).ravel()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_subject_similarity_is_the_mean_cosine_over_pairs():
    generated, real = [random_picture(i) for i in range(4)], [random_picture(i) for i in range(10, 13)]
    metric = SubjectSimilarity(ColorEncoder())
    metric.update(generated[:1], real)
    metric.update(generated[1:], real)
    pairs = np.array([[cosine(plain_vector(g), plain_vector(r)) for r in real] for g in generated])
    np.testing.assert_allclose(metric.per_picture(), pairs.mean(1), atol=1e-5)
    assert float(metric.compute()) == pytest.approx(pairs.mean(), abs=1e-5)


def test_subject_similarity_of_a_picture_with_itself_is_one():
    metric = SubjectSimilarity(ColorEncoder())
    metric.update([random_picture(0)], [random_picture(0)])
    assert float(metric.compute()) == pytest.approx(1, abs=1e-6)


def test_text_alignment_is_the_cosine_of_each_pair():
    pictures, prompts = [random_picture(i) for i in range(3)], ["a", "b", "a"]
    metric = TextAlignment(ColorEncoder(), template="A photo depicts {prompt}", scale=2.5)
    metric.update(pictures, prompts)
    texts = ColorEncoder().encode_texts([f"A photo depicts {p}" for p in prompts]).double().numpy()
    expected = [2.5 * cosine(plain_vector(p), t) for p, t in zip(pictures, texts, strict=True)]
    np.testing.assert_allclose(metric.per_picture(), expected, atol=1e-5)
    assert float(metric.compute()) == pytest.approx(np.mean(expected), abs=1e-5)


def test_states_of_two_processes_join_to_the_mean_over_all_pictures():
    """What torchmetrics does after gathering: lists are concatenated, as dist_reduce_fx says."""
    real, parts = [random_picture(9)], [SubjectSimilarity(ColorEncoder()) for _ in range(2)]
    parts[0].update([random_picture(0)], real)
    parts[1].update([random_picture(1), random_picture(2)], real)
    joined = SubjectSimilarity(ColorEncoder())
    joined.update([random_picture(i) for i in range(3)], real)
    assert all(part._reductions["values"] is not None for part in parts)
    parts[0]._reduce_states(parts[1].metric_state)
    assert float(parts[0].compute()) == pytest.approx(float(joined.compute()), abs=1e-6)


def test_reset_forgets():
    metric = SubjectSimilarity(ColorEncoder())
    metric.update([random_picture(0)], [random_picture(1)])
    metric.reset()
    assert len(metric.per_picture()) == 0
    with pytest.raises(ValueError, match="no picture"):
        metric.compute()


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="no real picture"):
        SubjectSimilarity(ColorEncoder()).update([random_picture(0)], [])
    with pytest.raises(ValueError, match="1 pictures but 2 prompts"):
        TextAlignment(ColorEncoder()).update([random_picture(0)], ["a", "b"])


