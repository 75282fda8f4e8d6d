"""Interpolate frames of any size on any machine, whole or in tiles, and keep static regions unchanged.

    between = InterpolationEngine(Settings(model=Path("runs/base")))
    images = between(img0, img1, [0.25, 0.5, 0.75])      # RGB [H, W, 3]: uint8, uint16 or float32 in 0 … 1, like img0
    wait = between.start(img0, img1, [0.5])              # asynchronous on a GPU; wait() -> the images

Memory: on a GPU whole frames are tried, and tiles get smaller until they fit. On a CPU the operating system kills a program
that uses too much, so the need is estimated before anything is computed.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vfi.errors import JobError
from vfi.inference.flow_scale import auto_scale
from vfi.inference.loading import LoadedModel, check_scale, load
from vfi.inference.tiling import SMALLEST, smaller, tiled
from vfi.profiling.costs import count
from vfi.runtime.device import DeviceName, PrecisionName, pick_device, pick_precision
from vfi.runtime.memory import available_memory, free_memory, is_out_of_memory
from vfi.shipped import SHIPPED

GIB = 2**30
STILL, MOVES = 1.5 / 255, 4 / 255
"""Largest difference between two frames at which a place is static, and the one from which on it moves."""
_AROUND = 9  # side of the neighbourhood that must be static, too
_FADE = 5
_OUTSIDE = 0.75 * GIB  # memory of a GPU that CUDA and the code of kernels take apart from tensors: 0.7 GiB on an H100
_AMPLE = 2**15  # bytes per pixel, several times what the largest preset takes: with this much free no estimate is needed

Images = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which model, and how it is used."""

    model: Path | None = None
    """A run, folder, file or name that vfi.inference.loading.load accepts; None: the model that comes with the package."""
    device: DeviceName = "auto"
    precision: PrecisionName = "auto"
    scale: float | str | None = None
    """Estimate flow at this fraction of the frame size; "auto": chosen by size and motion; None: as trained."""
    tta: bool = False
    """Average with the prediction for the frames rotated by 180 degrees."""
    tile: int | None = None
    """Largest side of a tile; None: whole frames while they fit."""
    static_regions: bool = True
    """Keep regions that are the same in both frames unchanged in between."""
    max_memory: float | None = None
    """Memory limit in GiB, on a GPU including CUDA's own; None: what is free."""


