import math

import pytest
import torch
from torch import nn

from moma_lightning.optim import OptimizerConfig, configure, schedule_factor


def model() -> nn.Module:
    return nn.ModuleDict({"mllm": nn.Linear(3, 3), "mapping": nn.Linear(3, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)})


def group_of(groups, parameter):
    return next(g for g in groups if any(p is parameter for p in g["params"]))


def test_groups_by_multiplier_and_decay():
    parts = model()
    config = OptimizerConfig(lr=1e-2, weight_decay=0.3, lr_multipliers={"^mllm": 0.1})
    optimizer = configure(parts.named_parameters(), config, 10)["optimizer"]
    groups = optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == 4
    assert group_of(groups, parts["mllm"].weight)["lr"] == pytest.approx(1e-3)
    assert group_of(groups, parts["mapping"].weight)["lr"] == pytest.approx(1e-2)
    assert group_of(groups, parts["mapping"].weight)["weight_decay"] == 0.3
    assert group_of(groups, parts["mapping"].bias)["weight_decay"] == 0


def test_the_first_multiplier_that_is_found_counts():
    parts = model()
    config = OptimizerConfig(lr=1.0, lr_multipliers={r"mllm\.bias": 0.5, "mllm": 0.1})
    groups = configure(parts.named_parameters(), config, 10)["optimizer"].param_groups
    assert group_of(groups, parts["mllm"].bias)["lr"] == 0.5
    assert group_of(groups, parts["mllm"].weight)["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(("schedule", "expected"), [
    ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [0.5, 1.0, 1.0, 0.75, 0.5]),
    ("cosine", [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5]),
])
def test_schedule(schedule, expected):
    config = OptimizerConfig(warmup_steps=2, schedule=schedule)
    assert [schedule_factor(step, config, 6) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falling_schedules_end_at_zero_and_stay_there(schedule):
    config = OptimizerConfig(warmup_steps=2, schedule=schedule)
    assert schedule_factor(6, config, 6) == pytest.approx(0)
    assert schedule_factor(9, config, 6) == pytest.approx(0)


def test_the_scheduler_keeps_the_groups_ratio():
    parts = model()
    made = configure(parts.named_parameters(), OptimizerConfig(lr=1.0, warmup_steps=4, lr_multipliers={"mllm": 0.1}), 10)
    assert {round(g["lr"], 6) for g in made["optimizer"].param_groups} == {0.25, 0.025}
    made["optimizer"].step()
    made["lr_scheduler"]["scheduler"].step()
    assert {round(g["lr"], 6) for g in made["optimizer"].param_groups} == {0.5, 0.05}
    assert made["lr_scheduler"]["interval"] == "step"


def test_refuses_a_multiplier_for_nothing():
    with pytest.raises(ValueError, match="'frozen' is found in no trained"):
        configure(model().named_parameters(), OptimizerConfig(lr_multipliers={"frozen": 0.1}), 10)


def test_refuses_a_model_that_is_all_frozen():
    with pytest.raises(ValueError, match="every one is frozen"):
        configure(model().requires_grad_(False).named_parameters(), OptimizerConfig(), 10)


def test_refuses_a_falling_schedule_without_end():
    with pytest.raises(ValueError, match="max_steps"):
        configure(model().named_parameters(), OptimizerConfig(schedule="cosine"), float("inf"))


def test_trains():
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    optimizer = configure(layer.named_parameters(), OptimizerConfig(lr=0.05), 100)["optimizer"]
    x = torch.randn(64, 3)
    y = x.sum(1, keepdim=True)
    first = None
    for _ in range(100):
        loss = (layer(x) - y).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * first
