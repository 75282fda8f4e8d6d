"""How do shards become batches? Planned order -> read -> decode -> augment -> batch, the same for any number of workers.

Which samples a step sees is planned in plan.py and depends on neither ranks nor workers; what is done to a sample is drawn by
(seed, pass through its folder, sample).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.schema import Index
from vfi.config.configs import ConfigError, DataConfig, SequenceKind, folder_ratio
from vfi.data.augment import (
    FrameTooSmallError,
    apply_change,
    apply_change_to_flows,
    copy_pixels,
    crop_advice,
    crop_at,
    draw_change,
)
from vfi.data.faults import Fault
from vfi.data.plan import START, Plan, Position
from vfi.data.samples import ShardReader, check_has_middle, decode_triplet, usable_sample
from vfi.data.storage import ShardFolder, cache_at, shard_folder
from vfi.data.triplets import draw_triplet, shrink
from vfi.signals import STOPPING

_PREFETCH = 4  # parts of batches that a loader process makes ahead


class FrameBatch(NamedTuple):
    """Samples of a batch on the device, `[B, 3, H, W]` RGB, float in [0, 1]. Read by name."""

    img0: Tensor
    imgt: Tensor
    img1: Tensor
    timestep: Tensor
    """[B] float32, where imgt lies between img0 (0) and img1 (1)."""
    keys: tuple[str, ...]
    flow_t0: Tensor | None = None
    """[B, 2, H, W] float32, (dx, dy) in pixels from imgt to img0, as stored beside the samples; None: not asked for."""
    flow_t1: Tensor | None = None
    """Likewise to img1."""
    faults: tuple[Fault, ...] = ()
    """What could not be used and was replaced by other samples of this batch."""


def augment_sample(sample: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Replace `frames`, `flows` and `timestep` by randomly changed ones."""
    height, width = sample["frames"][0].shape[:2]
    try:
        change = draw_change(np.random.default_rng(sample["__draw__"]), height, width, sample["__crop__"], config)
    except FrameTooSmallError as error:
        raise FrameTooSmallError(f"sample {sample['__key__']}: {error}") from error
    frames, timestep = apply_change(change, sample["frames"], sample["timestep"])
    return sample | {"frames": frames, "flows": apply_change_to_flows(change, sample["flows"]), "timestep": timestep}


class _Part(NamedTuple):
    """A worker's share of a batch, in one tensor of frames: each tensor costs a file descriptor and a copy to the device."""

    frames: Tensor
    """[n, 3, H, W, 3] uint8: img0, imgt, img1 of each sample."""
    flows: Tensor | None
    """[n, 2, H, W, 2] float32: flow_t0, flow_t1."""
    timesteps: tuple[float, ...]
    keys: tuple[str, ...]
    faults: tuple[Fault, ...]


def collate(samples: Sequence[dict[str, Any]], in_turn: bool = False) -> _Part:
    """Samples -> a part of a batch, on the CPU; `in_turn`: see `_pieces`."""
    flows = np.array([sample["flows"] for sample in samples], dtype=np.float32)
    frames = _to_be_sent((len(samples), 3, *samples[0]["frames"][0].shape), in_turn)
    for place, sample in zip(frames.numpy(), samples, strict=True):
        for pixels, frame in zip(place, sample["frames"], strict=True):
            copy_pixels(frame, into=pixels)
    return _Part(
        frames,
        torch.from_numpy(flows) if flows.size else None,
        tuple(float(sample["timestep"]) for sample in samples),
        tuple(sample["__key__"] for sample in samples),
        tuple(fault for sample in samples for fault in sample.get("faults", ())),
    )


def _to_be_sent(shape: tuple[int, ...], in_turn: bool) -> Tensor:
    """A uint8 tensor to be filled; in a loader process in the memory that it shares with the trainer, or torch would copy it
    there. New memory, or one of a few pieces `in_turn`, whose pages are there already.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    return next(_pieces(shape)) if in_turn else _shared(shape)


@functools.lru_cache(maxsize=1)  # the crop may grow
def _pieces(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Pieces of shared memory in turn, for parts that are asked for without end: when a process is asked for one, the trainer
    takes the one _PREFETCH before that and has copied those before it, so that no more than _PREFETCH + 1 hold something.
    """
    return itertools.cycle(_shared(shape) for _ in range(_PREFETCH + 2))


def _shared(shape: tuple[int, ...]) -> Tensor:
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def to_device(parts: Sequence[_Part], device: torch.device) -> FrameBatch:
    """Join the parts of a batch on the device and scale their colours to [0, 1]; frames are channels-last in memory."""

    img0, imgt, img1 = _join([part.frames for part in parts], device, divisor=255)
    flows = [part.flows for part in parts if part.flows is not None]
    flow_t0, flow_t1 = _join(flows, device) if flows else (None, None)
    timestep = torch.tensor([timestep for part in parts for timestep in part.timesteps])
    if device.type == "cuda":  # from other memory the copy would wait for the device
        timestep = timestep.pin_memory()
    keys = tuple(key for part in parts for key in part.keys)
    faults = tuple(fault for part in parts for fault in part.faults)
    return FrameBatch(img0, imgt, img1, timestep.to(device, non_blocking=True), keys, flow_t0, flow_t1, faults)


