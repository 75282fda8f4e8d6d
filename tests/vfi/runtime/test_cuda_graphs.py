"""CUDA graphs: the same bits as without, from inputs, weights and caches as they are when they are replayed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vfi.config import presets
from vfi.inference.loading import predict
from vfi.model.interpolator import FrameInterpolator
from vfi.ops.ssm import scan_order
from vfi.runtime import cuda_graphs
from vfi.runtime.cuda_graphs import Graphs


class Recorded:
    """In place of a graph: calls the function, and counts."""

    def __init__(self, function, inputs, pool):
        self.function, self.replays = function, 0

    def __call__(self, inputs):
        self.replays += 1
        return self.function(*inputs)


@pytest.fixture
def on_cpu(monkeypatch):
    """Graphs are made of frames on a CPU, too."""
    monkeypatch.setattr(cuda_graphs, "_is_worth_capturing", lambda frames: frames[:, 0].numel() <= 64)
    monkeypatch.setattr(cuda_graphs, "CapturedCall", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    memory(monkeypatch, cached=0, free=1)


def memory(monkeypatch, cached: int, free: int) -> None:
    """A GPU on which 1000 bytes are used, and these are cached by torch, and free."""
    reserved = [1000 + cached]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[0])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: reserved.__setitem__(0, 1000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free + cached, 10_000))


def double(frames: Tensor) -> Tensor:
    return 2 * frames


@pytest.mark.filterwarnings("error")
def test_only_tensors_with_memory_are_read():
    """A compiler that runs within a capture hands its own tensors to torch functions."""
    weight = torch.nn.Parameter(torch.ones(2))
    with cuda_graphs.TensorReadTracker() as reads, FakeTensorMode() as compiler:
        compiler.from_tensor(weight) * 2
    assert [tensor is weight for tensor in reads.kept.values()] == [True]


def test_the_third_call_of_a_shape_is_recorded(on_cpu):
    calls = Graphs()
    for number in range(5):
        frames = torch.rand(1, 3, 8, 8)
        assert torch.equal(calls(double, frames), 2 * frames)
        assert len(calls.captured) == (number >= 2)
    assert calls.captured.popitem()[1].replays == 3
    for _ in range(5):
        calls(double, torch.rand(2, 3, 8, 8))  # too large
    assert not calls.captured


def test_whatever_makes_a_difference_has_a_graph_of_its_own(on_cpu):
    calls = Graphs()
    frames = torch.rand(1, 3, 8, 8)
    for _ in range(3):
        calls(double, frames)
        calls(lambda frames: frames, frames, kind="same")
        calls(double, frames.contiguous(memory_format=torch.channels_last))
        calls(double, frames.double())
    assert len(calls.captured) == 4
    assert torch.equal(calls(lambda frames: frames, frames, kind="same"), frames)


def test_the_last_used_are_kept(on_cpu):
    calls = Graphs()
    for width in (2, 3, 4, 5, 2, 6):
        for _ in range(3):
            calls(double, torch.rand(1, 3, 4, width))
    assert [key[1][0][3] for key in calls.captured] == [4, 5, 2, 6]
    calls(double, torch.rand(1, 3, 4, 3))  # one that was dropped starts again
    assert [key[1][0][3] for key in calls.captured] == [4, 5, 2, 6]


@pytest.mark.parametrize(("free", "limit", "made"), [(130, math.inf, True), (20, math.inf, False), (130, 1120, False)])
def test_without_room_for_as_much_again_none_is_made(on_cpu, monkeypatch, free, limit, made):
    """If memory ends while a graph is recorded, nothing can be computed on that GPU any more."""
    memory(monkeypatch, cached=100, free=free)
    calls = Graphs()
    calls.limit = limit
    for _ in range(5):
        frames = torch.rand(1, 3, 8, 8)
        assert torch.equal(calls(double, frames), 2 * frames)
    assert bool(calls.captured) == made


def test_on_a_cpu_nothing_is_recorded():
    calls = Graphs()
    for _ in range(5):
        calls(double, torch.rand(1, 3, 8, 8))
    assert not calls.captured
    assert not calls.call_counts


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phase", [1, 2])
def test_the_same_bits_as_without(phase, precision):
    config = presets.override(presets.get("tiny"), phase=phase)
    model = FrameInterpolator(config.model, "cuda").eval()
    if phase > 1:  # flow that starts at zero would move nothing
        for head in model.flow.modules():
            if isinstance(head, torch.nn.Conv2d):
                torch.nn.init.normal_(head.weight, std=0.05)
    calls = Graphs()

    def both(H: int, W: int, batch: int = 1) -> None:
        frames = torch.rand(2, batch, 3, H, W, device="cuda")
        timestep = torch.rand(batch, device="cuda") * 0.8 + 0.1
        expected = predict(model, *frames, timestep, precision)
        found = predict(model, *frames, timestep, precision, graphs=calls)
        assert torch.equal(found, expected)

    for _ in range(4):
        both(123, 77)
        both(128, 192, batch=2)
    assert len(calls.captured) == 2
    scan_order._cache.clear()  # and its memory goes to somebody else
    rubbish = [torch.full((2**18,), 10**9, dtype=torch.int32, device="cuda") for _ in range(64)]
    both(123, 77)
    del rubbish
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    both(123, 77)
    both(128, 192, batch=2)
