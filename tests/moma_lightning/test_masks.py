import pytest
import torch

from moma_lightning.models.mask_estimation import average_maps, estimate_mask, find_label_tokens, min_max
from moma_lightning.models.masks import MaskPyramid, kept_positions, layer_size, log_bias, mask_weight, resize_mask


@pytest.mark.parametrize("latents, level, expected", [((8, 8), 16, (4, 4)), ((6, 12), 18, (3, 6)), ((7, 5), 12, (4, 3)), ((64, 64), 64, (8, 8))])
def test_layer_size_halves_and_rounds_up_as_the_unet_does(latents, level, expected):
    assert layer_size(level, *latents) == expected


def test_layer_size_refuses_a_length_that_no_halving_gives():
    with pytest.raises(ValueError, match="no halving of 8x8 latents has 15"):
        layer_size(15, 8, 8)


def test_a_one_pixel_subject_keeps_weight_at_every_resolution():
    mask = torch.zeros(1, 1, 512, 512)
    mask[..., 300, 200] = 1
    pyramid = MaskPyramid(mask, (64, 64))
    for positions in (4096, 1024, 256, 64):
        bias, alive = log_bias(pyramid.weight(positions))
        assert alive.item() == 1 and torch.isfinite(bias).sum() == 1
        index, weight = pyramid.kept(positions)
        assert index.shape == (1, 1) and weight.item() == pyramid.weight(positions).max() > 0


def test_kept_positions_are_in_order_and_rows_filled_up_without_repeats():
    weight = torch.tensor([[0, 0.5, 0, 1, 0.1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    index = kept_positions(weight)
    assert index.shape == (3, 3) and index[0].tolist() == [1, 3, 4] and index[1, 0] == 4
    assert all(len(set(row)) == 3 for row in index.tolist())
    assert weight.gather(1, index).count_nonzero(1).tolist() == [3, 1, 0]
    assert kept_positions(torch.zeros(2, 5)).shape == (2, 1)


@pytest.mark.parametrize("row", [[0, 0.5, 0, 1, 0.1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, -1, float("nan"), 0.5, 0]])
def test_one_row_keeps_what_it_keeps_among_others(row):
    """One row is looked through in another way than several."""
    weight = torch.tensor([row], dtype=torch.float32)
    assert torch.equal(kept_positions(weight), kept_positions(weight.expand(2, -1))[:1])


def test_resize_is_the_area_average():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :1] = 1
    assert resize_mask(mask, (2, 2)).flatten().tolist() == [0.5, 0, 0, 0]


def test_mask_weight_at_the_three_strengths():
    mask = torch.tensor([0.0, 0.25, 1.0])
    assert mask_weight(mask, 1.0).tolist() == [0.0, 0.25, 1.0]
    assert mask_weight(mask, 0.5).tolist() == [0.5, 0.625, 1.0]
    assert mask_weight(mask, 0.0).tolist() == [1.0, 1.0, 1.0]


def test_min_max_is_per_sample_and_a_constant_map_is_zero():
    maps = torch.stack([torch.arange(4.0), 100 + torch.arange(4.0), torch.ones(4)])
    scaled = min_max(maps)
    assert torch.equal(scaled[0], scaled[1]) and scaled[0].max() == 1
    assert (scaled[2] == 0).all()


def test_estimate_mask_against_a_plain_formula():
    torch.manual_seed(0)
    maps = {1: torch.rand(2, 16), 3: torch.rand(2, 4)}
    estimated = estimate_mask(maps, (4, 4), threshold=0.2)
    for row in range(2):
        scaled = [(m[row] - m[row].min()) / (m[row].max() - m[row].min()) for m in maps.values()]
        small = torch.nn.functional.interpolate(scaled[1].view(1, 1, 2, 2), (4, 4), mode="bilinear")[0, 0]
        mean = (scaled[0].view(4, 4) + small) / 2
        mean = (mean - mean.min()) / (mean.max() - mean.min())
        mean = torch.where(mean <= 0.2, 0, mean)
        expected = (mean - mean.min()) / (mean.max() - mean.min())
        torch.testing.assert_close(estimated[row, 0], expected)


def test_maps_of_each_head_are_averaged():
    """Of layers alike, of other numbers of heads, and beside maps that are averaged already."""
    heads = {1: torch.rand(2, 3, 16), 3: torch.rand(2, 3, 16), 5: torch.rand(2, 3, 4)}
    averaged = {i: m.mean(1) for i, m in heads.items()}
    for given in (heads, heads | {3: averaged[3]}, {1: heads[1], 3: heads[3].repeat(1, 2, 1), 5: heads[5]}):
        torch.testing.assert_close(average_maps(given, (4, 4)), average_maps(averaged, (4, 4)))


def test_maps_can_be_trained_through():
    maps = {1: torch.rand(1, 16, requires_grad=True)}
    average_maps(maps, (4, 4)).sum().backward()
    assert torch.isfinite(maps[1].grad).all()


def test_label_tokens_all_occurrences_plural_and_multi_word():
    ids = torch.tensor([[9, 5, 6, 1, 5, 6, 0], [9, 7, 1, 1, 1, 1, 7]])
    found = find_label_tokens(ids, [[5, 6], [7]], ["a", "b"], "toy robot")
    assert found.tolist() == [[0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 1]]


def test_a_prompt_without_the_label_is_named():
    with pytest.raises(ValueError, match="'cat' does not occur in the prompt 'a dog'"):
        find_label_tokens(torch.tensor([[1, 2]]), [[3]], ["a dog"], "cat")
