"""The fused layer norm against float64: interpreted on the CPU, and compiled on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

HALF, SINGLE = torch.float16, torch.float32
EPS = 1e-5
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def results(function: Any, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and the gradients of all three."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def relative_errors(size: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[tuple[float, float]]:
    """Of output and gradients: that of the kernels and that of plain torch, against float64. Memory begins as NaN."""
    kernels = importlib.import_module("vfi.ops.pointwise.layer_norm_kernels")
    generator = torch.Generator().manual_seed(sum(size))
    x, grad = ((3 + torch.randn(size, generator=generator)).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(size[-1:], generator=generator).to(device) for _ in range(2))

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)

    def unwritten(t: Tensor, *size: Any, **options: Any) -> Tensor:
        return torch.full(size or t.shape, torch.nan, dtype=options.get("dtype", t.dtype), device=t.device)

    exact = results(plain, x.double(), weight.double(), bias.double(), grad.double())
    with mock.patch.object(torch, "empty_like", unwritten), mock.patch.object(torch.Tensor, "new_empty", unwritten):
        ours = results(lambda x, w, b: kernels.layer_norm(x, w, b, EPS), x, weight, bias, grad)
    theirs = results(plain, x, weight, bias, grad)
    assert ours[0].dtype == dtype
    return [
        tuple(((t.double() - true).norm() / true.norm()).item() for t in pair)
        for *pair, true in zip(ours, theirs, exact, strict=True)
    ]


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("size", [(2, 5, 7, 16), (3, 24), (1, 64), (130, 300)], ids=str)
def test_interpreted_against_float64(interpreter, size, dtype):
    """At most twice the error of plain torch, for any number of rows and channels."""
    for ours, theirs in interpreter.submit(relative_errors, size, dtype).result():
        assert ours <= 2 * theirs + 1e-6


def test_what_it_can_not_take_is_refused() -> None:
    kernels = importlib.import_module("vfi.ops.pointwise.layer_norm_kernels")
    with pytest.raises(TypeError, match=r"given torch\.float64"):
        kernels.layer_norm(torch.zeros(2, 4, dtype=torch.float64), torch.ones(4), torch.ones(4), EPS)
    with pytest.raises(ValueError, match=r"must be \[4\]; given \[3\] and \[4\]"):
        kernels.layer_norm(torch.zeros(2, 4), torch.ones(3), torch.ones(4), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 31, 45, 256), (4, 17, 512), (5000, 64), (3, 1, 20)], ids=str)
def test_gpu_against_float64(size, dtype):
    for ours, theirs in relative_errors(size, dtype, "cuda"):
        assert ours <= 2 * theirs + 1e-6
