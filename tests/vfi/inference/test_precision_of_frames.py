"""Frames in half precision beside those in fp32, and what is said where that does not suffice."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from vfi.errors import JobError
from vfi.inference.loading import Fp16OverflowError, LoadedModel, load
from vfi.metrics.image_quality import psnr
from vfi.ops.warp import warp
from vfi.release.graph_formats import moving_photographs
from vfi.runtime.device import autocast_to, describe_precision, pick_precision
from vfi.shipped import SHIPPED

CPU = torch.device("cpu")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def shipped() -> LoadedModel:
    return load(SHIPPED, CPU)


def test_names_and_types(caplog):
    names = {"fp32": "fp32", "bf16": "bf16 autocast", "fp16": "fp16 autocast"}
    assert {name: describe_precision(pick_precision(name, CPU)) for name in names} == names
    assert pick_precision("auto", CPU) == SINGLE
    with autocast_to(CPU, HALF):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == HALF
    with autocast_to(CPU, SINGLE):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == SINGLE


def test_fp16_on_a_cpu_gets_a_note(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vfi"), "warning", said.append)
    pick_precision("fp16", CPU)
    assert said == ["--precision fp16 is for a GPU: on a CPU it takes far longer than fp32"]


@pytest.mark.parametrize(("precision", "least"), [(HALF, 65.0), (BRAIN, 50.0)])
def test_frames_are_close_to_those_of_fp32(shipped, precision, least):
    """One frame and several, with the flow at a half; an error of half a level in each value would be 54 dB."""
    img0, img1 = moving_photographs(1, 64, 96)
    time, times = torch.tensor([0.5]), torch.tensor([0.25, 0.75])
    exact = shipped.predict(img0, img1, time, SINGLE, 0.5), shipped.predict_several(img0, img1, times, SINGLE)
    found = shipped.predict(img0, img1, time, precision, 0.5), shipped.predict_several(img0, img1, times, precision)
    for ours, truth in zip(found, exact, strict=True):
        assert ours.dtype == SINGLE
        score = psnr(ours, truth).min()
        print(f"{precision}: {score:.1f} dB")
        assert score > least
        assert not torch.equal(ours, truth)


def test_coordinates_and_blending_are_fp32_in_fp16(shipped, monkeypatch):
    seen = set()
    sample, lerp = F.grid_sample, torch.lerp

    def note_sample(x, grid, **rest):
        seen.add(("sample", x.dtype, grid.dtype))
        return sample(x, grid, **rest)

    def note_lerp(*values):
        seen.add(("blend", *(value.dtype for value in values)))
        return lerp(*values)

    monkeypatch.setattr(warp.F, "grid_sample", note_sample)
    monkeypatch.setattr(torch, "lerp", note_lerp)
    shipped.predict(*moving_photographs(1, 64, 96), torch.tensor([0.5]), HALF)
    assert seen == {("sample", SINGLE, SINGLE), ("blend", SINGLE, SINGLE, SINGLE)}


@pytest.mark.parametrize("several", [False, True])
def test_values_beyond_fp16_are_an_error_and_no_picture(shipped, several):
    """In the flow, which would sample the border of the frames; fp32 has the range."""
    img0, img1 = moving_photographs(1, 64, 96)
    with torch.no_grad():
        shipped.model.flow.stages[-1].head.bias.fill_(1e5)

    def frame(precision: torch.dtype) -> torch.Tensor:
        if several:
            return shipped.predict_several(img0, img1, torch.tensor([0.5]), precision)
        return shipped.predict(img0, img1, torch.tensor([0.5]), precision)

    assert frame(SINGLE).isfinite().all()
    with pytest.raises(Fp16OverflowError, match="need values above fp16's largest, 65,504: use --precision fp32"):
        frame(HALF)
    assert issubclass(Fp16OverflowError, JobError)
