"""Render rich synthetic scenes: layers in linear light, shutter, changing light and noise, with exact flow.

    frame = drawn.render(0.5)        # uint8 [H, W, 3], rendered from scratch at that time
    flow_t0 = drawn.flow(0.5, 0.0)   # float32 [H, W, 2], the sharp geometric motion

A frame is the mean of several samples, each with its own time within the open shutter and its own position within the pixels,
so that one mean gives motion blur and smooth edges. The shutter is open symmetrically about the frame's time, so the flow,
which is that of the scene at exactly this time, points along the middle of the blur. Light, noise and shadows do not move
anything, so flow ignores them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import cv2
import numpy as np

from shards.rich_motion import Camera, Sheet, Track, place, project, source, unbend

SOLID = 0.5  # alpha above which a layer hides what is behind it, as far as flow is concerned


@dataclasses.dataclass(frozen=True)
class Layer:
    """A painted sheet. `raster` is float32 [h, w, 4]: linear red, green and blue times alpha, and alpha."""

    sheet: Sheet
    raster: np.ndarray
    to_raster: np.ndarray  # 3x3, from plane coordinates to indices of the raster (the first pixel's centre is at 0, 0)
    endless: bool = False  # mirrored beyond its raster, so that it fills every frame: the backdrop
    shadow: bool = False  # darkens what lies behind it and is not visible itself
    gain: Track | None = None  # (1): relative change of its light over time

    @functools.cached_property
    def corners(self) -> np.ndarray:
        """Return the corners of the part of the plane that may be painted, as columns of homogeneous coordinates: [3, 4]."""
        scale = np.sqrt(abs(np.linalg.det(self.to_raster[:2, :2])))
        reach = 1 + scale * sum(abs(ripple.amplitude) for ripple in self.sheet.ripples)
        height, width = self.raster.shape[:2]
        left, right, top, bottom = -reach, width - 1 + reach, -reach, height - 1 + reach
        return np.linalg.inv(self.to_raster) @ [[left, left, right, right], [top, bottom, top, bottom], [1, 1, 1, 1]]


@dataclasses.dataclass(frozen=True)
class Light:
    """Light and noise of the whole picture. Tracks hold one value for each of red, green and blue."""

    gain: Track
    offset: Track
    vignette: float  # fraction of the light that is missing in the corners
    noise: float  # standard deviation in levels of 255
    seed: int  # of the noise


@dataclasses.dataclass(frozen=True)
class RichScene:
    """Layers from back to front, and the camera that views them."""

    height: int
    width: int
    camera: Camera
    layers: tuple[Layer, ...]
    light: Light
    shutter: float  # duration for which it is open, in units of t
    samples: int  # number of samples averaged into a frame; a multiple of 4

    def render(self, t: float) -> np.ndarray:
        """Return the frame at time t in [0, 1]: RGB uint8 [H, W, 3]."""
        total = np.zeros((self.height, self.width, 4), np.float32)
        for part, (dx, dy) in enumerate(itertools.islice(itertools.cycle(_SPOTS), self.samples)):
            total += self._sample(t + self.shutter * ((part + 0.5) / self.samples - 0.5), dx, dy)
        return self._expose(cv2.cvtColor(total, cv2.COLOR_RGBA2RGB) / np.float32(self.samples), t)

    def visible(self, t: float) -> np.ndarray:
        """Return the number of the layer visible at each pixel's centre at time t: int [H, W], 0 is the backdrop."""
        seen = np.zeros((self.height, self.width), dtype=np.int64)
        for number, layer in enumerate(self.layers):
            if not layer.shadow:
                look = _look_up(layer.sheet.matrix(self.camera.matrix(t), t), layer, t, self.width, self.height)
                if look is not None:
                    (x, y, w, h), colours = look
                    seen[y : y + h, x : x + w][colours[..., 3] > SOLID] = number
        return seen

    def flow(self, t: float, to: float) -> np.ndarray:
        """Return the flow from t to `to` of the point visible at each pixel's centre: float32 [H, W, 2], (dx, dy) in pixels."""
        seen = self.visible(t)
        flow = np.zeros((self.height, self.width, 2), np.float32)
        for number in np.unique(seen):
            y, x = np.nonzero(seen == number)
            pixels = np.stack([x + 0.5, y + 0.5], axis=-1)
            sheet = self.layers[number].sheet
            points = source(self.camera.matrix(t), sheet, pixels, t)
            flow[y, x] = place(self.camera.matrix(to), sheet, points, to) - pixels
        return flow

    def _sample(self, t: float, dx: float, dy: float) -> np.ndarray:
        """Return the sharp picture at time t, sampled at (dx, dy) from the pixels' centres: float32 [H, W, 4]."""
        view = np.array([[1, 0, -dx], [0, 1, -dy], [0, 0, 1]]) @ self.camera.matrix(t)
        canvas = np.zeros((self.height, self.width, 4), np.float32)
        planes: dict[tuple[int, int], np.ndarray] = {}  # shared by the limbs of a figure
        for layer in self.layers:
            sheet = layer.sheet
            key = id(sheet.body), id(sheet.basis)
            if key not in planes:
                planes[key] = sheet.stand(view, t)
            look = _look_up(sheet.hinge(planes[key], t), layer, t, self.width, self.height)
            if look is None:
                continue
            (x, y, w, h), colours = look
            if layer.gain is not None:
                gain = 1 + layer.gain.at(t)[0]
                colours = colours * np.array([gain, gain, gain, 1], np.float32)
            if layer.endless:
                canvas = colours
            else:
                part = canvas[y : y + h, x : x + w]
                behind = 1 - cv2.extractChannel(colours, 3)
                cv2.add(cv2.multiply(part, cv2.merge([behind] * 4)), colours, part)
        return canvas

    def _expose(self, linear: np.ndarray, t: float) -> np.ndarray:
        """Convert linear light float32 [H, W, 3], which is overwritten, to uint8: light changes, gamma, noise, rounding."""
        light = self.light
        gain, offset = 1 + light.gain.at(t), light.offset.at(t)
        if (gain != 1).any():
            linear *= gain.astype(np.float32)
        if offset.any():
            linear += offset.astype(np.float32)
        if light.vignette:
            linear *= _vignette(self.height, self.width, light.vignette)[..., None]
        linear *= 65535
        steps = np.clip(linear + 0.5, 0, 65535, out=linear).astype(np.uint16)
        if not light.noise:
            return _encoding(np.uint8)[steps]
        rng = np.random.default_rng([light.seed, *np.frombuffer(np.float64(t).tobytes(), np.uint32).tolist()])
        levels = _encoding(np.float32)[steps]
        levels += rng.standard_normal(levels.shape, np.float32) * np.float32(light.noise)
        return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def linear_light(levels: np.ndarray) -> np.ndarray:
    """Return linear light in [0, 1] for sRGB levels in [0, 255]."""
    value = np.asarray(levels, np.float64) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


