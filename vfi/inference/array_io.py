"""Conversion between the types of frames that programs pass and the tensors of the network.

    first, last, kind = read_pair(img0, img1, device)     # [B, 3, H, W] float32 in [0, 1] on `device`
    kind.to_output(imgt)  # like img0: array or tensor, dtype, device, single frame or batch

| input | shape | values |
| --- | --- | --- |
| NumPy array | [H, W, 3] or [B, H, W, 3] | uint8, uint16: full range · float16, float32, float64: 0 … 1 |
| torch tensor | [3, H, W] or [B, 3, H, W] | uint8: full range · float16, bfloat16, float32, float64: 0 … 1 |
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vfi.errors import JobError
from vfi.model.interpolator import MIN_SIZE

Frames = TypeVar("Frames", np.ndarray, Tensor)
"""A frame or a batch of frames, as an array or a tensor."""
_ARRAY_TYPES = ("uint8", "uint16", "float16", "float32", "float64")
_TENSOR_TYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FrameFormat(NamedTuple):
    """The type of the given frames."""

    like: np.ndarray | Tensor
    """The first frame of the pair, as it was given."""
    top: int
    """The value that means 1; above 1 for integer types."""

    def to_output(self, frames: Tensor) -> Any:
        """Convert `[B, 3, H, W]` float32 in [0, 1] to frames of this type; integers are rounded."""
        frames = (frames * self.top).round() if self.top > 1 else frames
        frames = frames if self.like.ndim == 4 else frames[0]
        if isinstance(self.like, Tensor):
            return frames.to(self.like.device, self.like.dtype)
        return frames.movedim(-3, -1).contiguous().cpu().numpy().astype(self.like.dtype)


def read_pair(img0: Any, img1: Any, device: torch.device) -> tuple[Tensor, Tensor, FrameFormat]:
    """Return both frames of each pair, `[B, 3, H, W]` float32 in [0, 1] on `device`, and their original type.

    Raises JobError for what is neither array nor tensor, and for unsupported types, shapes, sizes, values or devices.
    """
    for name, image in (("img0", img0), ("img1", img1)):
        _check_type(name, image)
        _check_shape(name, image)
    _check_alike(img0, img1)
    top = _top(img0)
    if top == 1:
        for name, image in (("img0", img0), ("img1", img1)):
            _check_range(name, image)
    return _tensor(img0, top, device), _tensor(img1, top, device), FrameFormat(img0, top)


def _check_type(name: str, image: Any) -> None:
    if isinstance(image, Tensor):
        if image.dtype not in _TENSOR_TYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TENSOR_TYPES)
            raise JobError(
                f"{name} is a tensor of {image.dtype}; allowed are {allowed}: convert it, floats lie between 0 and 1"
            )
    elif isinstance(image, np.ndarray):
        if image.dtype.name not in _ARRAY_TYPES:
            raise JobError(
                f"{name} is an array of {image.dtype}; allowed are {', '.join(_ARRAY_TYPES)}: convert it, floats lie between "
                f"0 and 1"
            )
    else:
        raise JobError(
            f"{name} is a {type(image).__name__}; give a NumPy array [H, W, 3] or a torch tensor [3, H, W], such as "
            f"numpy.asarray(image) of a picture"
        )


def _check_shape(name: str, image: np.ndarray | Tensor) -> None:
    shape, tensor = list(image.shape), isinstance(image, Tensor)
    kind, one, channels = ("a tensor", "[3, H, W]", -3) if tensor else ("an array", "[H, W, 3]", -1)
    if len(shape) not in (3, 4) or shape[channels] != 3:
        other = -1 if tensor else -3
        turn = "image.movedim(-1, -3)" if tensor else "numpy.moveaxis(image, -3, -1)"
        advice = "three channels, red, green and blue, without a transparency"
        if len(shape) in (3, 4) and shape[other] == 3:
            advice = f"{turn} moves the colours there"
        raise JobError(f"{name} is {kind} {shape}; {kind} must be {one}, or with a batch before it: {advice}")
    height, width = shape[-2:] if tensor else shape[-3:-1]
    if min(height, width) < MIN_SIZE:
        raise JobError(
            f"{name} is {width}x{height} (width x height); each side must be at least {MIN_SIZE}: enlarge the frames, or "
            f"repeat their borders"
        )
    if len(shape) == 4 and shape[0] == 0:
        raise JobError(f"{name} is {kind} {shape}: a batch must hold at least one frame")


def _check_alike(img0: Any, img1: Any) -> None:
    """Raise JobError unless both have the same container, dtype, shape and device."""
    if isinstance(img0, Tensor) != isinstance(img1, Tensor):
        raise JobError(
            f"img0 is a {type(img0).__name__} and img1 a {type(img1).__name__}: give both as arrays or both as tensors"
        )
    if img0.dtype != img1.dtype:
        raise JobError(f"img0 is of {img0.dtype} and img1 of {img1.dtype}: give both in one type")
    if img0.shape != img1.shape:
        raise JobError(
            f"img0 is {list(img0.shape)} and img1 {list(img1.shape)}: both must have one shape; crop or resize one of them"
        )
    if isinstance(img0, Tensor) and img0.device != img1.device:
        raise JobError(f"img0 is on {img0.device} and img1 on {img1.device}: move one of them, img1.to(img0.device)")


def _check_range(name: str, image: np.ndarray | Tensor) -> None:
    """Raise JobError for floats outside [0, 1], which includes NaN."""
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        advice = "clamp it" if low > -1 and high < 2 else "divide it by 255, or give whole numbers as uint8"
        if not (np.isfinite(low) and np.isfinite(high)):
            advice = "it holds values that are not finite"
        raise JobError(f"{name} has values from {low:g} to {high:g}; floats must lie between 0 and 1: {advice}")


def _top(image: np.ndarray | Tensor) -> int:
    if isinstance(image, Tensor):
        return 255 if image.dtype == torch.uint8 else 1
    return int(np.iinfo(image.dtype).max) if image.dtype.kind == "u" else 1


def _tensor(image: np.ndarray | Tensor, top: int, device: torch.device) -> Tensor:
    if isinstance(image, Tensor):
        whole = image.detach().to(device)
    else:  # copy, whatever the strides, byte order and write protection; uint16 as float32, as torch supports it poorly
        whole = torch.tensor(np.ascontiguousarray(image, np.uint8 if image.dtype == np.uint8 else np.float32)).to(device)
        whole = whole.movedim(-1, -3)
    return (whole if whole.ndim == 4 else whole[None]).float() / top
