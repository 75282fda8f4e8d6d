"""The SS2D for a CPU's cache against float64, and against its own single block."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ss2d_cases import Case, are_no_worse, made, plain, relative_errors

from vfi.config.configs import ModelConfig
from vfi.errors import JobError
from vfi.model.ss2d import ss2d
from vfi.ops.ssm import blocked_ss2d as blocked

HALF, SINGLE, CPU = torch.float16, torch.float32, torch.device("cpu")

CASES = [
    Case(1, 5, 11, 2, 16, 16, "interleaved", SINGLE),
    Case(2, 8, 8, 1, 32, 16, "interleaved", SINGLE),  # whole chunks
    Case(2, 7, 6, 3, 8, 24, "flip", SINGLE),  # sizes for which there are no kernels
    Case(2, 1, 20, 3, 16, 32, "interleaved", HALF, "input"),
    Case(1, 9, 1, 2, 16, 16, "flip", torch.bfloat16),
    Case(1, 1, 1, 1, 16, 16, "interleaved", SINGLE),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_against_float64(case):
    """At most three times the error of plain torch, and roundings: some of the sums are of numbers that cancel out."""
    rounding = torch.finfo(case.dtype).eps
    for name, (ours, theirs) in relative_errors(blocked.blocked_ss2d, case).items():
        assert ours <= 3 * theirs + 4 * rounding, name


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize("scan", ["interleaved", "flip"])
def test_half_precision_is_no_worse_than_the_fp32_island(scan, dtype):
    """The plain form under autocast has its core and norm in fp32, and rounds what lies between operators."""
    assert are_no_worse(relative_errors(blocked.blocked_ss2d, Case(1, 9, 11, 2, 16, 16, scan, dtype)), dtype)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_in_float64_it_is_the_plain_form(case):
    projected, parameters, _ = made(case)
    exact = [t.double() for t in (projected, *parameters)]
    expected = plain(exact[0], type(parameters)(*exact[1:]), case)
    torch.testing.assert_close(blocked.blocked_ss2d(exact[0], type(parameters)(*exact[1:]), case.shape), expected)


@pytest.mark.parametrize("block", [32, 64, 96])
@pytest.mark.parametrize("case", [Case(2, 9, 13, 2, 16, 16, "interleaved", SINGLE), Case(1, 12, 8, 2, 8, 16, "flip", SINGLE)],
                         ids=str)  # fmt: skip
def test_blocks_pass_their_states_and_neighbours_on(monkeypatch, case, block):
    """With and without gradients it is the same: there, a direction is one block; here, the last one may have a few tokens."""
    projected, parameters, _ = made(case)
    whole = blocked.blocked_ss2d(projected, parameters, case.shape)
    monkeypatch.setattr(blocked, "_BLOCK", block)
    with torch.no_grad():
        torch.testing.assert_close(blocked.blocked_ss2d(projected, parameters, case.shape), whole, rtol=1e-5, atol=1e-6)


def test_fast_decays_stay_finite():
    """Products of decays that leave fp32's range are zeros."""
    projected, parameters, _ = made(CASES[1])
    parameters = parameters._replace(A=torch.full((1,), -500.0), dt_bias=torch.full((1,), 20.0))
    y = blocked.blocked_ss2d(projected, parameters, CASES[1].shape)
    assert y.isfinite().all()
    torch.testing.assert_close(y, plain(projected, parameters, CASES[1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scan", ["interleaved", "flip"])
def test_the_module_chooses_it_on_a_cpu(scan):
    config = ModelConfig(width=2, head_dim=8, d_state=16, scan=scan)
    module, exact = ss2d(16, config, CPU), ss2d(16, dataclasses.replace(config, ssd_backend="reference"), CPU)
    exact.load_state_dict(module.state_dict())
    assert module.choice == (
        "ssd: blocked (available on cpu; the fused kernels need a CUDA GPU and the device is cpu; mamba_ssm's kernels need a "
        "CUDA GPU and the device is cpu)"
    )
    x = torch.randn(4, 5, 7, 16)
    torch.testing.assert_close(module(x), exact(x))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_what_it_can_not_take_is_refused():
    per_head = ModelConfig(width=2, head_dim=8, d_state=16, ssd_groups="per_head")
    assert "ssd: reference (" in str(ss2d(16, per_head, CPU).choice)
    with pytest.raises(JobError, match="ssd_backend blocked cannot run: the blocked form has one B and C for all heads"):
        ss2d(16, dataclasses.replace(per_head, ssd_backend="blocked"), CPU)
    assert "the device is cuda" in str(blocked.blocked_obstacle(torch.device("cuda"), 1))
    projected, parameters, _ = made(CASES[0])
    with pytest.raises(ValueError, match=r"takes pixels \[2B, H, W, 98\] and was given \[2, 5, 11, 97\]"):
        blocked.blocked_ss2d(projected[..., 1:], parameters, CASES[0].shape)
