"""Fused kernels between the convolutions: how they are chosen, and that the network gives the same results with and without."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.config import presets
from vfi.errors import JobError
from vfi.model import refinement
from vfi.model.interpolator import FrameInterpolator, Prediction
from vfi.ops.pointwise.dispatch import FusedOps, select_fused_ops, set_fused_ops
from vfi.ops.warp.warp import backward_warp

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
UNTRIED = "on Tesla T4, of compute capability 7.5, the fused kernels were compiled for fp16 and fp32, but never run"


def bias_prelu(x: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
    y = x + bias.view(-1, 1, 1)
    y = F.prelu(y if residual is None else y + residual, slope)
    return x.copy_(y) if overwrite else y


def concat_channels(parts: Sequence[Tensor], dtype: torch.dtype, shuffled: Tensor | None = None, multiple: int = 8) -> Tensor:
    first = () if shuffled is None else (F.pixel_shuffle(shuffled, 2),)
    stacked = torch.cat([part.to(dtype) for part in (*first, *parts)], dim=1)
    return F.pad(stacked, (0, 0, 0, 0, 0, -stacked.shape[1] % multiple))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


IN_TORCH = FusedOps(bias_prelu, concat_channels, backward_warp, layer_norm)
"""What each kernel promises, in plain torch."""


def network(device: torch.device, backend: str = "auto", **changes: object) -> FrameInterpolator:
    """An initial network whose heads and last convolutions aren't zero, so that everything has an effect."""
    config = presets.override(presets.tiny(), phase=2, teacher=True, pointwise_backend=backend, **changes).model
    torch.manual_seed(0)
    made = FrameInterpolator(config, device)
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape))
    return made


def outcome(model: FrameInterpolator, size: tuple[int, int] = (48, 80)) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What it predicts, with flow and stages, and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(1)
    device = next(model.parameters()).device
    img0, img1, imgt = (torch.rand(2, 3, *size, generator=generator).to(device) for _ in range(3))
    prediction: Prediction = model(img0, img1, torch.tensor([0.5, 0.3], device=device), imgt)
    outputs = [prediction.imgt, prediction.flow_t0, *(stage.merge for stage in prediction.stages), prediction.teacher.merge]
    loss = sum((t.float() - 0.4).square().mean() for t in outputs)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    named = zip(model.named_parameters(), gradients, strict=True)
    return [t.detach() for t in outputs], {name: g for (name, _), g in named if g is not None}


def test_every_module_takes_them_for_the_same_numbers():
    """The paths that kernels take, with what they promise in their place: outputs and every gradient."""
    plain, wired = network(CPU), network(CPU)
    set_fused_ops(wired, IN_TORCH)
    (outputs, gradients), (others, other_gradients) = outcome(plain), outcome(wired)
    assert gradients.keys() == other_gradients.keys()
    for one, other in zip(outputs, others, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
    for name, one in gradients.items():
        assert (other_gradients[name] - one).norm() <= 1e-3 * one.norm() + 1e-9, name


def test_they_are_asked_for_everywhere():
    called = dict.fromkeys(FusedOps._fields, 0)

    def counting(name):
        def call(*args):
            called[name] += 1
            return getattr(IN_TORCH, name)(*args)

        return call

    model = network(CPU)
    set_fused_ops(model, FusedOps(*map(counting, FusedOps._fields)))
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32), torch.tensor([0.5]))
    # 6 stem, 3 x 7 flow, 5 x 3 refinement; 3 stages of flow, 5 levels; 2 a stage, frames and levels; 2 a block and 1 a stage
    assert called == {"bias_prelu": 42, "concat_channels": 8, "backward_warp": 12, "layer_norm": 6}


@pytest.mark.parametrize("band", [64 * 2, 64 * 10, 64 * 22])
def test_large_frames_are_refined_in_bands(monkeypatch, band):
    """Of 2, 10 and 22 rows: what they see above and below makes them the same as the whole."""
    model = network(CPU).eval()
    set_fused_ops(model, IN_TORCH)
    frames = torch.rand(2, 2, 3, 48, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.2])
    with torch.no_grad():
        whole = model(*frames[0], frames[1])
        monkeypatch.setattr(refinement, "_BAND_PIXELS", band)
        parts = model(*frames[0], frames[1])
    torch.testing.assert_close(parts.residual, whole.residual, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parts.imgt, whole.imgt, atol=1e-6, rtol=1e-5)


def test_choice_says_why(monkeypatch):
    assert select_fused_ops("torch", CPU) == (None, "pointwise: torch (asked for)")
    reason = "the fused kernels need a CUDA GPU and the device is cpu"
    assert select_fused_ops("auto", CPU) == (None, f"pointwise: torch ({reason})")
    with pytest.raises(JobError, match=f"fused cannot run: {reason}; use --pointwise_backend auto or torch"):
        select_fused_ops("fused", CPU)
    with pytest.raises(ValueError, match="does not exist; choose from auto, torch, fused"):
        select_fused_ops("triton", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert select_fused_ops("auto", CUDA)[1] == f"pointwise: torch ({UNTRIED})"
    taken, line = select_fused_ops("fused", CUDA)
    assert taken is not None
    assert line == f"pointwise: fused (asked for; {UNTRIED})"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert select_fused_ops("auto", CUDA)[1] == "pointwise: fused (available on cuda)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in select_fused_ops("auto", CUDA)[1]


@pytest.mark.gpu
def test_gpu_network_is_the_same(monkeypatch):
    """fp32 without TF32: outputs and every gradient, in which PReLU's side of a number near zero may differ."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = network(CUDA, "torch", ssd_backend="reference", attention_backend="sdpa")
    fused = network(CUDA, "fused", ssd_backend="fused", attention_backend="fused", ssd_precision="fp32")
    (outputs, gradients), (others, other_gradients) = outcome(plain, (123, 77)), outcome(fused, (123, 77))
    for one, other in zip(outputs, others, strict=True):
        torch.testing.assert_close(other, one, atol=2e-3, rtol=2e-3)
    for name, one in gradients.items():
        assert (other_gradients[name] - one).norm() <= 5e-2 * one.norm() + 1e-8, name


@pytest.mark.gpu
def test_gpu_deterministic_runs_warp_by_torch():
    model = network(CUDA)
    x, flow = torch.rand(1, 8, 9, 11, device=CUDA, requires_grad=True), torch.zeros(1, 2, 9, 11, device=CUDA)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="grid_sampler_2d_backward_cuda does not have a deterministic"):
            model.pointwise.backward_warp(x, flow).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
