"""Simple synthetic scenes: a background and shapes, filled with photographs, that move, rotate, scale and occlude each other.

    drawn = scene(seed=0, split="train", number=7, height=128, width=192, max_motion=12.0)
    middle = drawn.render(0.5)         # uint8 [H, W, 3], rendered from scratch at that time
    flow_t0 = drawn.flow(0.5, 0.0)     # float32 [H, W, 2], exact

Coordinates are (x, y) in pixels; the centre of the first pixel is at (0.5, 0.5). Every map is affine, as a 3x3 matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from shards import codecs
from shards.schema import ShardError

PHOTOGRAPHS = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "page.png",
        "retina.jpg",
    ),
    "val": ("coffee.png", "coins.png", "gravel.png", "moon.png", "rocket.jpg", "text.png"),
}
SUPERSAMPLE = 2  # frames are rendered at twice their size and averaged down
MASK_DETAIL, MAX_MASK = 4, 4096  # a shape is drawn once, with 4 mask pixels per pixel of the frame, and then transformed
MASK_REACH = 1.25  # half of the mask's side, in units of the shape's radius


@dataclasses.dataclass(frozen=True)
class LayerMotion:
    """Rotation, scaling and translation at constant rates about a centre; t = 0 is the first frame, t = 1 the last."""

    centre: tuple[float, float]
    velocity: tuple[float, float]  # pixels over the whole sample
    turn: float  # radians over the whole sample
    growth: float  # relative size added over the whole sample

    def at(self, t: float) -> np.ndarray:
        """Return the 3x3 matrix from a point's position in the first frame to its position at time t."""
        (x, y), scale, angle = self.centre, 1 + self.growth * t, self.turn * t
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        dx, dy = x + self.velocity[0] * t, y + self.velocity[1] * t
        return np.array([[cos, -sin, dx - cos * x + sin * y], [sin, cos, dy - sin * x - cos * y], [0, 0, 1]])


@dataclasses.dataclass(frozen=True)
class Layer:
    """A part of a photograph, cut to a shape, and its motion. The matrices map from positions in the first frame."""

    photograph: Image.Image
    to_photograph: np.ndarray
    mask: Image.Image | None  # None for the background, which covers everything
    to_mask: np.ndarray
    motion: LayerMotion


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene of layers, ordered from back to front."""

    height: int
    width: int
    layers: tuple[Layer, ...]

    def render(self, t: float) -> np.ndarray:
        """Return the frame at time t in [0, 1]: RGB uint8 [H, W, 3]."""
        size = (self.width * SUPERSAMPLE, self.height * SUPERSAMPLE)
        shrink = np.diag([1 / SUPERSAMPLE, 1 / SUPERSAMPLE, 1])
        canvas = Image.new("RGB", size)
        for layer in self.layers:
            back = np.linalg.inv(layer.motion.at(t)) @ shrink
            colours = _sample(layer.photograph, size, layer.to_photograph @ back, Image.Resampling.BICUBIC)
            mask = layer.mask and _sample(layer.mask, size, layer.to_mask @ back, Image.Resampling.BILINEAR)
            canvas.paste(colours, (0, 0), mask)
        return np.array(canvas.reduce(SUPERSAMPLE))

    def visible(self, t: float) -> np.ndarray:
        """Return the number of the layer visible at each pixel's centre at time t: int [H, W], 0 is the background."""
        seen = np.zeros((self.height, self.width), dtype=np.int64)
        for number, layer in enumerate(self.layers):
            if layer.mask is not None:
                matrix = layer.to_mask @ np.linalg.inv(layer.motion.at(t))
                mask = _sample(layer.mask, (self.width, self.height), matrix, Image.Resampling.BILINEAR)
                seen[np.asarray(mask) > 127] = number
        return seen

    def flow(self, t: float, to: float) -> np.ndarray:
        """Return the flow from t to `to` of the point visible at each pixel's centre: float32 [H, W, 2], (dx, dy) in pixels."""
        y, x = np.mgrid[: self.height, : self.width] + 0.5
        places = np.stack([x, y, np.ones_like(x)], axis=-1)
        matrices = np.stack([layer.motion.at(to) @ np.linalg.inv(layer.motion.at(t)) for layer in self.layers])
        moves = (matrices - np.eye(3))[:, :2][self.visible(t)]
        return np.einsum("hwij,hwj->hwi", moves, places).astype(np.float32)


def scene(
    seed: int,
    split: str,
    number: int,
    height: int,
    width: int,
    max_motion: float,
    photographs: Sequence[np.ndarray] | None = None,
) -> Scene:
    """Draw the scene of sample `number`; the same arguments give the same scene.

    `photographs` are RGB uint8 [h, w, 3]; without them the scene uses those in `PHOTOGRAPHS`.
    """
    rng = np.random.default_rng([seed, list(PHOTOGRAPHS).index(split), number])
    photographs = _load_photographs(split) if photographs is None else photographs
    background = _background(rng, photographs, height, width, max_motion)
    shapes = [_shape(rng, photographs, height, width, max_motion) for _ in range(rng.integers(1, 5))]
    return Scene(height, width, (background, *shapes))


