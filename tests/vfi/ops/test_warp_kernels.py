"""Fused backward warping against float64: interpreted on the CPU, and compiled on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from vfi.ops.warp.warp import _backward_warp, backward_warp

HALF, SINGLE = torch.float16, torch.float32
# not imported here: the interpreter's process imports this module, too
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Case(NamedTuple):
    B: int
    C: int
    H: int
    W: int
    dtype: torch.dtype
    flow_dtype: torch.dtype = SINGLE


def fused(x: Tensor, flow: Tensor, top: int | None = None) -> Tensor:
    return importlib.import_module("vfi.ops.warp.warp_kernels").backward_warp_fused(x, flow, top)


def made(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Frames, a flow away from whole pixels, where it has no derivative, and a gradient. A fifth looks far outside."""
    B, C, H, W = case[:4]
    generator = torch.Generator().manual_seed(sum(case[:4]))
    x = torch.randn(B, C, H, W, generator=generator).to(memory_format=torch.channels_last)
    grad = torch.randn(B, C, H, W, generator=generator).to(memory_format=torch.channels_last)
    flow = torch.randint(-3, 3, (B, 2, H, W), generator=generator) + 0.1 + 0.8 * torch.rand(B, 2, H, W, generator=generator)
    flow += 50 * torch.randint(-1, 2, (B, 2, H, W), generator=generator) * (torch.rand(B, 1, H, W, generator=generator) < 0.2)
    return x.to(device, case.dtype), flow.to(device, case.flow_dtype), grad.to(device, case.dtype)


def results(
    function: Callable[..., Tensor], x: Tensor, flow: Tensor, grad: Tensor, wanted: tuple[bool, bool] = (True, True)
) -> list[Tensor]:
    """Output and the `wanted` gradients of frames and flow."""
    x, flow = (t.detach().requires_grad_(want) for t, want in zip((x, flow), wanted, strict=True))
    y = function(x, flow)
    return [y.detach(), *torch.autograd.grad(y, [t for t in (x, flow) if t.requires_grad], grad)]


def relative_errors(case: Case, device: str = "cpu") -> list[tuple[float, ...]]:
    """Of output and gradients: that of the kernels and that of the plain form, against float64."""
    x, flow, grad = made(case, device)
    exact = results(_backward_warp, x.double(), flow.double(), grad.double())
    ours, theirs = results(fused, x, flow, grad), results(backward_warp, x, flow, grad)
    assert [t.dtype for t in ours] == [case.dtype, case.dtype, case.flow_dtype]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in ours[:2])
    return [
        tuple(((t.double() - true).norm() / true.norm()).item() if true.any() else t.abs().max().item() for t in pair)
        for *pair, true in zip(ours, theirs, exact, strict=True)
    ]


def unwritten(self: Tensor, *size: Any, **options: Any) -> Tensor:
    return self.new_full(size[0] if isinstance(size[0], torch.Size) else size, torch.nan, **options)


def errors_from_nan(case: Case) -> list[tuple[float, ...]]:
    """`relative_errors` with NaN wherever the kernels do not write."""
    with mock.patch.object(torch.Tensor, "new_empty", unwritten):
        return relative_errors(case)


