"""Fused kernels of the training loss against PyTorch's operators in float64: interpreted on the CPU, and compiled on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from vfi.errors import JobError
from vfi.ops.loss import laplacian
from vfi.ops.loss.laplacian import LEVELS, choose_loss, laplacian_loss

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
Size = tuple[int, ...]


def kernels() -> Any:
    """Not imported with this file, which the interpreter's process imports, too."""
    return importlib.import_module("vfi.ops.loss.laplacian_kernels")


def unwritten(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
    dtype = dtype or self.dtype
    filling = torch.nan if dtype.is_floating_point else 77
    return self.new_full(size if isinstance(size[0], int) else size[0], filling, dtype=dtype, **rest)


def results(function: Callable[[Tensor], Tensor], images: Tensor) -> list[Tensor]:
    """Sizes, and the gradient where each counts differently."""
    images = images.detach().requires_grad_()
    sizes = function(images)
    weights = torch.arange(1, len(sizes) + 1, dtype=sizes.dtype, device=sizes.device)
    return [sizes.detach(), *torch.autograd.grad((weights * sizes).sum(), images)]


def plain(images: Tensor) -> Tensor:
    return laplacian_loss(images, torch.zeros_like(images[0]), "torch")


def relative_errors(size: Size, device: str = "cpu", block: int | None = None) -> list[tuple[float, float]]:
    """Of sizes and gradient: that of the kernels and that of PyTorch, against float64. Memory begins as NaN."""
    module = kernels()
    images = torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(device)
    options = {"BLOCK": block} if block else {}
    with mock.patch.object(Tensor, "new_empty", unwritten), mock.patch.dict(module._DEFAULT, options):
        ours = results(lambda images: module.pyramid_sizes(images, LEVELS), images)
    theirs, exact = results(plain, images), results(plain, images.double())
    assert [t.shape for t in ours] == [t.shape for t in exact]
    return [
        tuple(((t.double() - true).norm() / true.norm()).item() for t in pair)
        for *pair, true in zip(ours, theirs, exact, strict=True)
    ]


@pytest.mark.parametrize("size", [(2, 1, 1, 64, 66), (1, 1, 2, 75, 67)], ids=str)
def test_interpreted_against_float64(interpreter, size):
    """Even and odd sides at every level; blocks that do not fit."""
    for ours, theirs in interpreter.submit(relative_errors, size, block=4096).result():
        assert ours <= 2 * theirs + 1e-7


def test_what_they_can_not_take_is_refused() -> None:
    with pytest.raises(TypeError, match=r"given \[1, 1, 1, 64, 64\] in torch\.float64"):
        kernels().pyramid_sizes(torch.zeros(1, 1, 1, 64, 64, dtype=torch.float64), LEVELS)
    with pytest.raises(ValueError, match=r"sides of at least 64, not \[63, 64\]"):
        kernels().pyramid_sizes(torch.zeros(1, 1, 1, 63, 64), LEVELS)


def test_choice(monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert choose_loss("torch", cpu) == (False, "loss: torch (asked for)")
    assert choose_loss("auto", cpu) == (False, "loss: torch (the fused kernels need a CUDA GPU and the device is cpu)")
    with pytest.raises(JobError, match=r"loss_backend fused cannot run: .* is cpu; use --loss_backend auto or torch"):
        laplacian_loss(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), "fused")


@pytest.mark.parametrize("several", [(), (3,)])
def test_the_loss_takes_them_where_they_can_run(monkeypatch, several) -> None:
    """fp32 as it is and half precision raised to it; float64 stays with PyTorch."""
    given = list[Tensor]()

    def sizes(images: Tensor, levels: int) -> Tensor:
        given.append(images)
        assert levels == LEVELS
        return images.flatten(1).sum(1)

    monkeypatch.setattr(laplacian, "choose_loss", lambda backend, device: (True, ""))
    monkeypatch.setattr(kernels(), "pyramid_sizes", sizes)
    prediction, truth = torch.rand(*several, 2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    found = laplacian_loss(prediction, truth)
    assert given[0].shape == (*(several or (1,)), 2, 3, 64, 64)
    torch.testing.assert_close(found, (prediction - truth).flatten(-4).sum(-1))
    laplacian_loss(prediction.bfloat16(), truth.bfloat16())
    assert given[1].dtype == torch.float32
    laplacian_loss(prediction.double(), truth.double())
    assert len(given) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(4, 2, 3, 256, 256), (1, 3, 3, 75, 131), (2, 1, 1, 64, 1030)], ids=str)
def test_gpu_against_float64(size):
    for ours, theirs in relative_errors(size, "cuda"):
        assert ours <= 2 * theirs + 1e-7


@pytest.mark.gpu
def test_gpu_gives_the_same_each_time():
    images = torch.randn(4, 2, 3, 128, 192, device="cuda")
    first, second = (results(lambda images: kernels().pyramid_sizes(images, LEVELS), images) for _ in range(2))
    assert all(map(torch.equal, first, second))
