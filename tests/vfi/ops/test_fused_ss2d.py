"""The fused SS2D against float64: interpreted on the CPU, and compiled on a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any
from unittest import mock

import pytest
import ss2d_cases
import torch
from ss2d_cases import Case, are_no_worse, made, results
from torch import Tensor

from vfi.config.configs import ModelConfig
from vfi.model.ss2d import Mamba2SS2D, ss2d
from vfi.ops.ssm import fused_ss2d as fused
from vfi.ops.ssm.fused_ss2d import Parameters, ss2d_obstacle
from vfi.ops.triton import precompile

HALF, SINGLE = torch.float16, torch.float32
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


# an interpreted program takes its time whatever its block is, and one of them walks through all pixels of its block
FEW_PROGRAMS = {"gated_norm": {"BLOCK": 16, "num_warps": 4}, "gated_norm_gradients": {"BLOCKS": 4, "num_warps": 1}}


def errors_in_few_programs(case: Case) -> dict[str, tuple[float, ...]]:
    with mock.patch.dict(fused._LAUNCH, FEW_PROGRAMS):
        return relative_errors(case)


def relative_errors(case: Case, device: str = "cpu", spare: int = 0) -> dict[str, tuple[float, ...]]:
    """Of the kernels and of the plain form, against float64. The kernels' memory begins as NaN."""
    with mock.patch.object(fused._Run, "new", _unwritten):
        return ss2d_cases.relative_errors(fused.fused_ss2d, case, device, spare)


