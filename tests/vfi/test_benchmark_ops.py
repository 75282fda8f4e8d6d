"""Operator benchmark: both implementations are the same function, and all measurements are reported."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from vfi import benchmark_ops
from vfi.benchmark_ops import Cost, Operator, all_operators, main
from vfi.profiling import timing

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TINY = [
    benchmark_ops.scan(2, 4, 5, 32),
    benchmark_ops.attention(2, 9, 8, 32),
    benchmark_ops.activation(2, 8, 6, 10),
    benchmark_ops.activation(2, 8, 6, 10, residual=True),
    benchmark_ops.warp(2, 8, 6, 10),
    benchmark_ops.layer_norm(2, 3, 5, 32),
    benchmark_ops.side_by_side(1, 8, 4, 6),
    benchmark_ops.loss(1, 1, 64, 64),
]


def differences(number: int) -> list[float]:
    """Relative, of output and gradients of the two forms of an operator, in fp32."""
    operator = TINY[number]
    inputs = [torch.empty_like(given, device=CPU, dtype=torch.float32).normal_() for given in operator.inputs]
    with (
        mock.patch("vfi.model.ss2d.ss2d_obstacle", return_value=None),
        mock.patch("vfi.ops.attention.window_attention.attention_obstacle", return_value=None),
        # fewer programs, which are interpreted one by one
        mock.patch.dict("vfi.ops.loss.laplacian_kernels._DEFAULT", BLOCK=4096),
        mock.patch("vfi.ops.loss.laplacian.choose_loss", lambda backend, device: (backend == "fused", "")),
    ):
        ours, plain, _ = operator.build(CPU)
        results = []
        for function in (ours, plain):
            leaves = [given.detach().requires_grad_() for given in inputs]
            y = function(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)])
    (y, *gradients), (other, *others) = results
    pairs = [(y[:, : other.shape[1]] if y.dim() > 1 else y, other), *zip(gradients, others, strict=True)]  # channels of zeros
    return [((one - other).norm() / other.norm()).item() for one, other in pairs if other is not None]


@needs_triton
@pytest.mark.parametrize("number", range(len(TINY)), ids=[operator.name for operator in TINY])
def test_both_forms_are_the_same_function(interpreter, number):
    found = interpreter.submit(differences, number).result()
    assert found
    assert max(found) < 1e-4


def test_every_kind_is_measured():
    """In sizes whose inputs take no memory until they do."""
    assert {operator.name for operator in all_operators()} == {operator.name for operator in TINY}
    assert all(given.is_meta for operator in all_operators() for given in operator.inputs)


@pytest.fixture
def a_gpu(monkeypatch):
    """As one would answer: PyTorch's form takes three times as long, four times with gradients, and ten times the memory."""
    double = Operator(
        "double", (torch.empty(3, 5, device="meta"),), lambda device: benchmark_ops.Variants(torch.mul, torch.mul)
    )
    times = iter([0.5, 1.0, 1.5, 4.0])

    def milliseconds(call: Callable[[], object], device: torch.device) -> float:
        call()
        return next(times)

    monkeypatch.setattr(benchmark_ops, "why_unavailable", lambda device: None)
    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    nbytes = iter([2**20, 10 * 2**20])
    monkeypatch.setattr(benchmark_ops, "peak_bytes", lambda call, device: next(nbytes))
    monkeypatch.setattr(benchmark_ops, "_run", lambda function, inputs, leaves: inputs[0])
    monkeypatch.setattr(benchmark_ops, "all_operators", lambda: [double])
    monkeypatch.setattr(timing, "measure_rates", lambda device, precision: timing.Rates(1.0, 2e-3))


def test_what_is_measured_is_told(a_gpu, capsys, tmp_path):
    main(["--out", str(tmp_path / "new" / "out.json")])
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split() == [
        "double", "3×5", "0.060", "0.500", "1.500", "3.0x", "0.150", "1.000", "4.000", "4.0x", "1", "10",
    ]  # fmt: skip
    (row,) = json.loads((tmp_path / "new" / "out.json").read_text())["rows"]
    assert Cost(**row["plain"]) == Cost(1.5, 4.0, 10 * 2**20)


def test_what_was_measured_before_the_job_ends_is_kept(a_gpu, monkeypatch, tmp_path):
    """Its second operator finds no more times."""
    (double,) = benchmark_ops.all_operators()
    monkeypatch.setattr(benchmark_ops, "all_operators", lambda: [double, double])
    with pytest.raises(StopIteration):
        main(["--out", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["ours"]["both_ms"] == 1


@pytest.mark.parametrize("flag", ["--filter", "--only"])
def test_a_name_that_is_none_lists_them(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([flag, "convolution"])
    assert stopped.value.code == 2
    assert "is in none of the names: SS2D, window attention, " in capsys.readouterr().err


def test_a_file_that_can_not_be_written_is_refused_before_anything_is_measured(a_gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark_ops, "measure", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"--out {tmp_path} is a folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_it_is_for_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "nothing to be measured: the fused kernels need a CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("operator", TINY, ids=[operator.name for operator in TINY])
def test_gpu_operators_are_measured(operator):
    row = benchmark_ops.measure(operator, torch.device("cuda", 0), 3000.0)
    assert 0 < row.floor_ms < row.both_floor_ms
    assert 0 < row.ours.forward_ms < row.ours.both_ms
    assert row.ours.nbytes > 0
