import numpy as np
import pytest
import torch

from moma_lightning import losses


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.randn(5, 7), torch.randn(5, 7)


def test_image_embedding_loss_is_eq_4_over_embed_dim(pair):
    predicted, target = (t.numpy().astype(np.float64) for t in pair)
    squared_norms = [sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) for p, t in zip(predicted, target, strict=True)]
    assert losses.image_embedding_loss(*pair).item() == pytest.approx(np.mean(squared_norms) / 7, rel=1e-6)


def test_image_embedding_loss_is_zero_only_at_the_target(pair):
    target = pair[1]
    assert losses.image_embedding_loss(target, target) == 0
    assert losses.image_embedding_loss(target + 0.1, target).item() == pytest.approx(0.01, rel=1e-4)


def test_image_embedding_loss_feels_length_and_cosine_does_not(pair):
    predicted, target = pair
    assert losses.image_embedding_loss(3 * predicted, target) > losses.image_embedding_loss(predicted, target)
    assert torch.allclose(losses.image_embedding_cosine(3 * predicted, target), losses.image_embedding_cosine(predicted, target))


def test_image_embedding_cosine_is_the_mean_of_the_rows_cosines(pair):
    predicted, target = (t.numpy().astype(np.float64) for t in pair)
    rows = [p @ t / np.sqrt((p @ p) * (t @ t)) for p, t in zip(predicted, target, strict=True)]
    assert losses.image_embedding_cosine(*pair).item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_half_precision_is_not_summed_in_half_precision():
    predicted, target = torch.full((4, 1024), 300.0, dtype=torch.float16), torch.zeros(4, 1024, dtype=torch.float16)
    assert losses.image_embedding_loss(predicted, target).item() == 90000.0


def test_gradient_goes_to_the_prediction(pair):
    predicted, target = pair[0].requires_grad_(), pair[1]
    losses.image_embedding_loss(predicted, target).backward()
    assert torch.allclose(predicted.grad, 2 * (predicted.detach() - target) / predicted.numel(), atol=1e-7)


def test_image_embedding_cosine_loss_is_half_the_squared_distance_of_unit_vectors(pair):
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in pair]
    assert losses.image_embedding_cosine_loss(*pair).item() == pytest.approx(((unit[0] - unit[1]) ** 2).sum(-1).mean().item() / 2, rel=1e-5)


def test_weighted_noise_losses_are_weighted_means_of_the_plain_errors():
    predicted, target, weight = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.rand(3, 1, 5, 6)
    errors = ((predicted - target) ** 2).mean(1).numpy()
    expected = [np.average(error, weights=w[0].numpy()) for error, w in zip(errors, weight, strict=True)]
    np.testing.assert_allclose(losses.noise_prediction_losses(predicted, target, weight), expected, rtol=1e-5)
    constant = losses.noise_prediction_losses(predicted, target, torch.full((3, 1, 5, 6), 7.0))
    torch.testing.assert_close(constant, losses.noise_prediction_losses(predicted, target))


def test_min_snr_weight_is_the_papers_for_noise_prediction():
    alphas = torch.tensor([0.999, 0.9, 0.5, 0.01])
    expected = [min(a / (1 - a), 5.0) / (a / (1 - a)) for a in alphas.tolist()]
    np.testing.assert_allclose(losses.min_snr_weight(alphas, 5.0), expected, rtol=1e-4)
    assert losses.min_snr_weight(alphas, 5.0)[2:].tolist() == pytest.approx([1, 1])
