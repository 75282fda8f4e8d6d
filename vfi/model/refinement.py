"""RefineNet: a decoder from the features of both frames to the mask and residual colour of the in-between frame."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from vfi.config.configs import ModelConfig
from vfi.model.backbone import LEVELS, level_widths, of_each_frame
from vfi.model.layers import ConvPReLU, ResidualBlock, scaled_conv, zero
from vfi.ops.pointwise.dispatch import FusedOpsModule
from vfi.ops.warp.warp import resize_flow

_REACH = 4  # receptive radius in rows of a level, including the head at level 0: up to four 3x3 convolutions
_BAND_PIXELS = 2**20  # of a pair, at level 0: half as many as 1080p has, which is still refined as a whole


class LazyWarpedFeatures(Sequence[Tensor]):
    """Features of each level, warped on access, so that only those of one level are in memory at a time.

    `warp(x, flow, top)` has the signature of `backward_warp`; `flow` is that of the finest level.
    """

    def __init__(self, warp: Callable[..., Tensor], features: Sequence[Tensor], flow: Tensor) -> None:
        self.warp, self.features, self.flow = warp, features, flow

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, level: Any) -> Any:
        return self.warp(*self._with_flow(level))

    def in_rows(self, level: int) -> Callable[[int, int], Tensor]:
        """Return a function of (first, last) that warps rows first … last - 1 of a level; the flow is resized once, here."""
        features, flow = self._with_flow(level)
        return lambda first, last: self.warp(features, flow[:, :, first:last], first)

    def _with_flow(self, level: int) -> tuple[Tensor, Tensor]:
        features = self.features[level]
        return features, resize_flow(self.flow, (features.shape[2], features.shape[3]))


# lets code that collects or replaces the tensors among a module's inputs find these, too
register_pytree_node(
    LazyWarpedFeatures,
    lambda moved: ([list(moved.features), moved.flow], moved.warp),
    lambda given, warp: LazyWarpedFeatures(warp, *given),
)


class _Mix(nn.Sequential):
    """Refine concatenated maps, which it builds itself: maps passed as arguments would be kept alive by the caller."""

    def forward(self, maps: Callable[[], Tensor]) -> Tensor:
        take, refine = self
        refined: Tensor = refine(take(maps()))
        return refined


class RefineNet(FusedOpsModule):
    """Decode the features of both frames, coarse to fine, and at full size the frames, to mask logit and residual.

    `forward(features, images, timestep)`: `features` as the backbone returns them ([2B, C, h, w], finest first), `images`
    `[B, 6, H, W]` (both warped frames), `timestep` `[B]`; returns `[B, 1, H, W]` and `[B, 3, H, W]` in fp32. The last layer
    starts at zero, so an untrained network returns a plain cross-fade.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = level_widths(config)
        extra = [6] + [0] * (LEVELS - 2) + [1]  # the frames at level 0, the timestep at the coarsest level
        inputs = [2 * widths[level] + extra[level] for level in range(LEVELS)]
        for level in range(LEVELS - 1):
            inputs[level] += widths[level]  # from the level below
        self.mix = nn.ModuleList(
            _Mix(ConvPReLU(c_in, c_out), ResidualBlock(c_out)) for c_in, c_out in zip(inputs, widths, strict=True)
        )
        # 1x1 convolution and pixel shuffle: an upsampling with a deterministic backward pass on a GPU
        self.up = nn.ModuleList(
            nn.Sequential(scaled_conv(widths[level + 1], 4 * widths[level], 1), nn.PixelShuffle(2))
            for level in range(LEVELS - 1)
        )
        self.head = nn.Conv2d(widths[0], 4, 3, 1, 1)
        zero(self.head.weight, self.head.bias)

    def forward(self, features: Sequence[Tensor], images: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        coarsest = of_each_frame(features[-1])
        time = timestep.view(-1, 1, 1, 1).expand(-1, 1, *coarsest[0].shape[2:])
        x = self.mix[-1](lambda: self._stacked(None, *coarsest, time))
        for level in range(LEVELS - 2, 0, -1):
            x = self._mixed(level, x, features)
        mask_logit, residual = self._mixed(0, x, features, (images,), lambda x: self.head(x).float()).split((1, 3), dim=1)
        return mask_logit, residual

    def _mixed(
        self,
        level: int,
        below: Tensor,
        features: Sequence[Tensor],
        images: tuple[Tensor, ...] = (),
        then: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        """Return `then` of a refined level. Large maps without gradients go in bands of rows, with the same results."""
        H, W = (2 * side for side in below.shape[2:])
        pixels = _BAND_PIXELS >> level  # the same memory at each level: twice the channels, a quarter of the pixels
        if self.pointwise is None or torch.is_grad_enabled() or 2 * pixels >= H * W:
            return then(self.mix[level](lambda: self._beside(level, below, *of_each_frame(features[level]), *images)))

        maps = (
            features.in_rows(level) if isinstance(features, LazyWarpedFeatures) else functools.partial(_rows, features[level])
        )

        def band(first: int, last: int) -> Tensor:
            rest = (_rows(image, first, last) for image in images)
            return self._beside(level, _rows(below, first // 2, last // 2), *of_each_frame(maps(first, last)), *rest)

        rows, bands = max(2, pixels // W // 2 * 2), []  # even, because the level below has half as many
        for top in range(0, H, rows):
            first, last = max(0, top - _REACH), min(H, top + rows + _REACH)
            mixed = then(self.mix[level](functools.partial(band, first, last)))
            bands.append(mixed[:, :, top - first : min(H, top + rows) - first])
        return torch.cat(bands, dim=2)

    def _beside(self, level: int, below: Tensor, *parts: Tensor) -> Tensor:
        """Concatenate the upsampled map from the level below and maps of this level."""
        up = self.up[level]
        assert isinstance(up, nn.Sequential)
        return self._stacked(up[0](below), *parts)

    def _stacked(self, shuffled: Tensor | None, *parts: Tensor) -> Tensor:
        """Concatenate the pixel shuffle of `shuffled` and `parts` in the dtype of the first."""
        dtype = (parts[0] if shuffled is None else shuffled).dtype
        if self.pointwise is not None:
            return self.pointwise.concat_channels(parts, dtype, shuffled)
        below = () if shuffled is None else (F.pixel_shuffle(shuffled, 2),)
        return torch.cat((*below, *(part.to(dtype) for part in parts)), dim=1)


def _rows(maps: Tensor, first: int, last: int) -> Tensor:
    return maps[:, :, first:last]
