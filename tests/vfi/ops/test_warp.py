"""Backward warping and resized flows, against loops in float64 and whole-pixel shifts."""

from __future__ import annotations

import math

import pytest
import torch

from vfi.ops.warp.warp import backward_warp, clamp_to_border, resize_flow


def warp_by_pixel(x, flow):
    """Bilinear look-up of every pixel, in float64."""
    B, C, H, W = x.shape
    y = torch.empty(B, C, H, W, dtype=torch.float64)
    for b in range(B):
        for row in range(H):
            for column in range(W):
                across = min(max(column + flow[b, 0, row, column].item(), 0), W - 1)
                down = min(max(row + flow[b, 1, row, column].item(), 0), H - 1)
                left, top = min(math.floor(across), max(W - 2, 0)), min(math.floor(down), max(H - 2, 0))
                right, bottom = min(left + 1, W - 1), min(top + 1, H - 1)
                a, d = across - left, down - top
                upper = (1 - a) * x[b, :, top, left] + a * x[b, :, top, right]
                lower = (1 - a) * x[b, :, bottom, left] + a * x[b, :, bottom, right]
                y[b, :, row, column] = (1 - d) * upper + d * lower
    return y


@pytest.mark.parametrize("size", [(7, 9), (1, 5), (6, 1)])
def test_warp_by_pixel(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    flow = 3 * torch.randn(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(backward_warp(x, flow), warp_by_pixel(x, flow))


@pytest.mark.parametrize(("top", "rows"), [(0, 3), (2, 4), (6, 1), (0, 7)])
def test_some_rows_are_those_of_the_whole(top, rows):
    x, flow = torch.randn(2, 3, 7, 9, dtype=torch.float64), 3 * torch.randn(2, 2, 7, 9, dtype=torch.float64)
    some = slice(top, top + rows)
    torch.testing.assert_close(backward_warp(x, flow[:, :, some], top), warp_by_pixel(x, flow)[:, :, some])


def test_rows_that_are_not_there():
    x, flow = torch.zeros(1, 3, 7, 9), torch.zeros(1, 2, 4, 9)
    for top in (-1, 4):
        with pytest.raises(ValueError, match=f"4 rows from {top} on are not in a map of 7 rows"):
            backward_warp(x, flow, top)
    with pytest.raises(ValueError, match=r"must be \[1, 2, 7, 9\]; given \[1, 2, 4, 9\]"):
        backward_warp(x, flow)


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, 3), (-1, 2), (100, -100)])
def test_whole_pixels(dx, dy):
    """dx looks to the right, dy down, and beyond the edge the border goes on."""
    x = torch.arange(8 * 10, dtype=torch.float64).view(1, 1, 8, 10)
    flow = torch.tensor([dx, dy], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 8, 10)
    rows, columns = (torch.arange(8) + dy).clamp(0, 7), (torch.arange(10) + dx).clamp(0, 9)
    torch.testing.assert_close(backward_warp(x, flow)[0, 0], x[0, 0][rows][:, columns])


def test_warp_gradients():
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    # away from whole pixels and from the border, where the look-up has a kink
    whole = torch.randint(-1, 2, (1, 2, 5, 6)) * 0.0 + 0.3 + 0.4 * torch.rand(1, 2, 5, 6)
    flow = (-whole).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: backward_warp(a, b)[:, :, 1:, 1:], (x, flow))


def test_coordinates_are_clamped_to_the_border():
    grid = torch.tensor([-1e4, -1.0, -0.5, 0.0, 2.0, math.nan])
    assert clamp_to_border(grid).tolist() == [-1.0, -1.0, -0.5, 0.0, 2.0, -1.0]


def test_coordinates_beyond_the_border_are_the_border_with_and_without_gradients():
    x, flow = torch.randn(1, 2, 8, 9), torch.full((1, 2, 8, 9), -100.0)
    expected = x[:, :, :1, :1].expand_as(x)
    assert torch.equal(backward_warp(x, flow), expected)
    assert torch.equal(backward_warp(x.requires_grad_(), flow), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_warp_is_fp32_at_4k_under_autocast(dtype):
    """A ramp 4,096 pixels wide moved by a quarter pixel: coordinates in half precision would miss by whole pixels."""
    W = 4096
    torch.manual_seed(0)
    x = torch.rand(1, 1, 2, W)
    flow = torch.full((1, 2, 2, W), 0.25)
    exact = backward_warp(x.double(), flow.double())
    with torch.autocast("cpu", dtype=dtype):
        inside = backward_warp(x, flow)
        half = backward_warp(x.to(dtype), flow.to(dtype))
    assert inside.dtype == torch.float32
    assert half.dtype == dtype
    error = (inside.double() - exact).abs().max().item()
    error_of_half = (half.double() - exact).abs().max().item()
    print(f"largest error: fp32 frames {error:.1e}, {dtype} frames {error_of_half:.1e}")
    assert error < 1e-3
    assert error_of_half < 2 * torch.finfo(dtype).eps


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"must be \[1, 2, 4, 5\]"):
        backward_warp(torch.rand(1, 3, 4, 5), torch.rand(1, 2, 5, 4))


@pytest.mark.parametrize("size", [(12, 20), (6, 5), (24, 10)])
def test_resized_flow_is_the_same_motion(size):
    """A motion that is linear in the place stays so on every grid, in the units of that grid."""
    H, W = 12, 10

    def motion(h, w):
        """dx and dy are parts of the frame's width and height, which do not depend on the grid; centres of pixels."""
        y, x = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w
        parts = torch.stack(((0.1 + 0.2 * x).expand(h, w), (0.3 - 0.1 * y).unsqueeze(1).expand(h, w)))
        return (parts * torch.tensor([w, h]).view(2, 1, 1)).unsqueeze(0)

    resized = resize_flow(motion(H, W), size)
    expected = motion(*size)
    inside = (..., slice(2, -2), slice(2, -2))  # at the border interpolation has no neighbour to go on with
    torch.testing.assert_close(resized[inside], expected[inside], rtol=1e-5, atol=1e-5)


def test_resized_flow_is_fp32_under_autocast():
    flow = torch.rand(1, 2, 8, 8) * 3000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        resized = resize_flow(flow, (16, 16))
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized, resize_flow(flow, (16, 16)))
