"""TF32, cuDNN and determinism are set in one place, written down, and refused in words where they can't be had."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vfi.config.configs import ConfigError
from vfi.ops.loss import laplacian
from vfi.runtime.numerics import explain_determinism_errors, numerics, set_numerics
from vfi.tracking.environment import environment

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the settings as they were found, the environment, too."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = numerics()
    yield
    set_numerics()
    torch.backends.cuda.matmul.allow_tf32 = before["tf32_matmul"]
    torch.backends.cudnn.allow_tf32 = before["tf32_cudnn"]
    torch.backends.cudnn.benchmark = before["cudnn_benchmark"]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # it may have been set here


def test_defaults_are_exact_and_fast():
    set_numerics()
    assert numerics() == {
        "tf32_matmul": False, "tf32_cudnn": False, "cudnn_benchmark": True, "deterministic": False, "cublas_workspace": None,
    }  # fmt: skip
    assert torch.get_float32_matmul_precision() == "highest"


def test_every_switch_is_set_and_written_down():
    set_numerics(tf32=True, deterministic=True)
    found = {
        "tf32_matmul": True, "tf32_cudnn": True, "cudnn_benchmark": False, "deterministic": True, "cublas_workspace": ":4096:8",
    }  # fmt: skip
    assert numerics() == found
    assert environment(torch.device("cpu")).items() >= found.items()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    set_numerics()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_environment_that_rules_it_out_is_named(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    set_numerics()
    with pytest.raises(ConfigError, match=r"--deterministic needs CUBLAS_WORKSPACE_CONFIG.*':0:0': unset it"):
        set_numerics(deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_operator_without_a_deterministic_form_is_named():
    def write() -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    set_numerics()
    with explain_determinism_errors():
        write()
    set_numerics(deterministic=True)
    named = pytest.raises(ConfigError, match=r"--deterministic is impossible .*: put_ has no deterministic form")
    with named as error, explain_determinism_errors():
        write()
    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="something else"), explain_determinism_errors():
        raise RuntimeError("something else")


@pytest.mark.parametrize("shape", [(2, 3, 64, 80), (1, 1, 3, 4)])
@pytest.mark.parametrize(("sides", "mode"), [((2, 2, 2, 2), "reflect"), ((1, 0, 1, 1), "reflect"), ((0, 1, 0, 0), "replicate")])
def test_deterministic_padding_is_the_usual_one(shape, sides, mode):
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    usual = F.pad(x, sides, mode)
    set_numerics(deterministic=True)
    other = laplacian._padded(x, sides, mode)
    assert torch.equal(usual, other)
    weight = torch.rand_like(usual)
    gradients = [torch.autograd.grad((padded * weight).sum(), x)[0] for padded in (usual, other)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-14)


def test_nothing_else_sets_them():
    """One place: no other module assigns what numerics.py sets."""
    setting = re.compile(
        r"(cudnn\.\w+|allow_tf32|fp32_precision)\s*=[^=]|use_deterministic_algorithms\(|set_float32_matmul_precision\(|CUBLAS_"
    )
    found = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "vfi").rglob("*.py")) if setting.search(path.read_text())]
    assert found == ["vfi/runtime/numerics.py"]


@pytest.mark.gpu
def test_loss_is_deterministic_on_a_gpu():
    set_numerics(deterministic=True)
    x = torch.rand(2, 3, 128, 128, device="cuda", requires_grad=True)
    truth = torch.rand_like(x)
    gradients = [torch.autograd.grad(laplacian.laplacian_loss(x, truth), x)[0] for _ in range(3)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.gpu
def test_tf32_rounds_factors_on_a_gpu():
    a = torch.randn(256, 256, device="cuda")
    exact = (a.double() @ a.double()).float()
    errors = []
    for tf32 in (False, True):
        set_numerics(tf32=tf32)
        errors.append(((a @ a - exact).norm() / exact.norm()).item())
    assert errors[0] < 1e-6 < 1e-4 < errors[1]
