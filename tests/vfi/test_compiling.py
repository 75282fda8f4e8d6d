"""Kernels are compiled side by side before they are run; that compiling works is seen on a GPU alone."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from made_videos import new_run

from vfi import presets
from vfi.between import Between, Settings
from vfi.fitting import TrainingStep
from vfi.inference import LoadedModel
from vfi.ops.compiling import compiling_ahead

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[object, ...]]:
    """What Triton is asked for, instead of what it does."""
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    calls: list[tuple[object, ...]] = []

    def run(kernel, *arguments, grid, warmup, **options):
        if options.get("BLOCK") == 3:
            raise ValueError("BLOCK must be a power of 2")
        calls.append((kernel.__name__, grid, warmup, len(arguments), options))

    monkeypatch.setattr(JITFunction, "run", run)
    return calls


def kernel():
    import triton

    def add(x, n):
        pass

    return triton.jit(add)


def test_each_kind_is_compiled_once_and_nothing_is_run(asked):
    add, numbers = kernel(), torch.zeros(64)
    with compiling_ahead(torch.device("cuda", 0)):
        for tensor, block in (
            (numbers, 16),
            (numbers[4:], 16),
            (numbers[1:], 16),
            (numbers.half(), 16),
            (numbers, 32),
            (numbers, 16),
        ):
            add[(7,)](tensor, 5, BLOCK=block)
    # the second and the last are as the first; the third starts elsewhere
    assert sorted(options["BLOCK"] for *_, options in asked) == [16, 16, 16, 32]
    assert all(call[:4] == ("add", (7,), True, 2) for call in asked)
    add[(7,)](numbers, 5, BLOCK=16)
    assert asked[-1][2] is False


def test_what_can_not_be_compiled_is_said(asked):
    with pytest.raises(ValueError, match="power of 2"), compiling_ahead(torch.device("cuda", 0)):
        kernel()[(1,)](torch.zeros(4), 5, BLOCK=3)


def test_nothing_is_compiled_for_plain_torch():
    step = TrainingStep(presets.tiny(), torch.device("cpu"), torch.float32)
    step.compile_ahead()
    assert all(parameter.grad is None for parameter in step.model.parameters())


@pytest.mark.gpu
def test_gpu_step_needs_nothing_more(monkeypatch, tmp_path):
    """After it a step compiles nothing: the kernels of forward and backward pass are all there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = presets.override(presets.tiny(), phase=2, batch_size=2, crop=128)
    step = TrainingStep(config, torch.device("cuda"), torch.bfloat16)
    step.compile_ahead()
    assert all(parameter.isfinite().all() and parameter.grad is None for parameter in step.model.parameters())
    compiled = note_compiling(monkeypatch)
    step(step.make_frames())
    assert not compiled


@pytest.mark.gpu
def test_gpu_frames_between_need_nothing_more(monkeypatch, tmp_path):
    """The first pair of a video compiles all it needs beforehand, at its own size."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    model = Between(Settings(new_run(tmp_path / "runs" / "fresh"), "cuda"))
    assert model.loaded.model.all_fused
    asked, ahead = [], LoadedModel.compile_ahead

    def compile_ahead(self, predict):
        everything = note_compiling(monkeypatch)
        ahead(self, predict)
        asked.append((len(everything), note_compiling(monkeypatch)))

    monkeypatch.setattr(LoadedModel, "compile_ahead", compile_ahead)
    img0, img1 = np.random.default_rng(0).integers(0, 255, (2, 270, 480, 3), dtype=np.uint8)
    for _ in range(3):
        model(img0, img1, [0.5])
    ((before, after),) = asked
    assert before > 0
    assert not after


def note_compiling(monkeypatch) -> list[str]:
    """Names of the kernels that are compiled from here on."""
    import triton

    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **facts: compiled.append(facts["repr"]) and None)
    return compiled
