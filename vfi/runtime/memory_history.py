"""Adapter for torch's record of allocations on a CUDA GPU, whose functions are private.

They are `torch.cuda.memory._record_memory_history` and `_dump_snapshot`, which torch's documentation of CUDA memory describes.
The arguments are those of torch 2.14.1. tests/vfi/training/test_step_profiler.py compares them with the installed version and,
on a GPU, reads a snapshot.
"""

from __future__ import annotations

from pathlib import Path

from torch.cuda import memory

_MAX_ENTRIES = 200_000  # allocations and releases that are kept, the newest; a training step of base has some thousands


def start_memory_history() -> None:
    """Record each allocation and release of CUDA memory from now on, with the Python stack it comes from."""
    memory._record_memory_history(enabled="all", context="all", stacks="python", max_entries=_MAX_ENTRIES)


def stop_memory_history() -> None:
    """Stop recording."""
    memory._record_memory_history(enabled=None)


def write_memory_snapshot(path: Path) -> None:
    """Write what was recorded and what is allocated now, as a pickle for https://pytorch.org/memory_viz."""
    memory._dump_snapshot(str(path))
