"""How is a model asked and measured by the rules of a protocol? Frames are padded, predicted, cut, rounded, compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.errors import JobError
from vfi.metrics import interpolation_error, psnr, psnr_in, ssim_matlab, ssim_skimage
from vfi.protocols import Prepare, Rules

Ask = Callable[[Tensor, Tensor, Tensor], Tensor]
"""img0, img1 `[1, 3, H, W]` in [0, 1], timestep `[1]` -> imgt."""

Step = Callable[[Tensor, Tensor, float], Tensor]
Lpips = Callable[[Tensor, Tensor], Tensor]
"""prediction, truth `[1, 3, H, W]` in [0, 1] -> `[1]`; vfi/lpips.py."""


class Score(NamedTuple):
    """Of one predicted frame."""

    psnr: float
    """dB."""
    ssim: float
    """Of the kind that the rules name."""
    ie: float
    """Interpolation error, on 0 … 255."""
    psnr_moving: float | None = None
    """dB, of the pixels that move."""
    lpips: float | None = None


def prepare(frame: np.ndarray, how: Prepare, device: torch.device) -> Tensor:
    """A frame `[H, W, 3]` uint8 as the protocol wants it: `[1, 3, H, W]` float in [0, 1].

    `half size` is the mean over squares of 2x2 pixels, in floats or rounded half up to 8 bits (OpenCV's INTER_AREA for either
    type); `centre crop` leaves half of each side.
    """
    height, width = frame.shape[:2]
    if how != "as they are" and (height % 4 or width % 4):
        raise JobError(f"{how} needs sides that are multiples of 4, and a frame has {height}x{width}")
    if how == "centre crop":
        frame = frame[height // 4 : -height // 4, width // 4 : -width // 4]
    image = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1).unsqueeze(0).float()
    if how.startswith("half size"):
        image = F.avg_pool2d(image, 2)
        if how == "half size, rounded":
            image = (image + 0.5).floor()
    return image / 255


def predict_between(ask: Ask, img0: Tensor, img1: Tensor, timesteps: Sequence[float], rules: Rules, tta: bool) -> list[Tensor]:
    """The frames at these timesteps, of the inputs' size.

    `tta`: each is the mean of the prediction and of that of the inputs turned by 180 degrees, turned back.
    """
    left, right, top, bottom = rules.padding.amounts(*img0.shape[-2:]) if rules.padding else (0, 0, 0, 0)
    mode = "constant" if rules.padding and rules.padding.mode == "zeros" else "replicate"
    first, last = (F.pad(image, (left, right, top, bottom), mode=mode) for image in (img0, img1))

    def step(first: Tensor, last: Tensor, timestep: float) -> Tensor:
        time = torch.full((1,), timestep, device=first.device)
        found = ask(first, last, time)
        return (found + ask(first.flip(2, 3), last.flip(2, 3), time).flip(2, 3)) / 2 if tta else found

    if rules.recursive:
        found = _bisect(step, first, last, timesteps)
    else:
        found = [step(first, last, timestep) for timestep in timesteps]
    height, width = first.shape[-2:]
    return [frame[..., top : height - bottom, left : width - right] for frame in found]


def _bisect(step: Step, first: Tensor, last: Tensor, timesteps: Sequence[float]) -> list[Tensor]:
    """Frames at 1/2^n, 2/2^n …: each the middle of two that are there already."""
    count = len(timesteps) + 1
    if count & (count - 1) or list(timesteps) != [number / count for number in range(1, count)]:
        raise ValueError(f"bisecting finds 1, 3, 7 … evenly spaced frames, not those at {list(timesteps)}")
    if count == 1:
        return []
    half = [number / (count // 2) for number in range(1, count // 2)]
    middle = step(first, last, 0.5)
    return [*_bisect(step, first, middle, half), middle, *_bisect(step, middle, last, half)]


def score(prediction: Tensor, truth: Tensor, rules: Rules, moving: Tensor | None = None, lpips: Lpips | None = None) -> Score:
    """Compare two frames `[1, 3, H, W]` in [0, 1] by the rules; `moving` `[1, 1, H, W]` bool: the pixels that move."""
    seen = (prediction.float().clamp(0, 1) * 255).round() / 255 if rules.rounded else prediction
    similarity = ssim_matlab if rules.ssim == "ssim_matlab" else ssim_skimage
    return Score(
        psnr(seen, truth).item(),
        similarity(seen, truth).item(),
        interpolation_error(prediction, truth).item(),
        psnr_in(seen, truth, moving).item() if moving is not None and moving.any() else None,
        lpips(seen, truth).item() if lpips else None,
    )
