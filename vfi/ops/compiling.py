"""How does one wait less for kernels that were never compiled on this machine? All that a call needs are compiled side by side.

    with compiling_ahead(device):
        step(small_frames)          # compiles what it meets, on all cores, and runs none of it

Triton compiles a kernel when it is launched, one after the other, and a training step has a hundred of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_THREADS = 32


@contextlib.contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """Meanwhile Triton's kernels are compiled and not run: what they would write holds anything. Ends when all are there."""
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, dict[Hashable, Future[Any]]()
    index = torch.cuda.current_device() if device.index is None else device.index

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        key = (kernel, *map(_kind, arguments), *((name, _kind(value)) for name, value in options.items()))
        if key not in compiled:
            compiled[key] = pool.submit(run, kernel, *arguments, grid=grid, warmup=True, **options)

    # compiling is done outside of Python's lock
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "compile", torch.cuda.set_device, (index,)) as pool:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield
        for future in compiled.values():
            future.result()


def _kind(argument: Any) -> Hashable:
    """What a kernel is compiled for; a little finer, so that some are asked for twice, which Triton's cache answers."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return tuple(map(_kind, argument)) if isinstance(argument, tuple | list) else argument
