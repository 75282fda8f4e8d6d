"""Tiles cover the frame and overlap, no seam shows, and the result is close to that of the whole frame."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from vfi.config import presets
from vfi.evaluation.latency import real_pairs
from vfi.inference.tiling import OVERLAP, SMALLEST, smaller, spans, tiled
from vfi.model.interpolator import FrameInterpolator


@given(st.integers(32, 9000), st.integers(SMALLEST // 64, 40).map(lambda n: 64 * n))
def test_tiles_cover_a_side_and_overlap(length, side):
    found = spans(length, side)
    assert (found[0][0], found[-1][1]) == (0, length)
    assert len({end - start for start, end in found}) == 1
    assert all(end - start <= side for start, end in found)
    for (_, end), (start, _) in itertools.pairwise(found):
        assert end - start >= OVERLAP
    if length <= side:
        assert found == [(0, length)]


def test_what_is_local_is_the_same_in_tiles():
    img0, img1 = torch.rand(2, 1, 3, 700, 530)
    made = tiled(lambda a, b: torch.cat((a, b, (a + b) / 2)), img0, img1, side=320)
    torch.testing.assert_close(made, torch.cat((img0, img1, (img0 + img1) / 2)))
    asked = []
    tiled(lambda a, b: asked.append(a.shape[-2:]) or a, img0, img1, side=320)
    assert max(max(shape) for shape in asked) <= 320
    assert len(asked) == 3 * 3


def test_borders_of_tiles_fade():
    """A different constant in each tile gives a frame without a step."""
    img0 = torch.zeros(1, 3, 400, 1000)
    count = [0]

    def predict(a, b):
        count[0] += 1
        return torch.full_like(a, float(count[0] % 2))

    made = tiled(predict, img0, img0, side=448)
    assert (made[..., 1:] - made[..., :-1]).abs().max() < 2 / OVERLAP
    assert made.min() == 0
    assert made.max() == 1


def test_a_network_with_flow_makes_nearly_the_same_frame_in_tiles():
    network = FrameInterpolator(presets.override(presets.tiny(), phase=2).model).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.004 * torch.randn_like(parameter))
    img0, img1 = real_pairs(320, 640)[0]

    def predict(a, b):
        with torch.no_grad():
            return network(a, b, torch.tensor([0.5])).imgt.clamp(0, 1)

    whole, parts = predict(img0, img1), tiled(predict, img0, img1, side=384)
    psnr = -10 * math.log10((whole - parts).square().mean())
    assert psnr > 40, psnr
    assert not torch.equal(whole, parts)
    error = (whole - parts).abs().amax((0, 1, 2))
    assert error.max() < 8 * error.mean() + 0.02, "a seam"


def test_sides_to_try():
    assert smaller(4096) == 2048
    assert smaller(1000) == 448
    assert smaller(300) == SMALLEST
    assert smaller(SMALLEST) is None
