"""Parallel compilation of kernels before they run: for an absent GPU here, and those of a network on a GPU."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from made_videos import new_run

from vfi.config import presets
from vfi.inference.engine import InterpolationEngine, Settings
from vfi.inference.loading import LoadedModel
from vfi.ops.triton import precompile
from vfi.ops.triton.precompile import compiling_ahead
from vfi.training.synthetic_step import TrainingStep

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def hopper(compile_for) -> Path:
    """Triton's cache, of what it compiles for an H100 that is not there."""
    return compile_for(90)


def kernel():
    import triton
    import triton.language as tl

    def add(x, n, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), n)

    return triton.jit(add)


def test_each_kind_is_compiled_once_and_nothing_is_run(hopper, monkeypatch):
    loaded = []
    monkeypatch.setattr(precompile, "_load", loaded.append)
    add, numbers = kernel(), torch.zeros(64)
    tensors = (numbers, numbers[4:], numbers[1:], numbers.half())
    with compiling_ahead(torch.device("cuda", 0)):
        for tensor, block in (*((tensor, 16) for tensor in tensors), (numbers, 32), (numbers, 16)):
            assert add[(7,)](tensor, 5, BLOCK=block) is None
    # the second and the last are as the first; the third starts elsewhere
    assert len(loaded) == 4
    made = sorted(path.read_text() for path in hopper.glob("*/add.ptx"))
    assert len(made) == 4
    assert all(".target sm_90" in text for text in made)
    assert not numbers.any()
    # what is loaded is not compiled again
    before = {path: path.stat().st_mtime_ns for path in hopper.rglob("*.ptx")}
    assert [compile_or_find().metadata.name for compile_or_find in loaded] == ["add"] * 4
    assert before == {path: path.stat().st_mtime_ns for path in hopper.rglob("*.ptx")}
    with pytest.raises(AttributeError, match="launcher_cls"):  # outside it is launched again
        add[(7,)](numbers, 5, BLOCK=16)


def test_what_can_not_be_compiled_is_said(hopper):
    add = kernel()
    with pytest.raises(Exception, match="power of 2"):
        launch_all(add, (4, 3))


@pytest.mark.parametrize("blocks", [(3, 8, 16), (8, 3, 16)])
def test_some_may_fail_if_that_is_expected(hopper, blocks):
    add = kernel()
    with compiling_ahead(torch.device("cuda", 0), failing=True):
        for block in blocks:
            add[(1,)](torch.zeros(64), 5, BLOCK=block)
    assert len(list(hopper.glob("*/add.ptx"))) == 2


def test_without_copies_they_are_compiled_when_they_are_loaded(hopper, monkeypatch):
    """A copy that the system ends, for lack of memory, costs time and nothing else."""
    monkeypatch.setattr(precompile, "_compile", end_this_process)
    monkeypatch.setattr(precompile, "_load", lambda compile_or_find: compile_or_find())
    add = kernel()
    with pytest.warns(UserWarning, match="compiled one by one, which takes longer: A process"):
        launch_all(add, (4, 8, 16))
    assert len(list(hopper.glob("*/add.ptx"))) == 3


def end_this_process(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def launch_all(add, blocks) -> None:
    with compiling_ahead(torch.device("cuda", 0)):
        for block in blocks:
            add[(1,)](torch.zeros(64), 5, BLOCK=block)


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert precompile._cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert precompile._cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert precompile._cores() == 1


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
    model = InterpolationEngine(Settings(new_run(tmp_path / "runs" / "fresh"), "cuda"))
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