class InterpolationEngine:
    """A model that interpolates between two frames."""

    def __init__(self, settings: Settings) -> None:
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.loaded: LoadedModel = load(settings.model or SHIPPED, self.device)
        self.settings, self.tile = settings, settings.tile
        self.lock = threading.Lock()
        self.seconds = 0.0
        """Total time for which the device was busy with finished calls."""
        self.bytes_per_pixel: float | None = None
        self.before: tuple[np.ndarray, Tensor] | None = None
        self.compiled = False
        if self.tile is not None and self.tile < SMALLEST:
            raise JobError(f"--tile {self.tile} must be at least {SMALLEST}")
        if settings.scale == "auto":
            check_scale(0.5, [self.loaded])  # raises for a model without flow
        elif isinstance(settings.scale, str):
            raise JobError(f"--scale {settings.scale}: choose auto, or a number")
        else:
            check_scale(settings.scale, [self.loaded])
        if settings.max_memory is not None:
            self._limit(settings.max_memory)

    def __call__(self, img0: np.ndarray, img1: np.ndarray, timesteps: Sequence[float | Fraction]) -> Images:
        """Return the frames at these timesteps in the type of the inputs; features are computed once for all.

        Raises JobError for frames that do not fit into memory even as tiles.
        """
        return self.start(img0, img1, timesteps)()

    def start(self, img0: np.ndarray, img1: np.ndarray, timesteps: Sequence[float | Fraction]) -> Callable[[], Images]:
        """Start the same computation; any thread may call the returned function, which waits for the frames."""
        first, last = self._upload(img0), self._upload(img1)
        self.before = (img1, last)
        clock = _Clock(self.device)
        on_gpu = self.device.type == "cuda"  # copies from unpinned memory would block
        times = torch.tensor([float(timestep) for timestep in timesteps], pin_memory=on_gpu)
        times = times.to(self.device, non_blocking=True)
        self._estimate(img0.shape[0], img0.shape[1])
        again = True
        while (found := self._if_it_fits(first, last, times)) is None:
            # CUDA graphs of other sizes hold memory that may be enough
            if not (self.loaded.graphs.drop() and again):
                self._step_down(img0.shape[0], img0.shape[1])
            again = False
            free_memory()
        if (top := _top(img0)) > 1:
            found = (found * float(top)).round().to(torch.uint8 if top == 255 else torch.int32)
        levels = found.permute(0, 2, 3, 1)
        if self.device.type == "cuda":
            there = torch.empty(levels.shape, dtype=levels.dtype, pin_memory=True)
            levels = there.copy_(levels, non_blocking=True)
        clock.stop()

        def wait() -> Images:
            seconds = clock.seconds()
            with self.lock:  # several pairs can be waited for concurrently
                self.seconds += seconds
            return list(levels.numpy().astype(img0.dtype, copy=False))

        return wait

    def _if_it_fits(self, first: Tensor, last: Tensor, times: Tensor) -> Tensor | None:
        """Return the frames, or None where memory does not suffice."""
        scale = auto_scale(first, last) if self.settings.scale == "auto" else self.settings.scale
        assert not isinstance(scale, str)

        def predict(first: Tensor, last: Tensor) -> Tensor:
            return self.loaded.predict_several(first, last, times, self.precision, scale)

        def made(first: Tensor, last: Tensor) -> Tensor:
            return tiled(predict, first, last, self.tile) if self.tile else predict(first, last)

        try:
            if not self.compiled:
                one = (..., slice(self.tile), slice(self.tile))
                self.loaded.compile_ahead(lambda: predict(first[one], last[one]))
                self.compiled = True
            found = made(first, last)
            if self.settings.tta:
                found = (found + made(first.flip(2, 3), last.flip(2, 3)).flip(2, 3)) / 2
            return keep_static_regions(found, first, last, times) if self.settings.static_regions else found
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None  # outside the handler: the error refers to stack frames, and they to their tensors

    def _step_down(self, height: int, width: int) -> None:
        side = smaller(self.tile or max(height, width))
        if side is None:
            raise JobError(
                f"{width}x{height} frames don't fit into the memory of the {self.device.type}, not even in tiles of "
                f"{self.tile} pixels: use a smaller model, or --device cpu"
            )
        tqdm.write(
            f"{width}x{height} frames don't fit into memory: they are made in tiles of at most {side}x{side} from now on",
            file=sys.stderr,  # standard output may be the video
        )
        self.tile = side

    def _estimate(self, height: int, width: int) -> None:
        """Choose tiles of a size that fits into the memory of a CPU."""
        if self.device.type != "cpu" or self.tile:
            return
        free = available_memory() if self.settings.max_memory is None else self.settings.max_memory * GIB
        if height * width * _AMPLE <= free:
            return
        if self.bytes_per_pixel is None:
            self.bytes_per_pixel = count(self.loaded.model, 1, (SMALLEST, SMALLEST), self.precision).peak_bytes / SMALLEST**2
        if height * width * self.bytes_per_pixel <= free:
            return
        need = height * width * self.bytes_per_pixel / GIB
        side = smaller(max(height, width))
        while side is not None and side * side * self.bytes_per_pixel > free:
            side = smaller(side)
        if side is None:
            raise JobError(
                f"{width}x{height} frames take up to {need:.1f} GiB, and tiles of {SMALLEST} pixels "
                f"{SMALLEST**2 * self.bytes_per_pixel / GIB:.1f}, of which {free / GIB:.1f} are free: use a smaller model"
            )
        self.tile = side
        tqdm.write(
            f"{width}x{height} frames would take up to {need:.1f} GiB of memory, of which {free / GIB:.1f} are free: they are "
            f"made in tiles of at most {side}x{side}",
            file=sys.stderr,
        )

    def _limit(self, gib: float) -> None:
        own = _OUTSIDE if self.device.type == "cuda" else 0.0
        limit = gib * GIB - own
        if limit <= 0:
            raise JobError(f"--max_memory {gib:g} must be above {own / GIB:g} (GiB)" + (", which CUDA takes" if own else ""))
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self.device)
            self.loaded.graphs.limit = limit

    def _upload(self, image: np.ndarray) -> Tensor:
        """Upload [H, W, 3] as [1, 3, H, W] in [0, 1]; the second frame of a pair is reused as the first of the next one."""
        if self.before is not None and self.before[0] is image:
            return self.before[1]
        on_gpu = self.device.type == "cuda"
        planes = image.strides[2] > image.strides[1]  # as frames of a video are; copying another order is slow
        laid = image.transpose(2, 0, 1) if planes else image
        whole = torch.empty(laid.shape, dtype=torch.uint8 if image.dtype == np.uint8 else torch.float32, pin_memory=on_gpu)
        np.copyto(whole.numpy(), laid)  # torch's copy waits for threads on all cores, which are busy with decoding and encoding
        whole = whole.to(self.device, non_blocking=True)
        whole = whole if planes else whole.permute(2, 0, 1)
        return whole[None].to(memory_format=torch.channels_last).float() / _top(image)


def _top(image: np.ndarray) -> int:
    """Return the value that means 1."""
    return 1 if image.dtype == np.float32 else np.iinfo(image.dtype).max


def keep_static_regions(made: Tensor, img0: Tensor, img1: Tensor, times: Tensor) -> Tensor:
    """Replace static regions of frames `[N, 3, H, W]` at `times` [N] by the mix of both inputs.

    A pixel is static where nothing changes in the pixels around it. A caption or a background then does not flicker, and grain
    that is the same in both inputs stays.
    """
    change = F.max_pool2d((img0 - img1).abs().amax(1, keepdim=True), _AROUND, 1, _AROUND // 2)
    weight = ((MOVES - change) / (MOVES - STILL)).clamp(0, 1)
    weight = F.avg_pool2d(weight, _FADE, 1, _FADE // 2, count_include_pad=False)
    return made + weight * (torch.lerp(img0, img1, times.view(-1, 1, 1, 1)) - made)


class _Clock:
    """Time for which the device works on what is started between construction and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self.began, self.ended = time.perf_counter(), 0.0
        if self.events:
            self.events[0].record()

    def stop(self) -> None:
        if self.events:
            self.events[1].record()
        self.ended = time.perf_counter()

    def seconds(self) -> float:
        """Wait for the end of the work and return its seconds."""
        if not self.events:
            return self.ended - self.began
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3
