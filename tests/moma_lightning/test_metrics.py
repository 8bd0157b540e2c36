import numpy as np
import pytest
import torch

from moma_lightning.metrics import EmbeddingMatch, SampleMean


def measured(predicted, target, batch=7, **options):
    metric = EmbeddingMatch(**options)
    for number, start in enumerate(range(0, len(target), batch)):
        metric.update(predicted[start : start + batch], target[start : start + batch], number)
    return {name: value.item() for name, value in metric.compute().items()}


def test_perfect_predictions():
    target = torch.randn(40, 8)
    assert measured(3 * target, target) == pytest.approx({"cosine": 1.0, "r_at_1": 1.0})


def test_equals_a_loop_over_pools():
    torch.manual_seed(0)
    target = torch.randn(50, 4)
    predicted = target + torch.randn(50, 4)
    p, t = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (predicted, target))
    pools = [range(0, 20), range(20, 40)]
    hits = [pool[np.argmax([p[i] @ t[j] for j in pool])] == i for pool in pools for i in pool]
    scores = measured(predicted, target, pool=20)
    assert scores["r_at_1"] == pytest.approx(np.mean(hits))
    assert 0.1 < scores["r_at_1"] < 0.9
    assert scores["cosine"] == pytest.approx(np.mean([a @ b for a, b in zip(p, t, strict=True)]), abs=1e-6)


@pytest.mark.parametrize(("count", "options", "pool"), [(64, {"pool": 32}, 32), (512, {}, 256)])
def test_one_prediction_for_all_finds_one_of_the_pool(count, options, pool):
    """256 where nothing is said, as in stage 1."""
    torch.manual_seed(0)
    target = torch.randn(count, 8)
    assert measured(target.mean(0).expand(count, -1), target, **options)["r_at_1"] == pytest.approx(1 / pool)


def test_a_prediction_of_nothing_finds_nothing():
    assert measured(torch.zeros(10, 8), torch.randn(10, 8))["r_at_1"] == 0.0


@pytest.mark.parametrize("times", [1, 2, 8])
def test_samples_given_again_do_not_make_pools_smaller(times):
    """As several subjects of a picture: 40 in pools of 32, whatever is repeated, and in whichever order."""
    torch.manual_seed(0)
    target = torch.randn(40, 4)
    predicted = target + torch.randn(40, 4)
    given = torch.cat([torch.arange(40), torch.randint(40, (40 * (times - 1),))])
    assert measured(predicted[given], target[given], pool=32)["r_at_1"] == measured(predicted, target, pool=32)["r_at_1"]
    side_by_side = torch.arange(40).repeat_interleave(times)
    assert measured(predicted[side_by_side], target[side_by_side], pool=32)["r_at_1"] == measured(predicted, target, pool=32)["r_at_1"]


def test_pools_are_of_the_batches_numbers_whichever_rank_has_them():
    """Ranks' batches come one rank after the other, and one without samples from a rank that has none to add."""
    torch.manual_seed(0)
    target = torch.randn(40, 4)
    predicted, of_ranks = target + torch.randn(40, 4), EmbeddingMatch(pool=16)
    for number in (0, 2, 4, 1, 3):
        part = slice(8 * number, 8 * number + 8)
        of_ranks.update(predicted[part], target[part], number)
    of_ranks.update(predicted[:0], target[:0], 5)
    scores = {name: value.item() for name, value in of_ranks.compute().items()}
    assert scores == pytest.approx(measured(predicted, target, batch=8, pool=16))
    assert scores["r_at_1"] != measured(predicted.roll(8, 0), target.roll(8, 0), batch=8, pool=16)["r_at_1"], "another order would show"


def test_a_mean_counts_samples_and_keeps_what_is_no_number():
    mean = SampleMean()
    for value, count in ((1.0, 4), (4.0, 2), (9.0, 0)):
        mean.update(torch.tensor(value), count)
    assert mean.compute().item() == 2.0
    mean.update(torch.tensor(float("nan")), 1)
    assert mean.compute().isnan()


def test_a_validation_of_nothing_is_an_error():
    mean, match = SampleMean(), EmbeddingMatch()
    mean.update(torch.tensor(1.0), 0)
    match.update(torch.ones(0, 3), torch.ones(0, 3), 0)
    for metric in (mean, match):
        with pytest.raises(ValueError, match=r"no sample of the validation counts.*bad_samples"):
            metric.compute()


def test_reset_forgets():
    metric = EmbeddingMatch()
    metric.update(torch.randn(4, 3), torch.randn(4, 3), 0)
    metric.reset()
    metric.update(torch.ones(4, 3), torch.ones(4, 3), 0)
    assert metric.compute()["cosine"].item() == pytest.approx(1.0)
