"""Inputs of an SS2D's core, and the same from operators that are tested on their own, for the tests of each form."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.ops.ssm.causal_conv1d import causal_conv1d
from vfi.ops.ssm.fused_ss2d import Parameters, Shape
from vfi.ops.ssm.scan_order import SCANS
from vfi.ops.ssm.ssd import ssd_reference


class Case(NamedTuple):
    """Frames, heads, and how they are scanned."""

    B: int
    H: int
    W: int
    heads: int
    head_dim: int
    state: int
    scan: str
    dtype: torch.dtype
    precision: str = "fp32"

    @property
    def shape(self) -> Shape:
        return Shape(self.heads, self.head_dim, self.state, {"interleaved": 2, "flip": 1}[self.scan], self.precision)


def plain(projected: Tensor, parameters: Parameters, case: Case) -> Tensor:
    """The same from operators that are tested on their own (test_ops.py, test_scan.py)."""
    shape, scan, p = case.shape, SCANS[case.scan], parameters
    z, xbc, dt = projected.split((shape.inner, shape.channels, shape.heads), dim=-1)
    tokens = F.silu(causal_conv1d(scan.scan(xbc, range(4)), p.conv_weight, p.conv_bias))
    x, B, C = tokens.split((shape.inner, shape.state, shape.state), dim=-1)
    x = x.unflatten(-1, (shape.heads, shape.head_dim))
    y = ssd_reference(x, scan.scan(dt, range(4)), p.A, B.unsqueeze(2), C.unsqueeze(2), p.D, p.dt_bias)
    y = scan.unscan(y.flatten(-2).to(z.dtype), case.B, case.H, case.W, range(4))
    normed = F.rms_norm((y * F.silu(z)).to(p.norm_weight.dtype), (shape.inner,), p.norm_weight, eps=1e-5)
    return normed.sum(0).to(z.dtype)


def made(case: Case, device: str = "cpu", spare: int = 0) -> tuple[Tensor, Parameters, Tensor]:
    """Projected pixels, a slice of rows with `spare` channels more on either side; parameters; a gradient of the output."""
    generator = torch.Generator().manual_seed(sum(case[:6]))
    shape = case.shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    width = shape.inner + shape.channels + shape.heads
    wide = normal(2 * case.B, case.H, case.W, width + 2 * spare).to(device, case.dtype)
    step = torch.exp(torch.rand(shape.heads, generator=generator) * math.log(100) + math.log(1e-3))
    parameters = Parameters(
        conv_weight=0.3 * normal(shape.channels, 4), conv_bias=0.1 * normal(shape.channels),
        A=-1 - 15 * torch.rand(shape.heads, generator=generator), D=normal(shape.heads),
        dt_bias=step + torch.log(-torch.expm1(-step)), norm_weight=1 + 0.1 * normal(shape.inner),
    )  # fmt: skip
    grad = normal(2 * case.B, case.H, case.W, shape.inner).to(device, case.dtype)
    return wide[..., spare : spare + width], Parameters(*(t.to(device) for t in parameters)), grad


def are_no_worse(errors: dict[str, tuple[float, ...]], dtype: torch.dtype) -> bool:
    """Whether no error is larger than that of the plain form, or than an eighth of a rounding to this dtype."""
    return all(ours <= max(theirs, torch.finfo(dtype).eps / 8) for ours, theirs in errors.values())


def results(function: Any, projected: Tensor, parameters: Parameters, grad: Tensor, last: Any) -> list[Tensor]:
    """Output, and the gradients of the pixels and of every parameter."""
    leaves = [t.detach().requires_grad_() for t in (projected, *parameters)]
    y = function(leaves[0], Parameters(*leaves[1:]), last)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def relative_errors(function: Any, case: Case, device: str = "cpu", spare: int = 0) -> dict[str, tuple[float, ...]]:
    """Of output and gradients: that of `function` and that of the plain form, against float64."""
    projected, parameters, grad = made(case, device, spare)
    double = Parameters(*(t.double() for t in parameters))
    exact = results(plain, projected.double(), double, grad.double(), case)
    ours = results(function, projected, parameters, grad, case.shape)
    theirs = results(plain, projected, parameters, grad, case)
    assert ours[0].dtype == case.dtype
    shape, names = case.shape, ("output", "z", "x", "B", "C", "dt", *Parameters._fields)
    widths = (shape.inner, shape.inner, shape.state, shape.state, shape.heads)
    columns = zip(*((t[0], *t[1].split(widths, dim=-1), *t[2:]) for t in (ours, theirs, exact)), strict=True)
    errors = {}
    for name, (our, their, true) in zip(names, columns, strict=True):
        size = true.norm()
        if name == "dt_bias":  # the sum of what dt has, in which much cancels out
            size = exact[1][..., -shape.heads :].flatten(0, 2).abs().sum(0).norm()
        errors[name] = tuple(((t.double() - true).norm() / size).item() for t in (our, their))
    return errors
