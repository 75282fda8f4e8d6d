"""Batches of whole frames for validation and benchmarks, in the order of the index."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.schema import Index
from vfi.config.configs import ConfigError
from vfi.data.batch import BatchPart, FrameBatch, collate, to_device
from vfi.data.shard_cache import ShardFolder, shard_folder
from vfi.data.shard_reader import ShardReader, check_has_middle, decode_triplet
from vfi.runtime.stop_signals import STOPPING


def own_generator() -> torch.Generator:
    """Return a generator for the seed that a DataLoader draws: from the global one it would change what training draws."""
    return torch.Generator().manual_seed(0)


def outlast_signals(_: int) -> None:
    """Ignore stop signals in a loader process: they reach the whole process group, and on some clusters all children.

    Training that is to stop needs its loader processes for the current step. They end when it does, or at its request.
    """
    os.setpgrp()
    for number in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    """End on SIGTERM once the parent is gone or ending: handlers don't know the sender of a signal."""
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
        pass
    os._exit(0)


def check_has_flow(index: Index, folder: ShardFolder) -> None:
    """Raise ConfigError when no flow is stored with the samples."""
    if not index.has_flow:
        raise ConfigError(
            f"--distill_weight needs flow stored beside the samples, and {folder} has none: leave it out, or make shards with "
            f"flow: `python -m shards.flow --shards {folder}` adds that of a teacher"
        )


class _Whole(IterableDataset):
    """Whole frames of the given samples, one in each batch, distributed to the workers in turn."""

    def __init__(self, folder: ShardFolder, index: Index, numbers: Sequence[int], with_flow: bool) -> None:
        self.folder, self.index, self.numbers, self.with_flow = folder, index, numbers, with_flow

    def __iter__(self) -> Iterator[BatchPart]:
        worker = get_worker_info()
        reader = ShardReader(self.folder, self.index, self.with_flow)
        for number in self.numbers[worker.id :: worker.num_workers] if worker else self.numbers:
            yield collate([decode_triplet(reader.read(number), self.index, self.with_flow)])


def evaluation_batches(
    folder: str | Path | ShardFolder,
    device: torch.device,
    *,
    numbers: Sequence[int] | None = None,
    workers: int = 0,
    with_flow: bool = False,
) -> Iterator[FrameBatch]:
    """Yield whole, unchanged frames, one sample in each batch: those with these numbers in this order, by default all."""
    folder = shard_folder(folder)
    index = folder.read_index()
    check_has_middle(index, folder)
    if with_flow:
        check_has_flow(index, folder)
    numbers = range(index.samples) if numbers is None else numbers
    whole = _Whole(folder, index, numbers, with_flow)
    loader = DataLoader(
        whole, batch_size=None, num_workers=min(workers, len(numbers)), generator=own_generator(),
        worker_init_fn=outlast_signals,
    )  # fmt: skip
    for batch in loader:
        yield to_device([batch], device)


def evenly_spaced(samples: int, count: int | None) -> list[int]:
    """Return `count` sample numbers spread evenly over 0 … samples-1, or all of them with None."""
    count = samples if count is None else min(count, samples)
    return [number * samples // count for number in range(count)]
