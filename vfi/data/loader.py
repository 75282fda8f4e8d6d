"""The training loader: planned order -> read -> decode -> augment -> batch, the same for any number of workers.

Which samples a step sees is planned in sampler.py and depends on neither ranks nor workers; what is done to a sample is drawn
by (seed, pass through its folder, sample).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.schema import Index
from vfi.config.configs import ConfigError, DataConfig, SequenceKind, SmallFrames, folder_ratio
from vfi.data.augment import (
    FrameTooSmallError,
    apply_change,
    apply_change_to_flows,
    crop_advice,
    crop_at,
    draw_change,
    grow,
)
from vfi.data.batch import PREFETCH, BatchPart, FrameBatch, collate, to_device
from vfi.data.evaluation_loader import check_has_flow, outlast_signals, own_generator
from vfi.data.sampler import START, Plan, Position
from vfi.data.shard_cache import ShardFolder, cache_at, shard_folder
from vfi.data.shard_reader import ShardReader, check_has_middle, usable_sample
from vfi.data.triplet_sampling import draw_triplet, shrink


def augment_sample(sample: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Replace `frames`, `flows` and `timestep` of a sample by augmented ones."""
    height, width = sample["frames"][0].shape[:2]
    try:
        change = draw_change(np.random.default_rng(sample["__draw__"]), height, width, sample["__crop__"], config)
    except FrameTooSmallError as error:
        raise FrameTooSmallError(f"sample {sample['__key__']}: {error}") from error
    frames, timestep = apply_change(change, sample["frames"], sample["timestep"])
    return sample | {"frames": frames, "flows": apply_change_to_flows(change, sample["flows"]), "timestep": timestep}


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """A folder to train on."""

    folder: ShardFolder
    index: Index
    sequence: SequenceKind
    small_frames: SmallFrames
    before: int
    """Samples in the folders before it: no two samples of a run have the same `before` + number."""


class _Stream(IterableDataset):
    """One worker's share of a rank's training batches, from a position on and without end, as a pipeline of webdataset stages.

    `lanes` `[accumulation, batch_size]`: the batch slots that the rank owns.
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

    def __iter__(self) -> Iterator[BatchPart]:
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
        """Yield (epoch, set, number in the set, pass through the set) in the order in which this worker gives them."""
        for epoch, samples in self.plan.walk(self.start, lanes.ravel()):
            for place in zip(*(column.tolist() for column in samples), strict=True):
                yield epoch, *place

    def _sample(self, readers: Sequence[ShardReader], epoch: int, which: int, number: int, passes: int) -> dict[str, Any]:
        """Return a decoded sample, or a replacement where it can't be used, with the key of its augmentation."""
        training_set = self.sets[which]
        key = (self.seed, passes, training_set.before + number)
        # the two further words keep these draws apart from those of the augmentation, which are older
        triplet = draw_triplet(np.random.default_rng((*key, 0, 1)), training_set.index.frames, training_set.sequence)
        sample = usable_sample(readers[which], number, self.seed, passes, triplet)
        crop = crop_at(self.config, epoch)
        shrunk = (shrink(frame, triplet.divisor, crop) for frame in sample["frames"])
        frames = [grow(frame, crop, training_set.small_frames) for frame in shrunk]
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
                f"use a smaller --batch_size or --global_batch, more data, or --remainder pad"
            )
        # the processes of a machine share its cache
        check_cache_holds(self.sets, config, share * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.lanes = np.arange(rank * share, (rank + 1) * share).reshape(accumulation, config.batch_size)

    def regroup(self, batch_size: int, accumulation: int) -> None:
        """Give each step's samples in `accumulation` batches of this size; the samples stay the same."""
        self.config = dataclasses.replace(self.config, batch_size=batch_size)
        self.lanes = self.lanes.reshape(accumulation, batch_size)

    def batches(self, start: Position = START) -> Iterator[FrameBatch]:
        """Yield batches from a position on, without end."""
        workers = min(self.config.num_workers, self.config.batch_size)
        stream = _Stream(self.sets, self.config, self.seed, self.plan, self.lanes, start, self.with_flow)
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=PREFETCH if workers else None,
            generator=own_generator(),
            worker_init_fn=outlast_signals,
        )
        parts = iter(loader)
        # reused memory would be mapped again if it were released; for a GPU a thread copies it, and maps it
        mapped = deque[Tensor](maxlen=0 if self.device.type == "cuda" else workers * (PREFETCH + 2))
        while True:
            # the loader takes its workers in turn, and each gives its share of the same batch
            given = [next(parts) for _ in range(max(1, workers))]
            mapped.extend(part.frames for part in given)
            yield to_device(given, self.device)


def training_sets(config: DataConfig, with_flow: bool) -> list[TrainingSet]:
    """Return the folders of --data_path, after checking that frames hold the crop and that flow is stored if needed."""
    folders = len(config.data_path)
    sequences = config.sequence * folders if len(config.sequence) == 1 else config.sequence
    small_frames = config.small_frames * folders if len(config.small_frames) == 1 else config.small_frames
    sets: list[TrainingSet] = []
    for path, sequence, small in zip(config.data_path, sequences, small_frames, strict=True):
        folder = shard_folder(path, cache_at(config.cache_dir, config.cache_gb))
        index = folder.read_index()
        if small == "refuse":
            check_frames_fit(index, folder, config)
        elif with_flow:
            raise ConfigError(
                f"--small_frames {small} does not go with --distill_weight: the flow stored in {folder} stays small"
            )
        check_has_middle(index, folder, sequence)
        if with_flow:
            check_has_flow(index, folder)
            if sequence != "middle":
                raise ConfigError(
                    f"--sequence {sequence} does not go with --distill_weight: the flow stored in {folder} starts from the "
                    f"middle frame; use --sequence middle"
                )
        sets.append(TrainingSet(folder, index, sequence, small, sum(other.index.samples for other in sets)))
    return sets


def check_cache_holds(sets: Sequence[TrainingSet], config: DataConfig, lanes: int) -> None:
    """Raise StorageError when the shards that `lanes` batch slots read at a time don't fit into the cache."""
    blocks = -(-lanes // config.lane_bundle)
    for training_set in sets:
        sizes = sorted(shard.bytes for shard in training_set.index.shards)
        needed = sum(sizes[-blocks * config.shuffle_shards :])
        training_set.folder.check_room(needed, f"lower --shuffle_shards {config.shuffle_shards}")


def check_frames_fit(index: Index, folder: ShardFolder, config: DataConfig) -> None:
    """Raise FrameTooSmallError before training, not during it, when frames are smaller than the largest crop."""
    if min(index.min_size) < config.largest_crop:
        height, width = index.min_size
        given = f"--curriculum_crops goes up to {config.largest_crop}" if config.curriculum else f"--crop is {config.crop}"
        raise FrameTooSmallError(
            f"{folder} has frames as small as {height}x{width} (height x width) but {given}: "
            f"{crop_advice(height, width, config)}"
        )