def photograph_paths(split: str) -> list[Path]:
    """Return the photographs in the scikit-image package, located without importing it: its loaders would use the network.

    Raises ShardError when the package or a photograph is missing.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ShardError("the synthetic set takes its photographs from scikit-image: pip install scikit-image")
    paths = [Path(spec.submodule_search_locations[0]) / "data" / name for name in PHOTOGRAPHS[split]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ShardError(f"this scikit-image lacks the photographs {', '.join(missing)}: pip install 'scikit-image>=0.24'")
    return paths


def _sample(image: Image.Image, size: tuple[int, int], matrix: np.ndarray, resample: Image.Resampling) -> Image.Image:
    """Fill an image of `size` (width, height) by sampling `image` at `matrix @ position`; Pillow adds the half pixels."""
    return image.transform(size, Image.Transform.AFFINE, tuple(matrix[:2].ravel().tolist()), resample)


def _background(
    rng: np.random.Generator, photographs: Sequence[np.ndarray], height: int, width: int, max_motion: float
) -> Layer:
    reach = np.hypot(height, width) / 2 + max_motion
    centre = (width / 2, height / 2)
    photograph = _photograph(rng, photographs)
    # the background moves less than the shapes in front of it, as if the camera followed them
    motion = _motion(rng, centre, reach, 0.7 * max_motion)
    # scaling and rotation reach a little beyond the circle around the first frame: leave room for both
    return Layer(photograph, _place(rng, photograph, centre, 1.3 * reach), None, np.eye(3), motion)


def _shape(rng: np.random.Generator, photographs: Sequence[np.ndarray], height: int, width: int, max_motion: float) -> Layer:
    radius = rng.uniform(0.12, 0.38) * min(height, width)
    centre = (rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height)
    photograph = _photograph(rng, photographs)
    side = min(round(MASK_DETAIL * 2 * MASK_REACH * radius), MAX_MASK)
    scale = side / (2 * MASK_REACH * radius)
    x, y = (side / 2 - scale * c for c in centre)
    to_mask = np.array([[scale, 0, x], [0, scale, y], [0, 0, 1]])
    motion = _motion(rng, centre, radius * MASK_REACH, max_motion)
    return Layer(photograph, _place(rng, photograph, centre, radius * MASK_REACH), _mask(rng, side), to_mask, motion)


def _motion(rng: np.random.Generator, centre: tuple[float, float], reach: float, max_motion: float) -> LayerMotion:
    """Distribute a magnitude over translation, rotation and scaling so that no point within `reach` moves further than it."""
    magnitude = max_motion * rng.uniform(0.05, 1)
    turning, growing = rng.uniform(0, 0.3), rng.uniform(0, 0.2)
    direction = rng.uniform(0, 2 * np.pi)
    way = (1 - turning - growing) * magnitude
    turn = rng.choice([-1, 1]) * min(turning * magnitude / reach, 0.5)
    growth = rng.choice([-1, 1]) * min(growing * magnitude / reach, 0.25)
    return LayerMotion(centre, (float(way * np.cos(direction)), float(way * np.sin(direction))), float(turn), float(growth))


def _place(rng: np.random.Generator, photograph: Image.Image, centre: tuple[float, float], reach: float) -> np.ndarray:
    """Return a matrix that maps a circle of `reach` pixels around `centre` into the photograph, rotated and maybe mirrored."""
    half = min(photograph.size) / 2 - 2
    scale = min(half / reach, float(np.exp(rng.uniform(np.log(0.6), np.log(2)))))
    room_x, room_y = photograph.width / 2 - 2 - scale * reach, photograph.height / 2 - 2 - scale * reach
    x = photograph.width / 2 + rng.uniform(-1, 1) * room_x
    y = photograph.height / 2 + rng.uniform(-1, 1) * room_y
    angle, mirror = rng.uniform(-np.pi, np.pi), rng.choice([-1.0, 1.0])
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[mirror * cos, -sin], [mirror * sin, cos]])
    shift = np.array([x, y]) - linear @ np.array(centre)
    return np.vstack([np.column_stack([linear, shift]), [0, 0, 1]])


def _mask(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw a centred ellipse, polygon or blob, white on black, with a radius of at most 1 / MASK_REACH of the half side."""
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    kind = rng.choice(["ellipse", "polygon", "blob"])
    if kind == "polygon":
        corners = int(rng.integers(3, 9))
        angles = np.sort((np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners)
        radii = rng.uniform(0.5, 1, corners)
    elif kind == "blob":
        waves = [rng.uniform(0, 0.5 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in range(2, 7)]
        radii = 1.5 + np.sum(waves, axis=0)  # 1.5: the waves together stay below 0.73, so the outline never turns inside out
    else:
        turned = angles - rng.uniform(0, np.pi)
        flat = rng.uniform(0.4, 1)
        radii = flat / np.hypot(flat * np.cos(turned), np.sin(turned))
    radii = radii / radii.max() * side / 2 / MASK_REACH
    points = side / 2 + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in points.tolist()], fill=255)
    return mask


def _photograph(rng: np.random.Generator, photographs: Sequence[np.ndarray]) -> Image.Image:
    """Return a random photograph with slightly changed colours: a gain per channel, and maybe another channel order."""
    image = Image.fromarray(photographs[int(rng.integers(len(photographs)))])
    gains = rng.uniform(0.7, 1.15) * rng.uniform(0.85, 1.15, 3)
    order = rng.permutation(3) if rng.uniform() < 0.3 else np.arange(3)
    levels = np.clip(np.arange(256)[None] * gains[:, None], 0, 255).astype(np.uint8)
    bands = image.split()
    return Image.merge("RGB", [bands[i] for i in order]).point(levels.ravel().tolist())


@functools.cache
def _load_photographs(split: str) -> tuple[np.ndarray, ...]:
    return tuple(codecs.read_image(path) for path in photograph_paths(split))
