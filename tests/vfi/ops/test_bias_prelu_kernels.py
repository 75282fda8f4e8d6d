"""Fused bias, residual and PReLU against float64: interpreted on the CPU, and compiled on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

HALF, SINGLE = torch.float16, torch.float32
# not imported here: the interpreter's process imports this module, too
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Case(NamedTuple):
    B: int
    C: int
    H: int
    W: int
    with_residual: bool
    dtype: torch.dtype


def fused(*inputs: Tensor | None, **options: bool) -> Tensor:
    return importlib.import_module("vfi.ops.pointwise.bias_prelu_kernels").bias_prelu(*inputs, **options)


def plain(x: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None) -> Tensor:
    v = x + bias.to(x.dtype)[:, None, None]
    return F.prelu(v if residual is None else v + residual, slope.to(x.dtype))


def made(case: Case, device: str = "cpu") -> tuple[list[Tensor | None], Tensor]:
    """x, bias, slope and residual, with slopes of all signs and sums that are zero, and a gradient of the output."""
    generator = torch.Generator().manual_seed(sum(case[:5]))
    x, residual, grad = torch.randn(3, case.B, case.H, case.W, case.C, generator=generator).movedim(-1, 2)
    bias, slope = torch.randn(2, case.C, generator=generator)
    slope[1::3] = 0
    bias[2::4], x[:, 2::4], residual[:, 2::4] = 0, 0, 0
    x, residual, grad = (t.to(device, case.dtype) for t in (x, residual, grad))
    return [x, bias.to(device), slope.to(device), residual if case.with_residual else None], grad


def results(function: Callable[..., Tensor], inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    """Output and gradients of the inputs."""
    inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None], grad)]


def relative_errors(inputs: list[Tensor | None], grad: Tensor) -> list[tuple[float, ...]]:
    """Of output and gradients: that of the kernels and that of the plain form, against float64."""
    exact = results(plain, [t if t is None else t.double() for t in inputs], grad.double())
    ours, theirs = (results(function, inputs, grad) for function in (fused, plain))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in ours if t.ndim == 4)
    return [
        tuple(((t.double() - true).norm() / true.norm().clamp(min=1e-30)).item() for t in pair)
        for *pair, true in zip(ours, theirs, exact, strict=True)
    ]


def unwritten(self: Tensor, *size: int, **options: Any) -> Tensor:
    return self.new_full(size, torch.nan, **options)


def unwritten_like(t: Tensor, **options: Any) -> Tensor:
    return torch.full_like(t, torch.nan, **options)


def errors_from_nan(case: Case, device: str = "cpu") -> list[tuple[float, ...]]:
    """`relative_errors` with NaN wherever the kernels do not write."""
    with mock.patch.object(Tensor, "new_empty", unwritten), mock.patch.object(torch, "empty_like", unwritten_like):
        return relative_errors(*made(case, device))


SMALL = [
    *(Case(2, C, 5, 7, with_residual, HALF) for C in (8, 20, 32, 96) for with_residual in (True, False)),
    *(Case(2, C, 3, 17, with_residual, SINGLE) for C in (8, 20, 32, 96) for with_residual in (True, False)),
    Case(2, 96, 1, 1, True, SINGLE),
    Case(1, 5, 1, 1, False, HALF),
    Case(1, 1, 4, 3, True, SINGLE),
    Case(2, 32, 17, 19, True, SINGLE),
    Case(2, 96, 17, 19, False, HALF),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreted_against_float64(interpreter, case):
    """Channels and pixels that blocks do and do not divide; at most twice the error of the plain form."""
    for ours, theirs in interpreter.submit(errors_from_nan, case).result():
        assert ours <= 2 * theirs + 1e-7


def errors_of_odd_strides() -> list[tuple[float, ...]]:
    case = Case(2, 20, 5, 7, True, SINGLE)
    (x, bias, slope, residual), grad = made(case)
    wide = torch.cat((x, x), 1)[:, 10:30]
    every_other = torch.stack((bias, slope), 1)
    one = grad[:1, :1, :1, :1].expand_as(grad)
    return [
        *relative_errors([x.contiguous(), bias, slope, residual], grad),
        *relative_errors([x, bias, slope, residual.contiguous()], grad.contiguous()),
        *relative_errors([wide, every_other[:, 0], every_other[:, 1], residual.mT.contiguous().mT], one),
    ]


def test_maps_that_are_not_channels_last(interpreter):
    for ours, theirs in interpreter.submit(errors_of_odd_strides).result():
        assert ours <= 2 * theirs + 1e-7


def two_runs(case: Case) -> list[list[Tensor]]:
    return [results(fused, *made(case)) for _ in range(2)]


def test_interpreted_runs_are_the_same(interpreter):
    first, second = interpreter.submit(two_runs, Case(2, 32, 17, 19, True, SINGLE)).result()
    assert all(map(torch.equal, first, second))


def gradients_of_some() -> list[tuple[list[Tensor | None], tuple[bool, ...]]]:
    """What the inputs got as gradients where only some of them were asked for theirs, for each choice."""
    inputs, grad = made(Case(1, 8, 5, 7, True, SINGLE))
    found = []
    for asked in itertools.product((True, False), repeat=4):
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, asked, strict=True)]
        y = fused(*leaves)
        assert y.requires_grad == any(asked)
        if y.requires_grad:
            y.backward(grad)
        found.append(([t.grad for t in leaves], asked))
    return found


def test_frozen_inputs_get_no_gradient(interpreter):
    (every, _), *some = interpreter.submit(gradients_of_some).result()
    for gradients, asked in some:
        for gradient, expected, need in zip(gradients, every, asked, strict=True):
            assert torch.equal(gradient, expected) if need else gradient is None


def test_half_parameters_get_half_gradients(interpreter):
    dtypes = interpreter.submit(dtypes_of_half_parameters).result()
    assert dtypes == [SINGLE, SINGLE, HALF, HALF, SINGLE]


def dtypes_of_half_parameters() -> list[torch.dtype]:
    (x, bias, slope, residual), grad = made(Case(1, 8, 5, 7, True, SINGLE))
    return [t.dtype for t in results(fused, [x, bias.half(), slope.half(), residual], grad)]


def test_no_pixels(interpreter):
    y, dx, d_bias, d_slope = interpreter.submit(results_of_no_pixels).result()
    assert y.shape == dx.shape == (0, 8, 5, 7)
    assert not d_bias.any()
    assert not d_slope.any()


def results_of_no_pixels() -> list[Tensor]:
    return results(fused, *made(Case(0, 8, 5, 7, False, SINGLE)))


def overwritten(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, bool]:
    """As usual, and where x was."""
    inputs, _ = made(case, device)
    inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    usual, place = fused(*inputs), inputs[0].data_ptr()
    found = fused(*inputs, overwrite=True)
    return usual, found, found.data_ptr() == place


@pytest.mark.parametrize("with_residual", [False, True])
def test_the_result_takes_the_place_of_the_map(interpreter, with_residual):
    usual, found, in_place = interpreter.submit(overwritten, Case(2, 24, 5, 7, with_residual, HALF)).result()
    assert torch.equal(usual, found)
    assert in_place


def refused() -> str:
    inputs, _ = made(Case(1, 8, 3, 3, False, torch.float32))
    inputs[1].requires_grad_()
    with pytest.raises(ValueError, match="can't overwrite what its gradients need") as error:
        fused(*inputs, overwrite=True)
    return str(error.value)


def test_what_gradients_need_is_not_overwritten(interpreter):
    assert interpreter.submit(refused).result()


def test_what_the_kernels_do_not_take():
    x, c = torch.zeros(1, 8, 5, 7), torch.zeros(8)
    with pytest.raises(TypeError, match=r"bf16, fp16 or fp32 and was given torch.float64"):
        fused(x.double(), c, c)
    with pytest.raises(TypeError, match=r"residual in torch.float16 for a map in torch.float32"):
        fused(x, c, c, x.half())
    for inputs in ((x[0], c, c), (x, c[:4], c), (x, c, c[:1]), (x, c, c, x[:, :, :1])):
        with pytest.raises(ValueError, match=r"must be \[B, C, H, W\], \[C\], \[C\] and like the map"):
            fused(*inputs)
    with pytest.raises(ValueError, match="runs on a GPU and was given a map on cpu"):
        fused(x, c, c)


LARGE = [
    Case(*size, with_residual, SINGLE)
    for size in ((2, 32, 123, 77), (1, 512, 20, 24), (3, 20, 99, 41), (1, 384, 60, 80), (1, 7, 45, 31), (1, 1000, 9, 8))
    for with_residual in (True, False)
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16, HALF])
def test_against_float64(case, dtype):
    """Output and gradients: at most twice the error of the plain form, no place unwritten, the same each time."""
    case = case._replace(dtype=dtype)
    usual, found, in_place = overwritten(case, "cuda")
    assert torch.equal(usual, found)
    assert in_place
    for ours, theirs in errors_from_nan(case, "cuda"):
        assert ours <= 2 * theirs + 1e-6
    first, second = (results(fused, *made(case, "cuda")) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    """The last frame of a map that int32 could not index, against the same frame alone."""
    inputs, grad = made(Case(1, 64, 256, 256, False, torch.bfloat16), "cuda")
    x, bias, slope, _ = inputs
    many = [t.expand(513, -1, -1, -1).contiguous(memory_format=torch.channels_last) for t in (x, grad)]
    alone, among = results(fused, inputs, grad), results(fused, [many[0], bias, slope, None], many[1])
    for one, every in zip(alone[:2], among[:2], strict=True):
        assert torch.equal(every[-1:], one)
    for one, every in zip(alone[2:], among[2:], strict=True):
        torch.testing.assert_close(every / 513, one, rtol=1e-4, atol=1e-4 * one.abs().max().item())
