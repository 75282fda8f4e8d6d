"""Memory of devices: what is free, and whether an error means that it is exhausted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")
_CGROUP = Path("/sys/fs/cgroup")
# what else than torch.OutOfMemoryError says so: CUDA itself, Triton, cuBLAS, cuDNN
_OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that the device's memory was full, also in the words of libraries below torch."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def free_memory() -> None:
    """Release the memory that a failed measurement left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_memory() -> float:
    """Return the bytes that are free on this machine, or below the limit of the container of this process."""
    free = float(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no container, or one of another kind
        return free
    return free if limit == "max" else min(free, float(limit) - float(used))


def if_it_fits(call: Callable[[], T]) -> T | None:
    """Return the result of the call, or None, with its memory released, where the device has not enough."""
    try:
        return call()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # not before here: the error holds on to its frames, and they to their tensors
    return None
