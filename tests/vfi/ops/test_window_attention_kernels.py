"""Fused window attention against float64: interpreted on the CPU, and compiled on a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from vfi.ops.attention.window_attention import gated_window_attention

HALF, SINGLE = torch.float16, torch.float32
# not imported here: the interpreter's process imports this module, too
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Case(NamedTuple):
    """What is projected (the gate's width is that of a head), and the windows."""

    B: int
    H: int
    W: int
    heads: int
    head_dim: int
    gate_width: int
    window: int
    shift: int
    dtype: torch.dtype


def plain(projected: Tensor, heads: int, head_dim: int, window: int, shift: int) -> Tensor:
    C = heads * head_dim
    parts = projected.split((C, C, C, projected.shape[-1] - 3 * C), dim=-1)
    q, k, v, gate = (part.unflatten(-1, (heads, -1)) for part in parts)
    return gated_window_attention(q, k, v, gate if gate.numel() else None, window, shift).flatten(-2)


def made(case: Case, device: str = "cpu", spare: int = 0) -> tuple[Tensor, Tensor]:
    """The projection, a slice of rows with `spare` channels more on either side, and a gradient of the output."""
    generator = torch.Generator().manual_seed(sum(case[:8]))
    channels = case.heads * (3 * case.head_dim + case.gate_width)
    wide = torch.randn(case.B, case.H, case.W, channels + 2 * spare, generator=generator)
    grad = torch.randn(case.B, case.H, case.W, case.heads * case.head_dim, generator=generator)
    wide, grad = (t.to(device, case.dtype) for t in (wide, grad))
    return wide[..., spare : spare + channels], grad


def results(function: Callable[..., Tensor], projected: Tensor, grad: Tensor, case: Case) -> list[Tensor]:
    """Output and gradient of the projection."""
    projected = projected.detach().requires_grad_()
    y = function(projected, case.heads, case.head_dim, case.window, case.shift)
    return [y.detach(), *torch.autograd.grad(y, projected, grad)]


def relative_errors(case: Case, projected: Tensor, grad: Tensor) -> list[tuple[float, ...]]:
    """Of output and gradient: that of the kernels and that of the plain form, against float64."""
    kernels = importlib.import_module("vfi.ops.attention.window_attention_kernels")
    exact = results(plain, projected.double(), grad.double(), case)
    ours = results(kernels.gated_window_attention_fused, projected, grad, case)
    theirs = results(plain, projected, grad, case)
    assert [t.dtype for t in ours] == [case.dtype] * 2
    return [
        tuple(((t.double() - true).norm() / true.norm()).item() for t in pair)
        for *pair, true in zip(ours, theirs, exact, strict=True)
    ]


def unwritten(self: Tensor, *size: Any, **options: Any) -> Tensor:
    return self.new_full(size[0] if isinstance(size[0], torch.Size) else size, torch.nan, **options)


def errors_from_nan(case: Case, spare: int = 0) -> list[tuple[float, ...]]:
    """`relative_errors` with NaN wherever the kernels do not write."""
    with mock.patch.object(torch.Tensor, "new_empty", unwritten):
        return relative_errors(case, *made(case, spare=spare))


SMALL = [
    Case(1, 5, 11, 2, 16, 1, 7, 3, SINGLE),
    Case(2, 1, 9, 1, 16, 16, 7, 0, HALF),
    Case(1, 9, 1, 3, 16, 0, 7, 3, HALF),
    Case(1, 16, 16, 1, 32, 32, 8, 4, SINGLE),
    Case(1, 16, 16, 2, 32, 1, 8, 0, HALF),
    Case(1, 5, 11, 1, 64, 1, 8, 4, SINGLE),
    Case(1, 5, 11, 1, 64, 64, 8, 0, HALF),
    Case(1, 9, 1, 2, 16, 1, 14, 7, SINGLE),
    Case(1, 16, 16, 1, 32, 0, 14, 0, SINGLE),
    Case(1, 5, 11, 1, 32, 1, 14, 7, HALF),
    Case(2, 1, 9, 1, 16, 16, 14, 0, HALF),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreted_against_float64(interpreter, case):
    """Sizes that windows do and do not divide, and frames smaller than one; at most twice the error of the plain form."""
    for ours, theirs in interpreter.submit(errors_from_nan, case).result():
        assert ours <= 2 * theirs + 1e-7


@pytest.mark.parametrize("window", [7, 14])
def test_a_slice_of_a_wider_map_is_read_in_place(interpreter, window):
    for ours, theirs in interpreter.submit(errors_from_nan, Case(1, 5, 6, 2, 16, 1, window, 3, HALF), spare=3).result():
        assert ours <= 2 * theirs


def two_runs(case: Case) -> list[list[Tensor]]:
    kernels = importlib.import_module("vfi.ops.attention.window_attention_kernels")
    return [results(kernels.gated_window_attention_fused, *made(case), case) for _ in range(2)]


@pytest.mark.parametrize("window", [7, 14])
def test_interpreted_runs_are_the_same(interpreter, window):
    first, second = interpreter.submit(two_runs, Case(1, 5, 6, 2, 16, 1, window, 3, SINGLE)).result()
    assert all(map(torch.equal, first, second))


def gradients_of_odd_strides() -> list[tuple[Tensor, ...]]:
    """Gradients of the projection, by the kernels and the plain form, for gradients of the output that aren't contiguous."""
    kernels = importlib.import_module("vfi.ops.attention.window_attention_kernels")
    case = Case(2, 5, 6, 2, 16, 1, 7, 3, SINGLE)
    projected, grad = made(case)
    odd = (grad[:1, :1, :1, :1].expand_as(grad), grad.transpose(1, 2).contiguous().transpose(1, 2))
    functions = (kernels.gated_window_attention_fused, plain)
    return [tuple(results(function, projected, g, case)[1] for function in functions) for g in odd]


def test_gradients_that_are_not_contiguous(interpreter):
    for ours, theirs in interpreter.submit(gradients_of_odd_strides).result():
        torch.testing.assert_close(ours, theirs)


def test_what_the_kernels_do_not_take():
    fused = importlib.import_module("vfi.ops.attention.window_attention_kernels").gated_window_attention_fused
    with pytest.raises(TypeError, match=r"bf16, fp16 or fp32 and was given torch.float64"):
        fused(torch.zeros(1, 4, 4, 98, dtype=torch.float64), 2, 16, 4, 0)
    for channels in (96 + 4, 96 + 1, 64):
        with pytest.raises(ValueError, match=f"{channels} channels are not q, k, v and a gate of 2 heads of 16"):
            fused(torch.zeros(1, 4, 4, channels), 2, 16, 4, 0)


LARGE = [
    *(Case(2, 46, 80, 8, 32, gate, window, window // 2, SINGLE) for window in (7, 8, 14) for gate in (0, 1, 32)),
    *(Case(2, 46, 80, 8, 32, 1, window, 0, SINGLE) for window in (7, 8, 14)),
    *(Case(2, 46, 80, 3, head_dim, 1, window, 3, SINGLE) for window in (7, 14) for head_dim in (16, 64)),
]


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """In products. Not by monkeypatch, which would take the name from an object that does not list it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16, HALF])
def test_against_float64(monkeypatch, case, dtype):
    """Output and gradient: at most twice the error of the plain form, no place unwritten, the same each time."""
    kernels = importlib.import_module("vfi.ops.attention.window_attention_kernels")
    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
    case = case._replace(dtype=dtype)
    projected, grad = made(case, "cuda")
    with tf32(False):
        for ours, theirs in relative_errors(case, projected, grad):
            assert ours <= 2 * theirs + 1e-6
        first, second = (results(kernels.gated_window_attention_fused, projected, grad, case) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [8, 14])
def test_a_slice_on_a_gpu(window):
    case = Case(2, 23, 31, 4, 32, 1, window, 4, torch.bfloat16)
    for ours, theirs in relative_errors(case, *made(case, "cuda", spare=5)):
        assert ours <= 2 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("window", [8, 14])
def test_tf32_is_used_where_it_is_allowed(window):
    case = Case(2, 23, 31, 4, 32, 1, window, 4, SINGLE)
    with tf32(True):
        for ours, _ in relative_errors(case, *made(case, "cuda")):
            assert 1e-5 < ours < 2e-3
