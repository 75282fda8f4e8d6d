"""Shared memory that loader processes take for batches, compared with what the machine has before training begins."""

from __future__ import annotations

import os
from pathlib import Path

from vfi.config.configs import DataConfig
from vfi.data.batch import PREFETCH
from vfi.errors import JobError

DEVICE = Path("/dev/shm")
"""File system of shared memory on Linux; containers get 64 MB unless told otherwise."""
_EVALUATION_PREFETCH = 2  # of torch's DataLoader: batches that each process makes ahead


def training_bytes(config: DataConfig, with_flow: bool) -> int:
    """Return the most shared memory in bytes of one rank's training loader; 0 without loader processes."""
    if not config.num_workers:
        return 0
    frames, flows = 3 * 3, 2 * 3 * 4 * with_flow  # bytes a pixel: three of uint8, two of float32 with their weights
    # each process has PREFETCH + 2 pieces for its share of a batch; torch makes those for flow, and releases them one earlier
    return ((PREFETCH + 2) * frames + (PREFETCH + 1) * flows) * config.batch_size * config.largest_crop**2


def evaluation_bytes(largest: tuple[int, int], workers: int, with_flow: bool = False) -> int:
    """Return the most shared memory in bytes of one rank's loader of whole samples, of up to this (height, width)."""
    sample = largest[0] * largest[1] * (3 * 3 + 2 * 3 * 4 * with_flow)
    # one more is in use, and one is on its way
    return (_EVALUATION_PREFETCH * workers + 2) * sample if workers else 0


def check_shared_memory(needed: int, ranks: int, advice: str) -> None:
    """Raise JobError with `advice` when the `ranks` of this machine, which need this many bytes each, don't find them free."""
    try:
        state = os.statvfs(DEVICE)
    except OSError:  # not Linux: shared memory is not a file system
        return
    free, needed = state.f_bavail * state.f_frsize, needed * ranks
    if needed + needed // 32 > free:  # each piece ends in a page of its own
        raise JobError(
            f"{DEVICE} has {free / 1e6:,.1f} MB free, and the loader processes of {ranks} rank{'s' * (ranks > 1)} take up to "
            f"{needed / 1e6:,.1f} MB there: start the container with --shm-size={-(-needed // 10**9) + 1}g or --ipc=host, or "
            f"{advice}"
        )