def _join(tensors: Sequence[Tensor], device: torch.device, divisor: float = 1) -> tuple[Tensor, ...]:
    """[n, K, H, W, C] each -> K of [B, C, H, W], float on the device, channels-last in memory."""
    count, sizes = sum(len(tensor) for tensor in tensors), tensors[0].shape[1:]
    joined = torch.empty(sizes[0], count, *sizes[1:], device=device)
    if device.type == "cpu":  # one sample after the other, which is still in the cache when it is divided
        tensors = [sample for tensor in tensors for sample in tensor.split(1)]
    start = 0
    for tensor in tensors:
        place = joined[:, start : start + len(tensor)]
        place.copy_(tensor.to(device, non_blocking=True).transpose(0, 1))
        if divisor != 1:
            place /= divisor
        start += len(tensor)
    return joined.permute(0, 1, 4, 2, 3).unbind()


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """A folder to train on."""

    folder: ShardFolder
    index: Index
    sequence: SequenceKind
    before: int
    """Samples in the folders before it: no two samples of a run have the same `before` + number."""


class _Stream(IterableDataset):
    """One worker's share of a rank's training batches, from a position on and without end, as a pipeline of webdataset stages.

    `lanes` `[accumulation, batch_size]`: the places of the global batch that the rank owns.
    """

    def __init__(
        self,
        sets: Sequence[TrainingSet],
        config: DataConfig,
        seed: int,
        plan: Plan,
        lanes: np.ndarray,
        start: Position,
        with_flow: bool,
    ) -> None:
        self.sets, self.config, self.seed, self.plan, self.lanes, self.start = sets, config, seed, plan, lanes, start
        self.with_flow = with_flow

    def __iter__(self) -> Iterator[_Part]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        readers = [ShardReader(s.folder, s.index, self.with_flow, any_triplet=s.sequence != "middle") for s in self.sets]
        lanes = np.array_split(self.lanes, workers, axis=1)[number]
        pipeline = wds.DataPipeline(
            lambda: self._planned(lanes),
            lambda planned: (self._sample(readers, *place) for place in planned),
            wds.map(lambda sample: augment_sample(sample, self.config), handler=wds.reraise_exception),
            wds.batched(lanes.shape[1], collation_fn=functools.partial(collate, in_turn=True), partial=False),
        )
        return iter(pipeline)

    def _planned(self, lanes: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """(epoch, set, number in the set, pass through the set) in the order in which this worker gives them."""
        for epoch, samples in self.plan.walk(self.start, lanes.ravel()):
            for place in zip(*(column.tolist() for column in samples), strict=True):
                yield epoch, *place

    def _sample(self, readers: Sequence[ShardReader], epoch: int, which: int, number: int, passes: int) -> dict[str, Any]:
        """A decoded sample, or another one where it can't be used, with what `augment_sample` draws by."""
        training_set = self.sets[which]
        key = (self.seed, passes, training_set.before + number)
        # the two further words keep these draws apart from those of the augmentation, which are older
        triplet = draw_triplet(np.random.default_rng((*key, 0, 1)), training_set.index.frames, training_set.sequence)
        sample = usable_sample(readers[which], number, self.seed, passes, triplet)
        crop = crop_at(self.config, epoch)
        frames = [shrink(frame, triplet.divisor, crop) for frame in sample["frames"]]
        return sample | {"frames": frames, "__draw__": key, "__crop__": crop}


class TrainingLoader:
    """Endless batches of one rank on its device, `accumulation` of them a step; `with_flow` reads the stored flow, too."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        device: torch.device,
        *,
        accumulation: int,
        rank: int = 0,
        world: int = 1,
        with_flow: bool = False,
    ) -> None:
        self.config, self.seed, self.device, self.with_flow = config, seed, device, with_flow
        self.sets = training_sets(config, with_flow)
        share = config.batch_size * accumulation
        self.plan = Plan(
            [[shard.samples for shard in training_set.index.shards] for training_set in self.sets],
            seed,
            share * world,
            ratio=folder_ratio(config),
            shuffle_shards=config.shuffle_shards,
            lane_bundle=config.lane_bundle,
            remainder=config.remainder,
        )
        if not self.plan.steps_per_epoch:
            folders = " and ".join(config.data_path)
            raise ConfigError(
                f"{folders} has {self.plan.samples} samples an epoch, fewer than the global batch of {share * world}: "
                f"take a smaller --batch_size or --global_batch, more data, or --remainder pad"
            )
        # the processes of a machine share its cache
        check_cache_holds(self.sets, config, share * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.lanes = np.arange(rank * share, (rank + 1) * share).reshape(accumulation, config.batch_size)

    def regroup(self, batch_size: int, accumulation: int) -> None:
        """Give each step's samples in so many batches of this size; which samples these are stays the same."""
        self.config = dataclasses.replace(self.config, batch_size=batch_size)
        self.lanes = self.lanes.reshape(accumulation, batch_size)

    def batches(self, start: Position = START) -> Iterator[FrameBatch]:
        """Batches from a position on, for ever."""
        workers = min(self.config.num_workers, self.config.batch_size)
        stream = _Stream(self.sets, self.config, self.seed, self.plan, self.lanes, start, self.with_flow)
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=_PREFETCH if workers else None,
            generator=_own_generator(),
            worker_init_fn=_outlast_signals,
        )
        parts = iter(loader)
        # what comes again would be mapped anew if it were let go; for a GPU a thread copies it, and maps it
        mapped = deque[Tensor](maxlen=0 if self.device.type == "cuda" else workers * (_PREFETCH + 2))
        while True:
            # the loader takes its workers in turn, and each gives its share of the same batch
            given = [next(parts) for _ in range(max(1, workers))]
            mapped.extend(part.frames for part in given)
            yield to_device(given, self.device)


