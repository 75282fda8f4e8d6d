"""The running mean of the weights against its recurrence in plain Python numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vfi.training.ema import Ema


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def numbers(tensors) -> list[float]:
    return [value for tensor in tensors for value in tensor.flatten().tolist()]


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_the_recurrence(decay):
    model = layers()
    ema = Ema(model, decay)
    expected = numbers(model.parameters())
    for n in range(1, 41):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = [d * mean + (1 - d) * weight for mean, weight in zip(expected, numbers(model.parameters()), strict=True)]
    assert ema.updates == 40
    assert numbers(ema.average.values()) == pytest.approx(expected, abs=2e-6)


def test_weights_are_a_state_dict_with_the_average_in_it():
    model = layers()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model[1].running_mean.fill_(7)
    ema.update()
    weights = ema.weights()
    assert list(weights) == list(model.state_dict())
    assert torch.equal(weights["1.running_mean"], torch.full((2,), 7.0))
    assert torch.equal(weights["0.weight"], ema.average["0.weight"])
    assert not torch.equal(weights["0.weight"], model[0].weight)


def test_in_place_gives_the_average_and_then_every_bit_back():
    model = layers()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    ema.update()
    own = {name: tensor.clone() for name, tensor in model.named_parameters()}
    parameters = list(model.parameters())
    for error in (None, ValueError("a validation that fails")):
        try:
            with ema.in_place():
                assert all(torch.equal(parameter, ema.average[name]) for name, parameter in model.named_parameters())
                if error:
                    raise error
        except ValueError:
            assert error
        assert all(torch.equal(parameter, own[name]) for name, parameter in model.named_parameters())
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_it_goes_on_from_what_was_saved_bit_for_bit():
    model = layers()
    whole = Ema(model, 0.999)
    saved: dict[str, torch.Tensor] = {}
    for n in range(6):
        if n == 3:
            saved = {name: tensor.clone() for name, tensor in whole.weights().items()}
            again = Ema(model, 0.999)
            again.load(saved, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        whole.update()
        if n >= 3:
            again.update()
    assert again.updates == whole.updates
    assert all(torch.equal(again.average[name], tensor) for name, tensor in whole.average.items())


def test_the_average_of_what_stands_still_stands_still():
    """A frozen part keeps its weights to the last bit."""
    model = layers()
    ema = Ema(model, 0.999)
    for _ in range(20):
        ema.update()
    assert all(torch.equal(ema.average[name], parameter) for name, parameter in model.named_parameters())


def test_half_precision_weights_are_averaged_in_fp32():
    model = layers().to(torch.bfloat16)
    ema = Ema(model, 0.999)
    with torch.no_grad():
        model[0].weight.fill_(1)
    before = ema.average["0.weight"].clone()
    for _ in range(3):
        ema.update()
    assert ema.average["0.weight"].dtype == torch.float32
    assert not torch.equal(ema.average["0.weight"], ema.average["0.weight"].bfloat16().float())
    assert torch.all(ema.average["0.weight"] >= before)
