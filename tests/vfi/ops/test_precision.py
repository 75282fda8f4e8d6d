"""Each fp32 island: half-precision inputs under autocast give the fp32 result, and would not without the island."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from ss2d_cases import Case, made
from torch import Tensor

from vfi.config.configs import ModelConfig
from vfi.metrics import image_quality
from vfi.model import hyper_connections, ss2d
from vfi.ops.loss import laplacian
from vfi.ops.ssm import blocked_ss2d, selective_scan, ssd
from vfi.ops.warp import warp


def ssd_case() -> tuple[Callable[..., Any], list[Tensor]]:
    x, B, C = torch.randn(1, 96, 2, 4), torch.randn(1, 96, 1, 8), torch.randn(1, 96, 1, 8)
    return ssd.ssd_reference, [x, torch.randn(1, 96, 2), -torch.rand(2) - 0.5, B, C, torch.ones(2), torch.zeros(2)]


def blocked_case() -> tuple[Callable[..., Any], list[Tensor]]:
    case = Case(1, 5, 7, 2, 16, 16, "interleaved", torch.float32)
    projected, parameters, _ = made(case)
    return functools.partial(blocked_ss2d.blocked_ss2d, parameters=parameters, shape=case.shape), [projected]


def selective_scan_case() -> tuple[Callable[..., Any], list[Tensor]]:
    x, dt, B, C = torch.randn(1, 40, 6), torch.randn(1, 40, 6), torch.randn(1, 40, 4), torch.randn(1, 40, 4)
    return selective_scan.selective_scan_reference, [x, dt, -torch.rand(6, 4) - 0.5, B, C, torch.ones(6), torch.zeros(6)]


def norm_case() -> tuple[Callable[..., Any], list[Tensor]]:
    return ss2d.GatedRMSNorm(32, groups=2), [torch.randn(2, 5, 32), torch.randn(2, 5, 32)]


def mixing_case(kind: str) -> tuple[Callable[..., Any], list[Tensor]]:
    config = ModelConfig(mixing=kind)  # type: ignore[arg-type]
    coefficients = hyper_connections.MixingCoefficients(8, branches=2, index=0, config=config)
    with torch.no_grad():
        for parameter in coefficients.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return coefficients, [torch.randn(2, 3, 3, 4, 8)]


def warp_case() -> tuple[Callable[..., Any], list[Tensor]]:
    return warp.backward_warp, [torch.rand(1, 2, 6, 300), 3 * torch.randn(1, 2, 6, 300)]


def resize_case() -> tuple[Callable[..., Any], list[Tensor]]:
    return functools.partial(warp.resize_flow, size=(9, 31)), [100 * torch.randn(1, 2, 12, 20)]


def loss_case() -> tuple[Callable[..., Any], list[Tensor]]:
    return laplacian.laplacian_loss, [torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)]


CASES: dict[str, tuple[ModuleType, Callable[[], tuple[Callable[..., Any], list[Tensor]]]]] = {
    "SSD core": (ssd, ssd_case),
    "SS2D on a CPU": (blocked_ss2d, blocked_case),
    "Mamba-1 core": (selective_scan, selective_scan_case),
    "gated norm": (ss2d, norm_case),
    "Sinkhorn": (hyper_connections, functools.partial(mixing_case, "mhc")),
    "permutation mixing": (hyper_connections, functools.partial(mixing_case, "mhc_lite")),
    "free mixing": (hyper_connections, functools.partial(mixing_case, "hc")),
    "warp": (warp, warp_case),
    "resized flow": (warp, resize_case),
    "loss": (laplacian, loss_case),
}


def outputs(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        result = function(*inputs)
    return [result] if isinstance(result, Tensor) else list(result)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", CASES)
def test_island(name, dtype, monkeypatch):
    module, case = CASES[name]
    torch.manual_seed(0)
    function, inputs = case()
    half = [tensor.to(dtype) for tensor in inputs]
    exact = outputs(function, [tensor.float() for tensor in half])
    with torch.autocast("cpu", dtype=dtype):
        inside = outputs(function, half)
    for found, expected in zip(inside, exact, strict=True):
        assert torch.equal(found, expected.to(found.dtype))

    monkeypatch.setattr(module, "fp32_island", lambda inner, *args, **kwargs: inner(*args, **kwargs))
    with torch.autocast("cpu", dtype=dtype):
        try:
            without = outputs(function, half)
        except NotImplementedError:  # in half precision there is no such operator
            return
    same = [a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(without, inside, strict=True)]
    assert not all(same), "the island makes no difference"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["psnr", "ssim_matlab"])
def test_metrics_compute_without_autocast(name, dtype, monkeypatch):
    """Their operators are of those that autocast leaves alone today; so it is seen whether it is off."""
    inner, seen = getattr(image_quality, f"_{name}"), []

    def spy(prediction, truth):
        seen.append((torch.is_autocast_enabled("cpu"), prediction.dtype))
        return inner(prediction, truth)

    monkeypatch.setattr(image_quality, f"_{name}", spy)
    with torch.autocast("cpu", dtype=dtype):
        getattr(image_quality, name)(*torch.rand(2, 1, 3, 16, 16).to(dtype))
    assert seen == [(False, torch.float32)]
