"""Mean losses, throughput, the fraction of time spent waiting for data, and peak memory, between two readings."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Meter:
    """Mean losses, throughput, fraction of time spent waiting for data, and peak memory since the last reading."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.restart()

    def restart(self) -> None:
        """Discard what was measured."""
        self.started, self.excluded, self.waited, self.steps = time.perf_counter(), 0.0, 0.0, 0
        self.losses: list[dict[str, Tensor]] = []
        _forget_peak()

    def add(self, losses: dict[str, Tensor], counts: bool = True) -> None:
        """Count a step and its losses, which stay on the device: reading them would wait for the step to end.

        A skipped step (`counts=False`) counts for the throughput only; its losses may be non-finite.
        """
        self.steps += 1
        if counts:
            self.losses.append(losses)

    def mean_losses(self) -> dict[str, Tensor]:
        """Return the mean losses of the steps that count since the last reading, on the device; NaN where there are none."""
        if not self.losses:
            return {"loss": torch.tensor(math.nan)}
        return {name: torch.stack([losses[name] for losses in self.losses]).mean() for name in self.losses[0]}

    @contextlib.contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Measure the wait for a batch; it counts as 0 if the device is still busy with earlier work when the wait ends."""
        at_work = _at_work(device)
        before = time.perf_counter()
        yield
        if not at_work():
            self.waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time within the context, which is not training."""
        before = time.perf_counter()
        yield
        self.excluded += time.perf_counter() - before
        _forget_peak()

    def read(self, losses: dict[str, Tensor], norm: Tensor, hidden: int = 0) -> dict[str, float]:
        """Return one row of numbers; waits for the device. `hidden`: bytes of its memory that PyTorch does not count."""
        row = {name: loss.item() for name, loss in losses.items()} | {"grad_norm": norm.item()}
        seconds = time.perf_counter() - self.started - self.excluded
        row |= {"samples_per_s": self.steps * self.global_batch / seconds, "data_wait": self.waited / seconds}
        if norm.is_cuda:
            row["memory_gib"] = (torch.cuda.max_memory_allocated(norm.device) + hidden) / 2**30
        self.restart()
        return row


def _at_work(device: torch.device) -> Callable[[], bool]:
    """Return a function that says whether the device is still busy with its work up to now; a CPU never is."""
    if device.type != "cuda":
        return lambda: False
    given = torch.cuda.Event()
    given.record(torch.cuda.current_stream(device))
    return lambda: not given.query()


def _forget_peak() -> None:
    """Reset the peak memory, so that a row reports that of its training steps, not of an earlier validation."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
