"""Painting of rich scenes: photographs, colours and outlines on the flat parts of each item.

layers = paint(studio, camera, prop, endless=False)      # of shards.rich_scene, from back to front
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from shards.photographs import Picture
from shards.rich_motion import Camera, Sheet, Track, rotation, source
from shards.rich_scene import Layer, linear_light
from shards.rich_shapes import REACH, draw_bars, draw_compact, draw_segment, draw_skyline

DETAIL = 1.5  # pixels of a raster per pixel of the frame
MAX_RASTER = 6144  # maximum side of a raster in pixels


@dataclasses.dataclass(frozen=True)
class Studio:
    """Random generator, pictures and limits that all parts of one scene share."""

    rng: np.random.Generator
    photographs: Sequence[Picture]
    cutouts: Sequence[Picture]
    height: int
    width: int
    max_motion: float
    bend: float  # strength of accelerations: 0 for constant velocities

    @property
    def unit(self) -> float:
        """Size of the frame's shorter side, relative to 256 pixels."""
        return min(self.height, self.width) / 256


@dataclasses.dataclass(frozen=True)
class Prop:
    """An item in the scene that is not painted yet: `parts` share one body and are painted from back to front."""

    depth: float
    parts: tuple[Part, ...]
    radius: float = 0.0  # in pixels; 0 for items without motion of their own
    shadow: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """A sheet and what to paint on it."""

    sheet: Sheet
    kind: str
    picture: Picture
    zoom: float  # pixels of the photograph per pixel of the frame
    blur: float = 0.0  # standard deviation in pixels of the frame
    turn: float = 0.0  # rotation of the part's own axes relative to the plane's, in radians
    size: tuple[float, float] | None = None  # of a rotated part: length and thickness in pixels


def pick(studio: Studio, cutout: bool = False) -> Picture:
    pictures = studio.cutouts if cutout else studio.photographs
    return pictures[int(studio.rng.integers(len(pictures)))]


def paint(studio: Studio, camera: Camera, prop: Prop, endless: bool) -> list[Layer]:
    """Paint the parts of a prop, and its shadow if it has one; return the layers from back to front."""
    rng = studio.rng
    layers = []
    gain = Track(rng.normal(0, 0.04, 1), np.zeros(1)) if rng.uniform() < 0.15 else None
    for part in prop.parts:
        sheet = dataclasses.replace(part.sheet, extent=_backdrop_extent(studio, camera, part.sheet)) if endless else part.sheet
        raster, to_raster = _paint_part(studio, dataclasses.replace(part, sheet=sheet))
        layers.append(Layer(sheet, raster, to_raster, endless, gain=gain))
    return _cast_shadow(studio, prop, layers[0]) + layers if prop.shadow else layers


