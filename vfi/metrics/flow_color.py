"""Colour coding of optical flow."""

from __future__ import annotations

import numpy as np

# The Middlebury wheel: positions of its six pure colours on a circle of 55 parts, from the right through down, left and up to
# red again
_CORNERS = (0, 15, 21, 25, 36, 49, 55)
_COLOURS = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0))


def flow_picture(flow: np.ndarray, longest: float | None = None) -> np.ndarray:
    """Convert a flow to colours: `[2, H, W]` (dx, dy) -> RGB uint8 `[H, W, 3]`.

    The wheel of the Middlebury benchmark (Baker et al., IJCV 2011): the hue is the direction (right is red, down yellow, left
    cyan to blue, up violet), the saturation is the length, and white is no motion. Lengths are relative to `longest`, beyond
    which the colour is fully saturated; by default the 99th percentile of this flow, so that two pictures differ in scale.
    """
    dx, dy = flow.astype(np.float64)
    length = np.hypot(dx, dy)
    # bounded by the smallest positive number: a flow that is zero in 99 % of the pixels shows the rest, without division by
    # zero
    scale = np.percentile(length, 99) if longest is None else longest
    saturation = np.minimum(length / max(scale, np.finfo(np.float64).tiny), 1)
    place = (np.arctan2(dy, dx) % (2 * np.pi)) / (2 * np.pi) * _CORNERS[-1]
    hue = np.stack([np.interp(place, _CORNERS, channel) for channel in zip(*_COLOURS, strict=True)], axis=-1)
    picture: np.ndarray = np.rint(255 * (1 - saturation[..., None] * (1 - hue))).astype(np.uint8)
    return picture