# Four positions in a pixel whose mean is that of the pixel's square; those next to each other in time are far apart.
_SPOTS = ((-0.25, -0.25), (0.25, 0.25), (0.25, -0.25), (-0.25, 0.25))


def _look_up(
    matrix: np.ndarray, layer: Layer, t: float, width: int, height: int
) -> tuple[tuple[int, int, int, int], np.ndarray] | None:
    """Return the box (x, y, w, h) of the frame that a layer may touch, and its colours there; None if it touches none.

    `matrix` maps from the layer's plane to pixels at time t.
    """
    sheet = layer.sheet
    box = (0, 0, width, height) if layer.endless else _box(matrix @ layer.corners, width, height)
    if box is None:
        return None
    x, y, w, h = box
    border = cv2.BORDER_REFLECT_101 if layer.endless else cv2.BORDER_CONSTANT
    matrix = np.array([[1, 0, -0.5 - x], [0, 1, -0.5 - y], [0, 0, 1]]) @ matrix
    if not sheet.ripples:
        back = layer.to_raster @ np.linalg.inv(matrix)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return box, cv2.warpPerspective(layer.raster, back, (w, h), flags=flags, borderMode=border)
    columns, rows = np.arange(w, dtype=np.float32)[None], np.arange(h, dtype=np.float32)[:, None]
    points = unbend(sheet, *project(np.linalg.inv(matrix), columns, rows, signed=True), t)
    spots = project(layer.to_raster, *points, signed=True)
    return box, cv2.remap(layer.raster, *spots, cv2.INTER_LINEAR, borderMode=border)


def _box(corners: np.ndarray, width: int, height: int) -> tuple[int, int, int, int] | None:
    """Return the box (x, y, w, h) of the frame around homogeneous pixels [3, 4]; None if it lies outside of the frame."""
    if corners[2].min() <= 0:  # a part lies behind the camera
        return 0, 0, width, height
    x, y = (corners[:2] / corners[2]).tolist()
    x0, x1 = max(int(min(x)) - 1, 0), min(int(max(x)) + 2, width)
    y0, y1 = max(int(min(y)) - 1, 0), min(int(max(y)) + 2, height)
    return (x0, y0, x1 - x0, y1 - y0) if x0 < x1 and y0 < y1 else None


@functools.lru_cache(maxsize=4)
def _vignette(height: int, width: int, missing: float) -> np.ndarray:
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    return (1 - missing * (x * x + y * y) / 2).astype(np.float32)


@functools.cache
def _encoding(dtype: type[np.uint8 | np.float32]) -> np.ndarray:
    """Return the sRGB levels in [0, 255] of the linear values 0, 1/65535 … 1, rounded if `dtype` is uint8: [65536]."""
    value = np.arange(65536) / 65535
    levels = 255 * np.where(value <= 0.0031308, value * 12.92, 1.055 * value ** (1 / 2.4) - 0.055)
    return (np.rint(levels) if dtype is np.uint8 else levels).astype(dtype)
