"""Weight decay's groups and the learning rate's schedule."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from vfi.config import presets
from vfi.config.configs import OptimConfig
from vfi.model.interpolator import FrameInterpolator
from vfi.training.optimizer import Muon, annealing, build_optimizer, carry_over, freeze, learning_rate, orthogonalized


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


def muon(*parameters, lr=0.1, weight_decay=0.0):
    """All parameters in the group that is orthogonalised, and an empty one for AdamW."""
    groups = [{"params": list(parameters), "orthogonal": True}, {"params": [], "orthogonal": False}]
    return Muon(groups, lr=lr, weight_decay=weight_decay)


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (20, 2, 3, 3), (40, 9), (9, 40), (2, 2), (2, 600)])
def test_an_orthogonalized_matrix_has_the_singular_vectors_of_its_source(shape):
    """Reference: the same polynomial of each singular value, in float64."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = weight.double().flatten(1)
    left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ values.diag() @ right
    for given in (weight, weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight.mT.clone().mT):
        (found,) = orthogonalized([given])
        assert found.shape == weight.shape
        assert (found.double().flatten(1) - expected).norm() < 1e-5 * expected.norm()
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_matrices_of_one_shape_do_not_mix():
    first, second, other = torch.randn(5, 8), torch.randn(5, 8), torch.randn(8, 5)
    together = orthogonalized([first, other, second])
    for found, alone in zip(together, (first, other, second), strict=True):
        assert torch.allclose(found, orthogonalized([alone])[0], atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon to compare with")
def test_muon_steps_as_torch_does():
    """PyTorch's Muon multiplies in bf16, which is most of the difference."""
    weight = torch.randn(24, 40)
    own, theirs = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    optimizer = muon(own, weight_decay=0.01)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(24, 40)
        own.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert (own - theirs).norm() < 0.03 * (own - weight).norm()
    assert (own - weight).square().mean().sqrt() > 0.01


def test_muon_and_adamw_each_take_their_own_parameters():
    model = FrameInterpolator(presets.tiny().model)
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert sum(map(len, groups)) == len(names)
    assert set().union(*groups) == set(names.values())
    assert [(group["orthogonal"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (True, 0.1), (False, 0.1), (False, 0.0)
    ]  # fmt: skip
    assert any(name.endswith("in_proj.weight") for name in groups[0])
    assert {name.split(".")[-2] for name in groups[1]} == {"conv1d", "conv"}  # depthwise, and over channels


def test_adamw_in_muon_is_adamw():
    """The groups that are not orthogonalised take exactly the steps of torch's AdamW."""
    start = torch.randn(7)
    own, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    matrix = torch.nn.Parameter(torch.randn(3, 3))
    groups = [{"params": [matrix], "orthogonal": True}, {"params": [own], "orthogonal": False}]
    optimizer, reference = Muon(groups, lr=0.1, weight_decay=0.01), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
    for _ in range(3):
        gradient = torch.randn(7)
        own.grad, theirs.grad, matrix.grad = gradient.clone(), gradient.clone(), torch.randn(3, 3)
        optimizer.step()
        reference.step()
    assert torch.equal(own, theirs)


def test_a_step_that_is_skipped_on_the_device_changes_nothing():
    weight = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = muon(weight, weight_decay=0.5)
    weight.grad = torch.randn(4, 6)
    optimizer.step()
    before, average = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    weight.grad = torch.full((4, 6), math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["exp_avg"], average)
    weight.grad, optimizer.found_inf = torch.ones(4, 6), torch.tensor(0.0)
    optimizer.step()
    moved = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(before)
    optimizer.state[weight]["exp_avg"].copy_(average)
    del optimizer.found_inf
    optimizer.step()
    assert torch.equal(weight, moved)


@pytest.mark.gpu
def test_the_captured_update_is_the_eager_one():
    """Also where a step is skipped on the device, where the rate changes, and after the state has been loaded from a copy."""

    def trained(captures: bool) -> list[torch.Tensor]:
        model = FrameInterpolator(presets.tiny().model, torch.device("cuda"))
        model.load_state_dict(start)
        optimizer = build_optimizer(model, OptimConfig(optimizer="muon", weight_decay=0.1), cuda_graphs=captures)
        random = torch.Generator("cuda").manual_seed(0)
        replays = 0
        for step in range(9):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=random, device="cuda")
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.found_inf = torch.tensor(float(step == 4), device="cuda")
            if step == 4:
                next(model.parameters()).grad.fill_(math.nan)
            if step == 6:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
            replays += optimizer._captured is not None and optimizer._captured[1] is not None
        assert replays == (7 if captures else 0)  # all but the first, and the first after loading
        return [parameter.detach() for parameter in model.parameters()]

    start = FrameInterpolator(presets.tiny().model).state_dict()
    for captured, eager in zip(trained(True), trained(False), strict=True):
        assert torch.equal(captured, eager)


def test_muon_goes_on_from_its_saved_state():
    def trained(steps, optimizer, weight):
        for step in steps:
            weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    weight = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = muon(weight)
    trained(range(3), optimizer, weight)
    other = torch.nn.Parameter(weight.detach().clone())
    resumed = muon(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(range(3, 6), optimizer, weight)
    trained(range(3, 6), resumed, other)
    assert torch.equal(weight, other)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
