"""Weight decay's groups and the learning rate's schedule."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from vfi import presets
from vfi.config import OptimConfig
from vfi.model.interpolator import FrameInterpolator
from vfi.optim import annealing, build_optimizer, carry_over, freeze, learning_rate


def test_groups_hold_every_parameter_once():
    model = FrameInterpolator(presets.tiny().model)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert not decayed & plain
    assert decayed | plain == set(names.values())
    for ending in ("A_log", "D", "dt_bias", "bias", "norm1.weight", "norm.weight"):
        matching = {name for name in names.values() if name.endswith("." + ending)}
        assert matching, ending
        assert matching <= plain, ending
    assert any(name.endswith("in_proj.weight") for name in decayed)
    assert any(name.endswith("conv1d.weight") for name in decayed)


def test_schedule_at_its_corners():
    config = OptimConfig(lr=1e-3, lr_min=1e-4, warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    middle = 10 + 99 / 2
    low, high = math.floor(middle), math.ceil(middle)
    assert (rates[low] + rates[high]) / 2 == pytest.approx((1e-3 + 1e-4) / 2, rel=1e-3)


def test_schedule_agrees_with_torch():
    config = OptimConfig(lr=1e-3, lr_min=1e-5, warmup_steps=0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=49, eta_min=config.lr_min)
    for step in range(50):
        assert learning_rate(step, 50, config) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_warm_up_longer_than_the_run():
    config = OptimConfig(lr=1e-3, warmup_steps=1000)
    assert learning_rate(9, 10, config) == pytest.approx(1e-5)


def test_annealing_rises_over_the_last_part_of_the_steps():
    half = OptimConfig(mhc_anneal=0.5)
    assert [annealing(step, 8, half) for step in range(8)] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1]
    assert [annealing(step, 4, OptimConfig(mhc_anneal=1.0)) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert {annealing(step, 4, OptimConfig()) for step in range(4)} == {0.0}


def test_frozen_module_is_left_out_and_its_neighbour_keeps_its_state():
    """Steps with a frozen part, then with all: the neighbour trains as if nothing had happened, the thawed part from zero."""
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(3, 3), "refine": torch.nn.Linear(3, 3)})
    alone = copy.deepcopy(model["refine"])
    freeze(model["backbone"])
    assert not model["backbone"].training
    config = OptimConfig(lr=0.1)

    def step(optimizer, layer):
        layer(torch.arange(6.0).view(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer, reference = build_optimizer(model, config), build_optimizer(alone, config)
    for _ in range(3):
        step(optimizer, model["refine"])
        step(reference, alone)
    freeze(model["backbone"], frozen=False)
    thawed = build_optimizer(model, config)
    carry_over(optimizer, thawed)
    assert sum(len(group["params"]) for group in thawed.param_groups) == 4
    step(thawed, model["refine"])
    step(reference, alone)
    assert torch.equal(model["refine"].weight, alone.weight)
    assert model["backbone"].weight not in thawed.state