def _own_generator() -> torch.Generator:
    """For the number that a DataLoader draws for its workers: from the global generator it would change what training draws."""
    return torch.Generator().manual_seed(0)


def _outlast_signals(_: int) -> None:
    """Ctrl-C and the signals of launchers go to the whole group of a process, and those of some clusters to all that it has
    started: training, told to stop, needs its loader processes for the step that it is in. They end when it does or says so.
    """
    os.setpgrp()
    for number in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    """Which ends its loader processes by SIGTERM; by whom a signal comes is not known to handlers."""
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
        pass
    os._exit(0)


def training_sets(config: DataConfig, with_flow: bool) -> list[TrainingSet]:
    """The folders of --data_path, checked before training: frames hold the crop, flow is there where it is wanted."""
    sequences = config.sequence * len(config.data_path) if len(config.sequence) == 1 else config.sequence
    sets: list[TrainingSet] = []
    for path, sequence in zip(config.data_path, sequences, strict=True):
        folder = shard_folder(path, cache_at(config.cache_dir, config.cache_gb))
        index = folder.read_index()
        check_frames_fit(index, folder, config)
        check_has_middle(index, folder, sequence)
        if with_flow:
            check_has_flow(index, folder)
            if sequence != "middle":
                raise ConfigError(
                    f"--sequence {sequence} does not go with --distill_weight: the flow stored in {folder} starts from the "
                    f"middle frame; take --sequence middle"
                )
        sets.append(TrainingSet(folder, index, sequence, sum(other.index.samples for other in sets)))
    return sets


def check_cache_holds(sets: Sequence[TrainingSet], config: DataConfig, lanes: int) -> None:
    """Raise StorageError when the shards that so many lanes read at a time don't fit into the cache."""
    blocks = -(-lanes // config.lane_bundle)
    for training_set in sets:
        sizes = sorted(shard.bytes for shard in training_set.index.shards)
        needed = sum(sizes[-blocks * config.shuffle_shards :])
        training_set.folder.check_room(needed, f"lower --shuffle_shards {config.shuffle_shards}")


def check_frames_fit(index: Index, folder: ShardFolder, config: DataConfig) -> None:
    """Raise before training, not in the middle of it, when frames don't hold the largest crop."""
    if min(index.min_size) < config.largest_crop:
        height, width = index.min_size
        given = f"--curriculum_crops goes up to {config.largest_crop}" if config.curriculum else f"--crop is {config.crop}"
        raise FrameTooSmallError(
            f"{folder} has frames as small as {height}x{width} (height x width) but {given}: "
            f"{crop_advice(height, width, config)}"
        )


def check_has_flow(index: Index, folder: ShardFolder) -> None:
    """Raise ConfigError when no flow is stored beside the samples."""
    if not index.has_flow:
        raise ConfigError(
            f"--distill_weight needs flow stored beside the samples, and {folder} has none: leave it out, or make shards with "
            f"flow (`python -m shards.synthetic` stores it; shards/schema.py says how a teacher's flow is stored)"
        )


class _Whole(IterableDataset):
    """Whole frames of the given samples, one a batch, dealt to the workers in turn."""

    def __init__(self, folder: ShardFolder, index: Index, numbers: Sequence[int], with_flow: bool) -> None:
        self.folder, self.index, self.numbers, self.with_flow = folder, index, numbers, with_flow

    def __iter__(self) -> Iterator[_Part]:
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
    """Whole frames, unchanged, one sample a batch: the samples with these numbers in this order, by default all of a folder."""
    folder = shard_folder(folder)
    index = folder.read_index()
    check_has_middle(index, folder)
    if with_flow:
        check_has_flow(index, folder)
    numbers = range(index.samples) if numbers is None else numbers
    whole = _Whole(folder, index, numbers, with_flow)
    loader = DataLoader(
        whole, batch_size=None, num_workers=min(workers, len(numbers)), generator=_own_generator(),
        worker_init_fn=_outlast_signals,
    )  # fmt: skip
    for batch in loader:
        yield to_device([batch], device)


def evenly_spaced(samples: int, count: int | None) -> list[int]:
    """`count` sample numbers spread over 0 … samples-1, so that a few of them come from every part of a folder; None: all."""
    count = samples if count is None else min(count, samples)
    return [number * samples // count for number in range(count)]
