"""What a row of metrics says: rates, losses, and which waits for data cost anything."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from vfi.training import throughput as measured
from vfi.training.throughput import Meter

CPU = torch.device("cpu")
NORM = torch.tensor(2.0)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that only a test moves on: `clock.now += 1.0`."""
    own = SimpleNamespace(now=100.0)
    monkeypatch.setattr(measured, "time", SimpleNamespace(perf_counter=lambda: own.now))
    return own


def test_rate_and_share_of_waiting_leave_out_what_is_not_training(clock):
    meter = Meter(global_batch=8)
    with meter.waiting(CPU):
        clock.now += 1.0
    with meter.paused():
        clock.now += 30.0
    clock.now += 3.0
    meter.add({"loss": torch.tensor(1.0)})
    meter.add({"loss": torch.tensor(3.0)})
    meter.add({"loss": torch.tensor(float("nan"))}, counts=False)
    losses = meter.mean_losses()
    row = meter.read(losses, NORM)
    assert row["loss"] == 2
    assert row["grad_norm"] == 2
    assert row["samples_per_s"] == pytest.approx(3 * 8 / 4.0)  # also of the step that does not count
    assert row["data_wait"] == pytest.approx(1 / 4)
    clock.now += 1.0
    assert meter.read(losses, NORM)["data_wait"] == 0


def wait(meter: Meter, device: torch.device, seconds: float) -> None:
    with meter.waiting(device):
        time.sleep(seconds)


@pytest.mark.gpu
def test_a_wait_costs_nothing_while_the_gpu_is_busy():
    device, meter = torch.device("cuda"), Meter(global_batch=1)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    wait(meter, device, 0.05)
    assert meter.waited == 0
    torch.cuda.synchronize()
    wait(meter, device, 0.05)
    assert meter.waited >= 0.05
