"""How far is what was exported from the original? Both are asked for frames between moving photographs, at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shards.synthetic_scene import scene
from vfi.model_card import Difference

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
CASES = ((1, 64, 96), (2, 75, 113), (1, 32, 200), (1, 288, 512))
"""Batch, height and width: odd sides, the smallest side, and more tokens at stride 8 than a chunk of chunks has (4096)."""
_MAX_MOTION = 12.0


def compare(original: Run, exported: Run) -> Iterator[Difference]:
    """What two functions `(img0, img1, timestep) -> imgt` make of the same frames, on a CPU, for each of CASES."""
    for batch, height, width in CASES:
        img0, img1 = moving_photographs(batch, height, width)
        timestep = torch.linspace(0.25, 0.5, batch)
        with torch.no_grad():
            away = (original(img0, img1, timestep) - exported(img0, img1, timestep)).abs()
        yield Difference(f"{batch} of {width}x{height}", away.max().item(), away.mean().item())


def moving_photographs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """[batch, 3, height, width] each: the beginning and the end of drawn scenes."""
    scenes = [scene(0, "val", number, height, width, _MAX_MOTION) for number in range(batch)]
    img0, img1 = (torch.stack([torch.from_numpy(one.render(t)) for one in scenes]) for t in (0.0, 1.0))
    return img0.permute(0, 3, 1, 2) / 255, img1.permute(0, 3, 1, 2) / 255
