import numpy as np
import pytest
from PIL import Image

from evaluation.metrics import BackgroundAlignment, CopyPaste, MaskedSimilarity, SeedDiversity, SubjectSimilarity, TextAlignment
from evaluation.metrics.masked import background_alone, subject_alone
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


def half(side: str) -> np.ndarray:
    mask = np.zeros((24, 24), bool)
    mask[:, :12] = side == "left"
    mask[:, 12:] = side == "right"
    return mask


def test_subject_and_background_are_taken_apart():
    picture, mask = random_picture(0), half("left")
    pixels, alone, rest = (np.asarray(image) for image in (picture, subject_alone(picture, mask), background_alone(picture, mask)))
    np.testing.assert_array_equal(alone[:, :12], pixels[:, :12])
    assert (alone[:, 12:] == 255).all()
    np.testing.assert_array_equal(rest[:, 12:], pixels[:, 12:])
    np.testing.assert_allclose(rest[:, :12].reshape(-1, 3), np.tile(pixels[:, 12:].reshape(-1, 3).mean(0), (288, 1)), atol=0.51)
    assert (np.asarray(subject_alone(picture, mask, "grey"))[:, 12:] == 128).all()
    with pytest.raises(ValueError, match="a mask of 24x24 for a picture of 20x24"):
        subject_alone(random_picture(0, (20, 24)), mask)


def test_masked_similarity_sees_the_subject_only():
    subject, mask = random_picture(0), half("left")
    moved = np.array(random_picture(1))
    moved[:, :12] = np.asarray(subject)[:, :12]
    whole, masked = SubjectSimilarity(ColorEncoder()), MaskedSimilarity(ColorEncoder())
    whole.update([Image.fromarray(moved)], [subject])
    masked.update([Image.fromarray(moved)], [mask], [subject], [mask])
    assert float(masked.compute()) == pytest.approx(1, abs=1e-5)
    assert float(whole.compute()) < 0.95


def test_masked_similarity_is_that_of_the_cut_out_pictures():
    pictures, real = [random_picture(i) for i in range(3)], [random_picture(i) for i in (7, 8)]
    masks, real_masks = [half("left"), half("right"), half("left")], [half("right"), half("left")]
    metric = MaskedSimilarity(ColorEncoder(), "grey")
    metric.update(pictures, masks, real, real_masks)
    cut, cut_real = ([plain_vector(subject_alone(p, m, "grey")) for p, m in zip(ps, ms, strict=True)]
                     for ps, ms in ((pictures, masks), (real, real_masks)))
    expected = [np.mean([cosine(a, b) for b in cut_real]) for a in cut]
    np.testing.assert_allclose(metric.per_picture(), expected, atol=1e-5)


def test_pictures_without_a_subject_have_no_masked_score():
    nothing, everything = half("none"), half("left") | half("right")
    pictures, real = [random_picture(0), random_picture(1)], [random_picture(2), random_picture(3)]
    metric = MaskedSimilarity(ColorEncoder())
    metric.update(pictures, [nothing, everything], real, [everything, nothing])
    values = metric.per_picture().tolist()
    assert np.isnan(values[0])
    assert values[1] == pytest.approx(cosine(plain_vector(pictures[1]), plain_vector(real[0])), abs=1e-5)
    assert float(metric.compute()) == pytest.approx(values[1])
    background = BackgroundAlignment(ColorEncoder())
    background.update(pictures, [nothing, everything], ["a", "b"])
    assert background.per_picture().isnan().all()


def test_background_alignment_does_not_see_the_subject():
    mask, prompts = half("right"), ["in the snow"]
    mixed = np.array(random_picture(0))
    mixed[:, 12:] = np.asarray(random_picture(1))[:, 12:]
    values = []
    for picture in (random_picture(0), Image.fromarray(mixed)):
        metric = BackgroundAlignment(ColorEncoder(), scale=2.5)
        metric.update([picture], [mask], prompts)
        values.append(float(metric.compute()))
    text = ColorEncoder().encode_texts(prompts)[0].numpy()
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert values[0] == pytest.approx(2.5 * cosine(plain_vector(background_alone(random_picture(0), mask)), text), abs=1e-5)


def test_each_background_is_held_against_its_own_prompt():
    """Though the picture before it, which its subject fills, is passed over."""
    pictures, everything = [random_picture(i) for i in range(2)], half("left") | half("right")
    both, alone = BackgroundAlignment(ColorEncoder()), BackgroundAlignment(ColorEncoder())
    both.update(pictures, [everything, half("left")], ["a", "b"])
    alone.update(pictures[1:], [half("left")], ["b"])
    assert both.per_picture()[0].isnan() and float(both.per_picture()[1]) == pytest.approx(float(alone.compute()), abs=1e-6)


def test_diversity_is_one_minus_the_mean_over_pairs():
    pictures = [random_picture(i) for i in range(4)]
    metric = SeedDiversity(ColorEncoder())
    metric.update(pictures)
    pairs = [1 - cosine(plain_vector(pictures[i]), plain_vector(pictures[j])) for i in range(4) for j in range(i)]
    assert float(metric.compute()) == pytest.approx(np.mean(pairs), abs=1e-5)
    metric.reset()
    metric.update([pictures[0]] * 3)
    assert float(metric.compute()) == pytest.approx(0, abs=1e-5)
    metric.reset()
    metric.update(pictures[:1])
    assert np.isnan(metric.per_picture()).all()


def test_copy_paste_is_the_distance_of_real_pictures_for_a_copy():
    reference, others = random_picture(0), [random_picture(i) for i in (1, 2)]
    metric = CopyPaste(ColorEncoder())
    metric.update([reference, others[0], random_picture(5)], reference, others)
    vectors = [plain_vector(p) for p in (reference, *others, random_picture(5))]
    between = [[cosine(a, b) for b in vectors] for a in vectors]
    expected = [1 - np.mean(between[0][1:3]), between[1][0] - (1 + between[1][2]) / 2, between[3][0] - np.mean(between[3][1:3])]
    np.testing.assert_allclose(metric.per_picture(), expected, atol=1e-5)
    assert metric.higher_is_better is False
    metric.reset()
    metric.update([reference], reference, [])
    assert np.isnan(metric.per_picture()).all()
