"""Mathematical functions of the kernels against float64: interpreted on the CPU, and compiled on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def sigmoids(device: str) -> tuple[float, list[float]]:
    """The largest relative error where the result is no denormal number, and the results far out and of NaN."""
    import triton
    import triton.language as tl

    from vfi.ops.triton.math import sigmoid

    globals().update(tl=tl, sigmoid=sigmoid)  # where a kernel looks for them
    kernel = triton.jit(_all_sigmoids)
    far = torch.tensor([-torch.inf, -1e4, -100.0, 0.0, 100.0, 1e4, torch.inf, torch.nan])
    x = torch.cat((torch.linspace(-80, 80, 4088), far)).to(device)
    y = torch.full_like(x, torch.nan)
    kernel[(1,)](x, y, SIZE=4096)
    exact = x.double().sigmoid()
    error = (y.double() - exact).abs() / exact
    return error[:4088].max().item(), y[4088:].tolist()


def _all_sigmoids(x, y, SIZE: tl.constexpr):  # type: ignore[name-defined]  # noqa: F821
    at = tl.arange(0, SIZE)  # type: ignore[name-defined]  # noqa: F821
    tl.store(y + at, sigmoid(tl.load(x + at)))  # type: ignore[name-defined]  # noqa: F821


def check(error: float, far: list[float]) -> None:
    """The error of a power of e grows with the exponent: 80 * 2^-24, and some units in the last place."""
    assert error < 80 * 2**-24 + 4 * 2**-23
    assert far[:-1] == [0, 0, 0, 0.5, 1, 1, 1]  # of -100 the power is too large for fp32
    assert far[-1] != far[-1]


def test_sigmoid_interpreted(interpreter):
    check(*interpreter.submit(sigmoids, "cpu").result())


@pytest.mark.gpu
def test_gpu_sigmoid():
    check(*sigmoids("cuda"))
