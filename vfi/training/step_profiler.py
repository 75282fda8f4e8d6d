"""Profile of a few training steps: a trace of their operators and kernels and, on a CUDA GPU, a snapshot of its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity

from vfi.runtime.logging import logger
from vfi.runtime.memory_history import start_memory_history, stop_memory_history, write_memory_snapshot

WARM_UP_STEPS = 5  # in them kernels are compiled, CUDA graphs recorded, caches filled; in the last one the profiler starts


class StepProfiler:
    """Context in which `steps` training steps are recorded after WARM_UP_STEPS others; with 0 steps it does nothing.

    The files in `folder` are named after the steps they hold: `steps_6_to_8.trace.json.gz` (Chrome's trace format, for
    https://ui.perfetto.dev) and on a CUDA device `steps_6_to_8.memory.pickle` (for https://pytorch.org/memory_viz). When the
    context ends early they hold the steps so far. A message says where they are, or why there are none.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        self._folder, self._steps = folder, steps
        self._is_cuda = device.type == "cuda"
        self._taken: list[int] = []  # numbers of the steps, those of the warm-up first
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> StepProfiler:
        if self._steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
            phases = torch.profiler.schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=self._steps, repeat=1)
            self._profile = torch.profiler.profile(
                activities=activities, schedule=phases, on_trace_ready=self._write, record_shapes=True
            )
            self._profile.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()
        if self._steps and len(self._taken) <= WARM_UP_STEPS:
            logger.info(
                f"--profile {self._steps} recorded nothing: it begins after {WARM_UP_STEPS} steps, and there were fewer"
            )

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context of one training step, which appears in the trace as `step NUMBER`."""
        if self._profile is None:
            yield
            return
        with torch.profiler.record_function(f"step {number}"):
            yield
        self._taken.append(number)
        if self._is_cuda and len(self._taken) == WARM_UP_STEPS:
            start_memory_history()
        self._profile.step()  # after the last of them it calls _write
        if len(self._taken) == WARM_UP_STEPS + self._steps:
            self._stop()

    def _stop(self) -> None:
        """End the profile, which is written now if that has not been done; later steps cost nothing."""
        if self._profile is None:
            return
        self._profile.stop()
        self._profile = None
        if self._is_cuda:
            stop_memory_history()

    def _write(self, profile: torch.profiler.profile) -> None:
        """Write the files of the steps recorded so far, if there are any."""
        recorded = self._taken[WARM_UP_STEPS:]
        if not recorded:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{recorded[0]}_to_{recorded[-1]}"
        profile.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        if self._is_cuda:
            write_memory_snapshot(self._folder / f"{name}.memory.pickle")
        logger.info(f"profile of steps {recorded[0]} to {recorded[-1]}: {self._folder}")
