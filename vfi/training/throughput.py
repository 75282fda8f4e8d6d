"""How is training going? Mean losses, rate, the share of time spent waiting for data, and memory, between two readings."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Meter:
    """Mean loss, rate, share of the time spent waiting for data, and memory since the last reading."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.restart()

    def restart(self) -> None:
        """Forget what was measured."""
        self.started, self.excluded, self.waited, self.steps = time.perf_counter(), 0.0, 0.0, 0
        self.losses: list[dict[str, Tensor]] = []
        _forget_peak()

    def add(self, losses: dict[str, Tensor], counts: bool = True) -> None:
        """One more step and its losses, which stay on the device: reading them would wait for the step to end.

        One that does not count, since it was skipped, is work done; its losses may be no numbers.
        """
        self.steps += 1
        if counts:
            self.losses.append(losses)

    def mean_losses(self) -> dict[str, Tensor]:
        """Means over the steps that count since the last reading, on the device; no number where there are none."""
        if not self.losses:
            return {"loss": torch.tensor(math.nan)}
        return {name: torch.stack([losses[name] for losses in self.losses]).mean() for name in self.losses[0]}

    @contextlib.contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Around the wait for a batch, which costs nothing if the device is still busy at its end with what it had before."""
        at_work = _at_work(device)
        before = time.perf_counter()
        yield
        if not at_work():
            self.waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        before = time.perf_counter()
        yield
        self.excluded += time.perf_counter() - before
        _forget_peak()

    def read(self, losses: dict[str, Tensor], norm: Tensor, hidden: int = 0) -> dict[str, float]:
        """One row of numbers; waits for the device. `hidden`: bytes of its memory that PyTorch does not count."""
        row = {name: loss.item() for name, loss in losses.items()} | {"grad_norm": norm.item()}
        seconds = time.perf_counter() - self.started - self.excluded
        row |= {"samples_per_s": self.steps * self.global_batch / seconds, "data_wait": self.waited / seconds}
        if norm.is_cuda:
            row["memory_gib"] = (torch.cuda.max_memory_allocated(norm.device) + hidden) / 2**30
        self.restart()
        return row


def _at_work(device: torch.device) -> Callable[[], bool]:
    """Is the device still busy with what it was given up to now? A CPU never is: it does one thing after the other."""
    if device.type != "cuda":
        return lambda: False
    given = torch.cuda.Event()
    given.record(torch.cuda.current_stream(device))
    return lambda: not given.query()


def _forget_peak() -> None:
    """The memory of a row is that of its training steps, not of a validation before them."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
