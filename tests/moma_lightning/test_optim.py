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


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_defaults_are_ip_adapters_recipe_and_betas_are_handed_on(betas):
    parts = model()
    groups = configure(parts.named_parameters(), OptimizerConfig(betas=betas), math.inf)["optimizer"].param_groups
    own = group_of(groups, parts["mllm"].weight)
    assert (own["lr"], own["weight_decay"], own["betas"], OptimizerConfig().betas) == (1e-4, 0.01, betas, (0.9, 0.999))


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


def trained(config: OptimizerConfig, steps: int, states: list | None = None) -> tuple[list, dict]:
    """The states after some steps, begun from `states`, and what was configured, as Lightning saves and restores them."""
    parts = model()
    made = configure(parts.named_parameters(), config, 10)
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for part, state in zip((optimizer, scheduler), states or [], strict=False):
        part.load_state_dict(state)
    for _ in range(steps):
        sum(parameter.sum() for group in optimizer.param_groups for parameter in group["params"]).backward()
        optimizer.step()
        scheduler.step()
    return [optimizer.state_dict(), scheduler.state_dict()], made


def test_a_training_that_goes_on_has_the_configs_options_and_the_checkpoints_moments():
    first = OptimizerConfig(lr=1.0, weight_decay=0.1, schedule="linear", lr_multipliers={"mllm": 0.5})
    states, _ = trained(first, 4)
    _, same = trained(first, 0, states)
    assert [(g["lr"], g["weight_decay"]) for g in same["optimizer"].param_groups] == [(g["lr"], g["weight_decay"]) for g in states[0]["param_groups"]]
    _, other = trained(OptimizerConfig(lr=0.1, betas=(0.5, 0.6), weight_decay=0.0, schedule="linear", lr_multipliers={"mllm": 0.2}), 0, states)
    optimizer, scheduler = other["optimizer"], other["lr_scheduler"]["scheduler"]
    assert [round(g["lr"], 9) for g in optimizer.param_groups] == [0.012, 0.012, 0.06, 0.06], "six tenths of the new rates, mllm's first"
    assert {(g["betas"], g["weight_decay"]) for g in optimizer.param_groups} == {((0.5, 0.6), 0.0)}
    assert {float(state["step"]) for state in optimizer.state_dict()["state"].values()} == {4.0}
    optimizer.step()
    scheduler.step()
    assert [round(g["lr"], 9) for g in optimizer.param_groups] == [0.01, 0.01, 0.05, 0.05]


def test_groups_have_names_for_logs_that_no_checkpoint_holds():
    """So that one of before has what one of today has."""
    config = OptimizerConfig(lr_multipliers={"^mllm": 0.1})
    states, made = trained(config, 1)
    assert all("name" not in group for group in states[0]["param_groups"])
    _, again = trained(config, 0, states)
    for groups in (made["optimizer"].param_groups, again["optimizer"].param_groups):
        assert [group["name"] for group in groups] == ["^mllm/matrices", "^mllm/vectors", "matrices", "vectors"]


def test_a_checkpoint_of_other_groups_is_refused():
    states, _ = trained(OptimizerConfig(lr_multipliers={"mllm": 0.5}), 1)
    with pytest.raises(ValueError, match="lr_multipliers` are not those that it was trained with"):
        trained(OptimizerConfig(), 0, states)