SMALL = [
    *(Case(2, C, *size, dtype) for C in (3, 8) for size in ((5, 11), (1, 9), (9, 1)) for dtype in (SINGLE, HALF)),
    Case(1, 3, 18, 19, SINGLE),
    Case(1, 8, 18, 19, HALF),
    Case(1, 35, 5, 11, SINGLE),
    Case(1, 35, 9, 1, HALF),
    Case(1, 288, 3, 5, HALF),
    Case(1, 8, 5, 11, SINGLE, HALF),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreted_against_float64(interpreter, case):
    """At most twice the error of the plain form; frames in one program and in several, channels at once and in parts."""
    for ours, theirs in interpreter.submit(errors_from_nan, case).result():
        assert ours <= 2 * theirs + 1e-7


def whole_pixels(dtype: torch.dtype, dx: int, dy: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels find, and the same pixels by their numbers; a gradient of the flow at none."""
    x, flow, grad = made(Case(2, 8, 6, 7, dtype))
    flow[:, 0], flow[:, 1] = dx, dy
    rows, columns = (torch.arange(6) + dy).clamp(0, 5), (torch.arange(7) + dx).clamp(0, 6)
    y, d_x, _ = results(fused, x, flow, grad)
    pixels = (7 * rows[:, None] + columns).flatten()
    summed = torch.zeros(2, 8, 6 * 7).index_add_(2, pixels, grad.float().flatten(2)).view_as(x)
    return [y, d_x], [x.flatten(2)[..., pixels].view_as(x), summed]


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (2, 0), (-1, 3), (100, -100)])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_whole_pixels_are_copied(interpreter, dtype, dx, dy):
    """No flow is the identity, to the bit."""
    (y, d_x), (same, summed) = interpreter.submit(whole_pixels, dtype, dx, dy).result()
    assert torch.equal(y, same)
    torch.testing.assert_close(d_x.float(), summed, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def gradients_at_the_border() -> list[Tensor]:
    """Gradients of a flow to exactly the first and last pixels, and just inside of them: by the kernels and the plain form."""
    x, _, grad = made(Case(1, 8, 1, 9, SINGLE))
    flow = torch.zeros(1, 2, 1, 9)
    flow[0, 0, 0] = torch.tensor([0, 0.25, -2, -2.75, 4, 3, 2, 0.75, 0])
    return [results(function, x, flow, grad)[2] for function in (fused, backward_warp)]


def test_the_border_has_no_gradient(interpreter):
    ours, theirs = interpreter.submit(gradients_at_the_border).result()
    torch.testing.assert_close(ours, theirs)
    assert (ours[0, 0, 0] != 0).tolist() == [False, True, False, True, False, False, False, True, False]


def by_rows(case: Case, rows: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Moved as a whole, and so many rows at a time."""
    x, flow, _ = made(case, device)
    with mock.patch.object(torch.Tensor, "new_empty", unwritten):
        parts = [fused(x, flow[:, :, top : top + rows], top) for top in range(0, case.H, rows)]
        return fused(x, flow), torch.cat(parts, dim=2)


@pytest.mark.parametrize("case", [Case(2, 3, 5, 11, SINGLE), Case(2, 8, 18, 19, HALF)], ids=str)
def test_some_rows_are_those_of_the_whole(interpreter, case):
    for rows in (1, 4, case.H):
        whole, parts = interpreter.submit(by_rows, case, rows).result()
        assert torch.equal(whole, parts)


def flows_without_numbers() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, flow, grad = made(Case(1, 8, 5, 11, SINGLE))
    odd = torch.zeros(flow.shape, dtype=torch.bool)
    odd[:, :, ::2, ::3] = True
    finite = results(fused, x, flow.masked_fill(odd, -100), grad)
    values = (torch.nan, torch.inf, -torch.inf, 1e30)
    return odd, finite, [t for value in values for t in results(fused, x, flow.masked_fill(odd, value), grad)]


def test_flows_without_numbers_look_at_the_border(interpreter):
    odd, (y, d_x, d_flow), found = interpreter.submit(flows_without_numbers).result()
    assert all(t.isfinite().all() for t in found)
    assert all(torch.equal(t, d_flow) for t in found[2::3])
    assert (d_flow[odd] == 0).all()
    assert torch.equal(found[0], y)  # NaN as far left or up
    assert torch.equal(found[1], d_x)
    elsewhere = ~odd.any(1, keepdim=True).expand_as(y)
    assert all(torch.equal(t[elsewhere], y[elsewhere]) for t in found[::3])


def repeated() -> list[list[Tensor]]:
    x, flow, grad = made(Case(2, 3, 5, 11, SINGLE))
    return [results(fused, x, flow, grad, wanted) for wanted in ((True, True), (True, True), (True, False), (False, True))]


def test_runs_are_the_same_whichever_gradients_are_wanted(interpreter):
    (y, d_x, d_flow), *others = interpreter.submit(repeated).result()
    for found, expected in zip(others, ([y, d_x, d_flow], [y, d_x], [y, d_flow]), strict=True):
        assert all(map(torch.equal, found, expected))


def of_odd_strides() -> list[tuple[Tensor, ...]]:
    """By the kernels and the plain form, of frames, flows and gradients that are not dense or not channels-last."""
    x, flow, grad = made(Case(2, 8, 5, 11, SINGLE))
    sliced = torch.cat((x, x), dim=1)[:, 4:12]
    across = flow.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    inputs = [
        (x.contiguous(), flow, grad.contiguous()),
        (sliced, across, grad),
        (x, across[:1].expand_as(flow), grad[:1, :1, :1, :1].expand_as(grad)),
    ]
    return [pair for given in inputs for pair in zip(results(fused, *given), results(backward_warp, *given), strict=True)]


def test_any_strides(interpreter):
    for ours, theirs in interpreter.submit(of_odd_strides).result():
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_do_not_take():
    x, flow = torch.zeros(1, 3, 4, 5), torch.zeros(1, 2, 4, 5)
    with pytest.raises(TypeError, match=r"bf16, fp16 or fp32 and was given torch.float64"):
        fused(x.double(), flow)
    with pytest.raises(TypeError, match=r"a flow in torch.float64"):
        fused(x, flow.double())
    with pytest.raises(ValueError, match=r"must be \[1, 2, 4, 5\]"):
        fused(x, flow.mT)
    with pytest.raises(ValueError, match="4 rows from 1 on are not in a map of 4 rows"):
        fused(x, flow, 1)
    with pytest.raises(NotImplementedError, match="some rows has no gradients"):
        fused(x.requires_grad_(), flow[:, :, 1:], 1)


LARGE = [(2, 64, 123, 77), (1, 3, 270, 480), (1, 515, 20, 24), (2, 35, 64, 64), (1, 128, 33, 40)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16, HALF])
def test_against_float64(monkeypatch, shape, dtype):
    """At most twice the error of the plain form, no place unwritten; output and gradient of the flow the same each time."""
    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
    case = Case(*shape, dtype)
    for ours, theirs in relative_errors(case, "cuda"):
        assert ours <= 2 * theirs + 1e-6
    whole, parts = by_rows(case, 7, "cuda")
    assert torch.equal(whole, parts)
    first, second = (results(fused, *made(case, "cuda")) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_flows_without_numbers_on_a_gpu(value):
    x, flow, grad = made(Case(2, 64, 33, 40, HALF), "cuda")
    flow[:, :, ::3, ::2] = value
    assert all(t.isfinite().all() for t in results(fused, x, flow, grad))
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_frame_of_more_than_two_to_the_31_elements():
    x = torch.empty(1, 32, 8200, 8200, dtype=HALF, device="cuda", memory_format=torch.channels_last).normal_()
    assert torch.equal(fused(x, torch.zeros(1, 2, 1, 1, device="cuda").expand(1, 2, 8200, 8200)), x)
