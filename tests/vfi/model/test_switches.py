"""Each switch of the network changes the computation that it names, and nothing else.

For every switch: all parameters that are added, removed or reshaped lie in its scope; a module outside the scope that both
networks have gives bitwise the same output for the same weights and inputs; and the prediction differs.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from vfi.config import presets
from vfi.config.configs import ModelConfig
from vfi.model.interpolator import FrameInterpolator

ONE = dataclasses.replace(presets.tiny().model, depths=(2, 2))
MIXED = dataclasses.replace(ONE, mixing="mhc", mixing_streams=2)
GROUPED = dataclasses.replace(ONE, ssd_groups="per_head")
TWO = dataclasses.replace(ONE, phase=2)
TIME = torch.tensor([0.4])


class Switch(NamedTuple):
    start: ModelConfig
    change: dict[str, Any]
    scope: str
    """Names of parameters and modules that may differ, as a regular expression."""
    parameters: bool
    """Do parameters come, go or change shape?"""


SS2D, ATTENTION = r"\.branches\.ss2d\b", r"\.branches\.attention\b"
SWITCHES = [
    Switch(ONE, {"backbone_mode": "mamba2_only"}, ATTENTION, True),
    Switch(ONE, {"backbone_mode": "gated_attn_only"}, SS2D, True),
    Switch(ONE, {"ssm": "mamba1"}, SS2D, True),
    Switch(ONE, {"scan": "flip"}, SS2D, False),
    Switch(ONE, {"d_state": 8}, SS2D, True),
    Switch(ONE, {"expand": 1}, SS2D, True),
    Switch(ONE, {"head_dim": 8}, f"{SS2D}|{ATTENTION}", True),
    Switch(ONE, {"ssd_groups": "per_head"}, SS2D, True),
    Switch(GROUPED, {"xb_share": 2}, SS2D, True),
    Switch(ONE, {"window_size": 7}, ATTENTION, False),
    Switch(ONE, {"window_size": 14}, ATTENTION, False),
    Switch(ONE, {"gate": "elementwise"}, ATTENTION, True),
    Switch(ONE, {"gate": "off"}, ATTENTION, True),
    Switch(ONE, {"use_ecab": False}, r"\.fusion\b", True),
    Switch(ONE, {"mixing": "hc"}, r"\.mixing[12]\b", True),
    Switch(ONE, {"mixing": "mhc"}, r"\.mixing[12]\b", True),
    Switch(ONE, {"mixing": "mhc_lite"}, r"\.mixing[12]\b", True),
    Switch(MIXED, {"mixing_streams": 4}, r"\.mixing[12]\b", True),
    Switch(MIXED, {"mixing_coefficients": "pooled"}, r"\.mixing[12]\b", False),
    Switch(MIXED, {"sinkhorn_iterations": 1}, r"\.mixing[12]\b", False),
    Switch(ONE, {"phase": 2}, r"^flow\b", True),
    Switch(TWO, {"warp": "image"}, "^$", False),
    Switch(TWO, {"warp": "flow_only"}, r"^refine\b", True),
    Switch(TWO, {"scale": 0.5}, "^$", False),
]
# what is not in the table, and why
ELSEWHERE = {
    "width": "the size of everything",
    "depths": "the number of blocks",
    "ssd_precision": "shows under autocast only: test_interpolator.py",
    "ssd_backend": "the same numbers by another program: test_ops.py",
    "pointwise_backend": "the same numbers by another program: test_pointwise.py",
    "attention_backend": "the same numbers by another program: test_ops.py",
    "teacher": "shows in training only: test_flow.py",
}
# compared one by one; what holds them (blocks, stages) holds switched parts, too
PARTS = re.compile(
    r"^backbone\.stem\.\d$|^backbone\.down\.\d$|^backbone\.norms\.\d$|\.norm[12]$|\.branches\.\w+$|\.fusion$"
    r"|^flow\.stages\.\d$|^refine\.(mix|up)\.\d$|^refine\.head$"
)


def build(config: ModelConfig) -> FrameInterpolator:
    """A network in which no weight is special: zeros and ones would hide what depends on them."""
    torch.manual_seed(0)
    model = FrameInterpolator(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def pair(switch: Switch) -> tuple[FrameInterpolator, FrameInterpolator]:
    """Both networks; weights that both have are equal."""
    plain, switched = build(switch.start), build(dataclasses.replace(switch.start, **switch.change))
    have = plain.state_dict()
    shared = {name: have[name] for name, tensor in switched.state_dict().items() if same_shape(have, name, tensor)}
    switched.load_state_dict(shared, strict=False)
    return plain, switched


def same_shape(weights: dict[str, Tensor], name: str, tensor: Tensor) -> bool:
    return name in weights and weights[name].shape == tensor.shape


def recorded(model: FrameInterpolator, *inputs: Tensor) -> tuple[Tensor, dict[str, tuple[tuple, Any]]]:
    """The prediction, and inputs and output of every part on the way."""
    seen: dict[str, tuple[tuple, Any]] = {}
    hooks = [
        module.register_forward_hook(lambda _m, args, output, name=name: seen.update({name: (args, output)}))
        for name, module in model.named_modules()
        if PARTS.search(name)
    ]
    imgt = model(*inputs).imgt
    for hook in hooks:
        hook.remove()
    return imgt, seen


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in tensors(part)]


@torch.no_grad()
@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: str(switch.change))
def test_switch_changes_what_it_names_and_nothing_else(switch):
    plain, switched = pair(switch)
    before, after = plain.state_dict(), switched.state_dict()
    changed = {name for name in before.keys() | after.keys() if name not in after or not same_shape(before, name, after[name])}
    assert bool(changed) == switch.parameters
    assert all(re.search(switch.scope, name) for name in changed)

    inputs = (*torch.rand(2, 1, 3, 123, 77), TIME)
    imgt, seen = recorded(plain, *inputs)
    other, _ = recorded(switched, *inputs)
    assert other.isfinite().all()
    assert other.shape == imgt.shape
    assert not torch.allclose(imgt, other, atol=1e-6), "the switch changes nothing"

    modules: dict[str, nn.Module] = dict(switched.named_modules())
    outside = [name for name in seen if name in modules and not re.search(switch.scope, name)]
    assert any(name.startswith("backbone.stem") for name in outside)
    for name in outside:
        arguments, output = seen[name]
        for one, again in zip(tensors(output), tensors(modules[name](*arguments)), strict=True):
            assert torch.equal(one, again), name


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: str(switch.change))
def test_switched_network_trains(switch):
    """At an odd size every parameter gets a finite gradient, and none is left out."""
    model = build(dataclasses.replace(switch.start, **switch.change)).train()
    prediction = model(*torch.rand(2, 1, 3, 53, 77), TIME)
    loss = (prediction.imgt - 0.5).square().mean() + sum(stage.merge.mean() for stage in prediction.stages)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_table_names_every_setting_of_the_network():
    named = {name for switch in SWITCHES for name in switch.change}
    assert named | ELSEWHERE.keys() == {field.name for field in dataclasses.fields(ModelConfig)}
    assert not named & ELSEWHERE.keys()
