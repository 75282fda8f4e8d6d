"""Kernels are compiled side by side before they are run; that compiling works is seen on a GPU alone."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from vfi import presets
from vfi.fitting import TrainingStep
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
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = presets.override(presets.tiny(), phase=2, batch_size=2, crop=128)
    step = TrainingStep(config, torch.device("cuda"), torch.bfloat16)
    step.compile_ahead()
    assert all(parameter.isfinite().all() and parameter.grad is None for parameter in step.model.parameters())
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **facts: compiled.append(facts["repr"]) and None)
    step(step.make_frames())
    assert not compiled
