"""What a row of metrics says: rates, losses, and which waits for data cost anything."""

from __future__ import annotations

import time

import pytest
import torch

from vfi.meter import Meter

CPU = torch.device("cpu")
NORM = torch.tensor(2.0)


def wait(meter: Meter, device: torch.device, seconds: float) -> None:
    with meter.waiting(device):
        time.sleep(seconds)


def test_rate_and_share_of_waiting_leave_out_what_is_not_training():
    meter = Meter(global_batch=8)
    wait(meter, CPU, 0.1)
    with meter.paused():
        time.sleep(0.3)
    time.sleep(0.1)
    meter.add({"loss": torch.tensor(1.0)})
    meter.add({"loss": torch.tensor(3.0)})
    meter.add({"loss": torch.tensor(float("nan"))}, counts=False)
    losses = meter.mean_losses()
    row = meter.read(losses, NORM)
    assert row["loss"] == 2
    assert row["grad_norm"] == 2
    assert 60 < row["samples_per_s"] <= 24 / 0.2
    assert 0.25 < row["data_wait"] < 0.75
    assert meter.read(losses, NORM)["data_wait"] == 0


@pytest.mark.gpu
def test_a_wait_costs_nothing_while_the_gpu_is_busy():
    device, meter = torch.device("cuda"), Meter(global_batch=1)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    wait(meter, device, 0.05)
    assert meter.waited == 0
    torch.cuda.synchronize()
    wait(meter, device, 0.05)
    assert 0.05 <= meter.waited < 0.5
