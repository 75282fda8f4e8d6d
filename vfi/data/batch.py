"""Batches of frames: samples are collated in a worker and joined on the device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vfi.data.augment import copy_pixels
from vfi.data.bad_samples import BadSample

PREFETCH = 4  # parts of batches that a loader process makes ahead


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
    flow_weight: Tensor | None = None
    """[B, 2, H, W] float32 in 0..1: how far flow_t0 and flow_t1 are to be trusted."""
    faults: tuple[BadSample, ...] = ()
    """What could not be used and was replaced by other samples of this batch."""


class BatchPart(NamedTuple):
    """A worker's share of a batch, in one tensor of frames: each tensor costs a file descriptor and a copy to the device."""

    frames: Tensor
    """[n, 3, H, W, 3] uint8: img0, imgt, img1 of each sample."""
    flows: Tensor | None
    """[n, 2, H, W, 3] float32: flow_t0, flow_t1, each with its weight."""
    timesteps: tuple[float, ...]
    keys: tuple[str, ...]
    faults: tuple[BadSample, ...]


def collate(samples: Sequence[dict[str, Any]], in_turn: bool = False) -> BatchPart:
    """Collate samples into a part of a batch, on the CPU; `in_turn` is explained at `_pieces`."""
    flows = np.array([sample["flows"] for sample in samples], dtype=np.float32)
    frames = _to_be_sent((len(samples), 3, *samples[0]["frames"][0].shape), in_turn)
    for place, sample in zip(frames.numpy(), samples, strict=True):
        for pixels, frame in zip(place, sample["frames"], strict=True):
            copy_pixels(frame, into=pixels)
    return BatchPart(
        frames,
        torch.from_numpy(flows) if flows.size else None,
        tuple(float(sample["timestep"]) for sample in samples),
        tuple(sample["__key__"] for sample in samples),
        tuple(fault for sample in samples for fault in sample.get("faults", ())),
    )


def _to_be_sent(shape: tuple[int, ...], in_turn: bool) -> Tensor:
    """Return a uint8 tensor to be filled, in a loader process in memory shared with the trainer, or torch would copy it there.

    It is new, or one of a few pieces used `in_turn`, whose pages are mapped already.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    return next(_pieces(shape)) if in_turn else _shared(shape)


@functools.lru_cache(maxsize=1)  # the crop may grow
def _pieces(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield pieces of shared memory in turn, for an endless sequence of parts.

    When a process makes one, the trainer takes the one PREFETCH before it and has copied those before that, so that no more
    than PREFETCH + 1 are in use.
    """
    return itertools.cycle(_shared(shape) for _ in range(PREFETCH + 2))


def _shared(shape: tuple[int, ...]) -> Tensor:
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def to_device(parts: Sequence[BatchPart], device: torch.device) -> FrameBatch:
    """Join the parts of a batch on the device and scale their colours to [0, 1]; frames are channels-last in memory."""

    img0, imgt, img1 = _join([part.frames for part in parts], device, divisor=255)
    flows = [part.flows for part in parts if part.flows is not None]
    flow_t0, flow_t1, flow_weight = _split_weights(*_join(flows, device)) if flows else (None, None, None)
    timestep = torch.tensor([timestep for part in parts for timestep in part.timesteps])
    if device.type == "cuda":  # from other memory the copy would wait for the device
        timestep = timestep.pin_memory()
    keys = tuple(key for part in parts for key in part.keys)
    faults = tuple(fault for part in parts for fault in part.faults)
    timestep = timestep.to(device, non_blocking=True)
    return FrameBatch(img0, imgt, img1, timestep, keys, flow_t0, flow_t1, flow_weight, faults)


def _split_weights(flow_t0: Tensor, flow_t1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split flows `[B, 3, H, W]` into two of `[B, 2, H, W]` and their weights `[B, 2, H, W]`."""
    return flow_t0[:, :2], flow_t1[:, :2], torch.stack((flow_t0[:, 2], flow_t1[:, 2]), dim=1)


def _join(tensors: Sequence[Tensor], device: torch.device, divisor: float = 1) -> tuple[Tensor, ...]:
    """Join tensors `[n, K, H, W, C]` into K of `[B, C, H, W]`, float on the device, channels-last in memory."""
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