def _unwritten(run: Any, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(size, torch.nan, dtype=dtype, device=run.projected.device)


def _error(t: Tensor, true: Tensor) -> float:
    return ((t.double() - true).norm() / true.norm()).item()


SMALL = [
    Case(1, 5, 11, 2, 16, 16, "interleaved", SINGLE),
    Case(1, 7, 6, 1, 32, 16, "flip", SINGLE),
    Case(2, 1, 20, 3, 16, 32, "interleaved", HALF, "input"),
    Case(1, 9, 1, 2, 16, 16, "flip", HALF, "tf32"),
    Case(1, 5, 7, 1, 64, 64, "interleaved", SINGLE),  # chunks of 32 tokens
    Case(1, 1, 1, 1, 16, 16, "interleaved", SINGLE),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreted_against_float64(interpreter, case):
    """Sizes that chunks do and do not divide, one pixel wide and high: at most twice the error of plain torch.

    A rounding error is allowed on top, for some of the sums are of numbers that cancel out.
    """
    for name, (ours, theirs) in interpreter.submit(errors_in_few_programs, case).result().items():
        assert ours <= 2 * theirs + {SINGLE: 1e-5, HALF: 2**-11}[case.dtype], name


@pytest.mark.parametrize("scan", ["interleaved", "flip"])
def test_the_default_precision_is_no_worse_than_the_fp32_island(interpreter, scan):
    """The plain form under autocast has its core and norm in fp32, and rounds what lies between operators to fp16."""
    case = Case(1, 9, 11, 2, 16, 16, scan, HALF, "auto")
    assert are_no_worse(interpreter.submit(errors_in_few_programs, case).result(), HALF)


def test_a_slice_of_wider_pixels_is_read_in_place(interpreter):
    case = Case(1, 3, 5, 2, 16, 16, "interleaved", SINGLE)
    for name, (ours, theirs) in interpreter.submit(relative_errors, case, spare=3).result().items():
        assert ours <= 2 * theirs + 1e-5, name


def without_gradients(case: Case) -> list[Tensor]:
    """The same output by all ways that need less memory, or keep a larger GPU busy."""
    projected, parameters, _ = made(case)
    outputs = [fused.fused_ss2d(projected, parameters, case.shape)]
    for settings in ({"_LEAN_BYTES": 1}, {"multiprocessors": lambda device: 4, "_SHORTEST": 1}):
        with mock.patch.multiple(fused, **settings), mock.patch.dict(fused._LAUNCH, FEW_PROGRAMS):
            outputs.append(fused.fused_ss2d(projected, parameters, case.shape))
    with torch.no_grad():
        outputs.append(fused.fused_ss2d(projected, Parameters(*(p.requires_grad_() for p in parameters)), case.shape))
    return outputs


def test_orders_one_by_one_and_segments_of_sequences_are_the_same(interpreter):
    first, *others = interpreter.submit(without_gradients, Case(1, 5, 13, 1, 16, 16, "interleaved", SINGLE)).result()
    for other in others:
        assert _error(other, first.double()) < 1e-6


def two_runs(case: Case) -> list[list[Tensor]]:
    """The states of all sequences at once in memory, and of one after the other."""
    projected, parameters, grad = made(case)
    runs = []
    for size in (fused._STATE_BYTES, 1):
        with mock.patch.object(fused, "_STATE_BYTES", size), mock.patch.dict(fused._LAUNCH, FEW_PROGRAMS):
            runs.append(results(fused.fused_ss2d, projected, parameters, grad, case.shape))
    return runs


def test_runs_are_the_same_to_the_bit(interpreter):
    first, second = interpreter.submit(two_runs, Case(1, 3, 5, 2, 16, 16, "interleaved", SINGLE)).result()
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("head_dim", "state", "largest"),
    [
        (16, 128, {"scan", "scan_gradients", "scan_states", "scan_state_gradients"}),
        (64, 32, {"scan_key_gradients"}),
        (64, 128, {"scan"}),
    ],
)
def test_small_shared_memory_is_enough(compile_for, monkeypatch, head_dim, state, largest):
    """The widest operands, fp32, for a GPU with 99 KB a program: what they take is known when they are compiled."""
    compile_for(120)
    launch, kernels = fused._Run.launch, list[Any]()

    def launch_largest(self: Any, name: str, *arguments: Any, **constants: Any) -> None:
        if name in largest:
            launch(self, name, *arguments, **constants)

    monkeypatch.setattr(fused, "_is_small", lambda device: True)
    monkeypatch.setattr(fused._Run, "launch", launch_largest)
    monkeypatch.setattr(precompile, "_load", lambda compile_or_find: kernels.append(compile_or_find()))
    case = Case(1, 9, 11, 2, head_dim, state, "interleaved", SINGLE)
    with precompile.compiling_ahead(torch.device("cuda", 0)):
        results(fused.fused_ss2d, *made(case), case.shape)
    assert {kernel.metadata.name for kernel in kernels} == largest
    assert max(kernel.metadata.shared for kernel in kernels) <= 99 * 1024


def errors_where_memory_is_small(case: Case) -> dict[str, tuple[float, ...]]:
    with mock.patch.object(fused, "_is_small", return_value=True):
        return errors_in_few_programs(case)


def test_chunks_of_16_tokens(interpreter):
    case = Case(1, 5, 7, 1, 64, 128, "interleaved", SINGLE)
    for name, (ours, theirs) in interpreter.submit(errors_where_memory_is_small, case).result().items():
        assert ours <= 2 * theirs + 1e-5, name


def test_small_cards_are_told_by_their_compute_capability(monkeypatch):
    for capability, small in (
        ((7, 0), True),
        ((7, 5), True),
        ((8, 0), False),
        ((8, 6), True),
        ((8, 9), True),
        ((9, 0), False),
        ((10, 0), False),
        ((12, 0), True),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fused._is_small(torch.device("cuda", 0)) == small
    assert not fused._is_small(torch.device("cpu"))


def test_what_it_can_not_take_is_refused():
    shape = SMALL[0].shape
    parameters = made(SMALL[0])[1]
    width = shape.inner + shape.channels + shape.heads
    with pytest.raises(TypeError, match=r"given torch\.float64.*--ssd_backend reference"):
        fused.fused_ss2d(torch.zeros(2, 4, 4, width, dtype=torch.float64), parameters, shape)
    with pytest.raises(ValueError, match=rf"\[2B, H, W, {width}\] and was given \[3, 4, 4, {width}\]"):
        fused.fused_ss2d(torch.zeros(3, 4, 4, width), parameters, shape)


def test_what_stands_in_the_way_is_said(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert ss2d_obstacle(cuda, 32, 64, 1) is None
    assert "the device is cpu" in ss2d_obstacle(torch.device("cpu"), 32, 64, 1)
    assert "--ssd_groups shared" in ss2d_obstacle(cuda, 32, 64, 16)
    assert "not 8 and 64" in ss2d_obstacle(cuda, 8, 64, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "on Tesla V100, of compute capability 7.0, the fused kernels were compiled" in ss2d_obstacle(cuda, 32, 64, 1)
    assert "--ssd_groups shared" in ss2d_obstacle(cuda, 32, 64, 16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in ss2d_obstacle(cuda, 32, 64, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    assert "Tesla V100 is older than compute capability 7.0" in ss2d_obstacle(cuda, 32, 64, 1)


LARGE = [
    *(Case(2, 31, 45, 8, 32, 64, "interleaved", *kind) for kind in [
        (SINGLE, "fp32"), (SINGLE, "input"), (HALF, "input"), (torch.bfloat16, "input"), (torch.bfloat16, "tf32"),
        (torch.bfloat16, "fp32"),
    ]),
    Case(1, 40, 52, 8, 16, 16, "flip", torch.bfloat16, "input"),
    Case(1, 20, 31, 2, 64, 128, "interleaved", torch.bfloat16, "input"),
    Case(1, 20, 31, 2, 64, 128, "interleaved", SINGLE, "tf32"),
    Case(1, 64, 200, 2, 32, 64, "interleaved", torch.bfloat16, "input"),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gpu_against_float64(case):
    """Twice the error of plain torch in the same dtype; what multiplies in TF32 or bf16 adds half a unit of that."""
    rounding = {"fp32": 2e-6, "tf32": 2**-9, "input": 2**-9 if case.dtype != SINGLE else 2e-6}[case.precision]
    for name, (ours, theirs) in relative_errors(case, "cuda").items():
        print(f"{name}: {ours:.1e}, plain {theirs:.1e}")
        assert ours <= 2 * theirs + rounding, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize("scan", ["interleaved", "flip"])
def test_gpu_default_precision_is_no_worse_than_the_fp32_island(scan, dtype):
    """As above; an interpreter computes with bf16 as with whole numbers, so that is tested here alone."""
    assert are_no_worse(relative_errors(Case(2, 31, 45, 8, 32, 64, scan, dtype, "auto"), "cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("scan", ["interleaved", "flip"])
@pytest.mark.parametrize("dim", [256, 512])
def test_gpu_module_agrees_with_its_reference(dim, scan):
    """The whole SS2D under autocast, training and not, against itself in float64; repeated runs are the same to the bit."""
    device = torch.device("cuda")
    module = ss2d(dim, ModelConfig(scan=scan, width=32, ssd_precision="input"), device).to(device)
    assert isinstance(module, Mamba2SS2D)
    assert module.choice == "ssd: fused (available on cuda)"
    exact = ss2d(dim, ModelConfig(scan=scan, width=32, ssd_backend="reference"), device).to(device, torch.float64)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(4, 17, 23, dim, device=device)
    truth = exact(x.double())
    outputs = []
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            outputs.append(module(x.to(torch.bfloat16)))
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        lean = module(x.to(torch.bfloat16))
    assert torch.equal(*outputs)
    assert _error(outputs[0], truth) < 8e-3
    assert _error(lean, truth) < 8e-3