def _cast_shadow(studio: Studio, prop: Prop, layer: Layer) -> list[Layer]:
    """Return a soft dark copy of an object's outline, offset from it and behind it."""
    rng = studio.rng
    du, dv = rng.uniform(-0.5, 0.5, 2) * prop.radius
    basis = layer.sheet.basis @ np.array([[1, 0, du], [0, 1, dv], [0, 0, 1]])
    height, width = (max(2, side // 4) for side in layer.raster.shape[:2])
    outline = cv2.resize(cv2.extractChannel(layer.raster, 3), (width, height), interpolation=cv2.INTER_AREA)
    soft = max(0.05 * rng.uniform(0.3, 3) * height, 0.5)
    shade = np.zeros((height, width, 4), np.float32)
    shade[..., 3] = cv2.GaussianBlur(outline, (0, 0), soft, borderType=cv2.BORDER_CONSTANT) * rng.uniform(0.15, 0.6)
    fx, fy = width / layer.raster.shape[1], height / layer.raster.shape[0]
    smaller = np.array([[fx, 0, fx / 2 - 0.5], [0, fy, fy / 2 - 0.5], [0, 0, 1]])
    return [Layer(dataclasses.replace(layer.sheet, basis=basis), shade, smaller @ layer.to_raster, shadow=True)]


def _backdrop_extent(studio: Studio, camera: Camera, sheet: Sheet) -> tuple[float, float, float, float]:
    """Return the part of the backdrop's plane that the frame shows at any time, the open shutter included."""
    edges = np.linspace(0, 1, 3)
    frame = np.array([[x * studio.width, y * studio.height] for x in edges for y in edges])
    seen = np.concatenate([source(camera.matrix(t), sheet, frame, t) for t in (-0.25, 0.0, 0.5, 1.0, 1.25)])
    low, high = seen.min(axis=0) - 2, seen.max(axis=0) + 2
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _paint_part(studio: Studio, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Return the raster of a part and the matrix from its plane to the raster."""
    u0, v0, u1, v1 = part.sheet.extent
    if part.size is None:
        span, start = np.array([u1 - u0, v1 - v0]), np.array([u0, v0])
        turned = np.eye(2)
    else:  # a limb, whose own axes start at its joint
        length, thick = part.size
        span, start = np.array([length + 0.4 * thick, thick]), np.array([-0.4 * thick, -thick / 2])
        cos, sin = np.cos(part.turn), np.sin(part.turn)
        turned = np.array([[cos, sin], [-sin, cos]])
    fine = DETAIL if part.blur < DETAIL else DETAIL / 2  # out-of-focus parts have no detail
    detail = min(fine, MAX_RASTER / float(span.max()))
    edge = 1 + int(np.ceil(3 * part.blur * detail)) if part.kind not in ("backdrop", "ground") else 0  # room for a soft border
    width, height = (max(2, int(np.ceil(side * detail))) + 2 * edge for side in span.tolist())
    joint = np.array([part.sheet.joints[0].u, part.sheet.joints[0].v]) if part.size is not None else np.zeros(2)
    shift = (-turned @ joint - start) * detail + edge - 0.5
    to_raster = np.vstack([np.column_stack([turned * detail, shift]), [0, 0, 1]])
    return _paint_raster(studio, part, height, width, detail, edge), to_raster


def _paint_raster(studio: Studio, part: Part, height: int, width: int, detail: float, edge: int) -> np.ndarray:
    rng = studio.rng
    if part.kind == "cut-out":
        raster = _lay_cutout(studio, part.picture, height, width, edge)
    else:
        free = part.kind not in ("backdrop", "ground", "skyline")
        colours = _lay_photograph(studio, part.picture, height, width, part.zoom / detail, free)
        if free and rng.uniform() < 0.3:
            colours = _shade(rng, colours)
        if part.kind in ("backdrop", "ground"):
            raster = cv2.cvtColor(colours, cv2.COLOR_RGB2RGBA)
        else:
            mask = np.zeros((height, width), np.uint8)
            inner = mask[edge : height - edge, edge : width - edge]
            inner[:] = _draw_mask(studio, part.kind, inner.shape[0], inner.shape[1], detail)
            raster = _with_alpha(colours, mask)
    if part.blur:
        border = cv2.BORDER_REFLECT_101 if part.kind in ("backdrop", "ground") else cv2.BORDER_CONSTANT
        raster = cv2.GaussianBlur(raster, (0, 0), part.blur * detail, borderType=border)
    return raster


def _draw_mask(studio: Studio, kind: str, height: int, width: int, detail: float) -> np.ndarray:
    rng = studio.rng
    if kind == "skyline":
        return draw_skyline(rng, height, width)
    if kind == "bars":
        return draw_bars(rng, height, width, detail * studio.unit)
    if kind == "limb":
        return draw_segment(rng, height, width)
    side = max(height, width, 8)
    if kind == "silhouette":
        mask = _draw_silhouette(studio, side)
    else:
        mask = draw_compact(rng, "ellipse" if kind == "trunk" else kind, side)
    return mask if (height, width) == (side, side) else cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA)


def _draw_silhouette(studio: Studio, side: int) -> np.ndarray:
    """Draw a silhouette by thresholding a blurred photograph within a blob."""
    rng = studio.rng
    level = pick(studio).levels[-1]
    grey = cv2.GaussianBlur(cv2.cvtColor(np.ascontiguousarray(level), cv2.COLOR_RGB2GRAY), (0, 0), rng.uniform(0.7, 4))
    half = max(8, int(min(grey.shape) * rng.uniform(0.2, 0.5)))
    y, x = (int(rng.integers(half, max(length - half, half) + 1)) for length in grey.shape)
    part = cv2.resize(grey[y - half : y + half, x - half : x + half], (side, side), interpolation=cv2.INTER_CUBIC)
    part = part.astype(np.float32)
    limit = np.quantile(part[::8, ::8], rng.uniform(0.3, 0.6))
    steep = np.clip((part - limit) * rng.choice([-1, 1]) * 8 + 128, 0, 255).astype(np.uint8)
    return np.minimum(steep, draw_compact(rng, "blob", side))


def _lay_photograph(studio: Studio, picture: Picture, height: int, width: int, zoom: float, free: bool) -> np.ndarray:
    """Fill a raster with a part of a photograph: linear light, float32 [height, width, 3].

    `zoom` is pixels of the photograph per pixel of the raster; it is reduced if the photograph is too small. `free` allows any
    angle; otherwise the photograph is nearly upright.
    """
    rng = studio.rng
    angle = rng.uniform(-np.pi, np.pi) if free else rng.normal(0, 0.08)
    cos, sin = abs(np.cos(angle)), abs(np.sin(angle))
    need = np.array([width * cos + height * sin, width * sin + height * cos])
    size = np.array(picture.size[::-1], float)
    zoom = max(min(zoom, float((size / need).min())), min(0.35, zoom))
    level = min(int(max(np.log2(max(zoom, 1)) + 0.2, 0)), len(picture.levels) - 1)
    pixels = picture.levels[level]
    zoom = zoom * pixels.shape[1] / size[0]
    size = np.array(pixels.shape[1::-1], float)
    room = np.maximum(size - zoom * need, 0)
    middle = size / 2 + rng.uniform(-0.5, 0.5, 2) * room
    turned = zoom * rotation(np.array([0.0, 0.0, angle]))[:2, :2] @ np.diag([rng.choice([-1.0, 1.0]), 1.0])
    back = np.column_stack([turned, middle - turned @ np.array([width / 2, height / 2])])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    raster = cv2.warpAffine(pixels, back, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return _tint(rng, raster)


def _tint(rng: np.random.Generator, levels: np.ndarray) -> np.ndarray:
    """Change colours slightly and convert uint8 levels to linear light, float32."""
    value = (np.arange(256) / 255) ** float(np.exp(rng.normal(0, 0.15)))
    gains = rng.uniform(0.65, 1.1) * rng.uniform(0.92, 1.08, 3)
    table = linear_light(255 * np.clip(value[:, None] * gains, 0, 1)).astype(np.float32)
    if rng.uniform() < 0.1:
        levels = levels[..., rng.permutation(3)]
    return cv2.LUT(np.ascontiguousarray(levels), table[None])


def _lay_cutout(studio: Studio, picture: Picture, height: int, width: int, edge: int) -> np.ndarray:
    """Fill a raster with a whole cut-out: linear light times alpha, and alpha, float32 [height, width, 4]."""
    rng = studio.rng
    reach = REACH * (min(height, width) - 2 * edge)
    zoom = max(picture.size) / reach
    level = min(int(max(np.log2(max(zoom, 1)) + 0.2, 0)), len(picture.levels) - 1)
    pixels = picture.levels[level]
    zoom = zoom * max(pixels.shape[:2]) / max(picture.size)
    angle = rng.normal(0, 0.2) if rng.uniform() < 0.8 else rng.uniform(-np.pi, np.pi)
    turned = zoom * rotation(np.array([0.0, 0.0, angle]))[:2, :2] @ np.diag([rng.choice([-1.0, 1.0]), 1.0])
    middle = np.array(pixels.shape[1::-1]) / 2 - 0.5
    back = np.column_stack([turned, middle - turned @ np.array([(width - 1) / 2, (height - 1) / 2])])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    raster = cv2.warpAffine(pixels, back, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT)
    alpha = np.maximum(raster[..., 3:], 1).astype(np.float32) / 255
    colours = np.minimum(raster[..., :3] / alpha, 255).astype(np.uint8)
    return _with_alpha(_tint(rng, colours), np.ascontiguousarray(raster[..., 3]))


def _with_alpha(colours: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Multiply colours float32 [h, w, 3] by a mask uint8 [h, w] and append it as alpha in [0, 1]: float32 [h, w, 4]."""
    alpha = mask * np.float32(1 / 255)
    return cv2.multiply(cv2.cvtColor(colours, cv2.COLOR_RGB2RGBA), cv2.merge([alpha] * 4))


def _shade(rng: np.random.Generator, colours: np.ndarray) -> np.ndarray:
    """Add a linear slope of light; at random, first blur the colours to a coarse 6x6 grid, so that the surface looks plain."""
    if rng.uniform() < 0.4:
        few = cv2.resize(colours, (6, 6), interpolation=cv2.INTER_AREA)
        colours = cv2.resize(few, colours.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    y, x = np.linspace(-1, 1, colours.shape[0])[:, None], np.linspace(-1, 1, colours.shape[1])[None]
    way, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.6)
    slope = 1 + strength * (np.cos(way) * x + np.sin(way) * y)
    return colours * slope.astype(np.float32)[..., None]
