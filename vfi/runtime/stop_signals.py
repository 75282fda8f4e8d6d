"""Stop a run gracefully on SIGTERM (time limits, preemption), SIGUSR2 (a cluster's early warning) or SIGINT (Ctrl-C).

The first signal requests a graceful stop: training finishes the step, saves and exits with code 75. The second one ends the
process immediately.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_SAME = 1.0  # seconds in which a further signal is the first one once more: launchers pass on what all their group has got


class StopSignals:
    """Records the first signal while it is active, and restores the former handlers afterwards.

    Outside the main thread, where Python allows no handlers, it records nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = math.inf
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
            text = f"{self.received.name}: the step is finished and saved, then training ends; a second signal ends it at once"
            os.write(2, f"\n{text}\n".encode())  # a print could meet one that it interrupts
        elif time.monotonic() - self._at > _SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Agreement:
    """Agreement of all processes on whether any of them is to stop, after the same step.

    On GPUs the answer is that of the previous step, unless it is needed `at_once`: otherwise a process would have to wait for
    its device in every step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.asked: tuple[Tensor, torch.cuda.Event] | None = None

    def any(self, mine: bool, at_once: bool = False) -> bool:
        """Return whether any process is to stop. To be called by all processes together; `mine` stays true once it is."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return mine
        wish = torch.full((1,), float(mine), device=self.device)
        dist.all_reduce(wish, op=dist.ReduceOp.MAX)
        if at_once or self.device.type != "cuda":
            return bool(wish.item())
        answer = torch.empty(1, pin_memory=True).copy_(wish, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        before, self.asked = self.asked, (answer, copied)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0].item())
