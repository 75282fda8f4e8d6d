"""Random rich scenes: their objects, the positions and motions of objects and camera, and the light.

    drawn = draw_scene(rng, pictures, height=256, width=256, max_motion=64.0, interval=0.5)
    frame = drawn.render(0.5)

A scene has a backdrop and, at random, a ground, skylines, fences, up to twelve objects and shadows. Each is a flat sheet at its
own depth, so the camera's motion displaces each of them differently. Lengths in pixels apply at rest; those of blur and thin
structures are for frames of 256 pixels and scale with the frame.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from shards.photographs import Picture
from shards.rich_motion import Body, Camera, Joint, Ripple, Sheet, Track, place, rotation, source
from shards.rich_painting import Part, Prop, Studio, paint, pick
from shards.rich_scene import Light, RichScene

LEAST_MOTION = 0.5  # smallest displacement from the first frame to the last that is drawn, in pixels
OBJECTS = 12
ENDLESS = (0.0, 0.0, 0.0, 0.0)  # extent of a backdrop that has not been measured yet
_CAMERA_MOVES = {  # weights of position x, y, z; rotation about x, y, z; zoom
    "pan": (0, 0, 0, 1, 1, 0.2, 0),
    "truck": (1, 0.5, 0.1, 0.1, 0.2, 0.05, 0),
    "dolly": (0.2, 0.2, 1, 0.3, 0.3, 0.1, 0),
    "zoom": (0, 0, 0, 0.3, 0.3, 0.1, 1),
    "roll": (0.1, 0.1, 0, 0.3, 0.3, 1, 0),
    "hand": (0.4, 0.4, 0.3, 0.6, 0.6, 0.4, 0),
    "orbit": (1, 0.3, 0, 0, 0, 0.1, 0),
}
_KINDS = {  # kinds of objects and their probabilities
    "cut-out": 0.3,
    "figure": 0.16,
    "silhouette": 0.12,
    "blob": 0.12,
    "polygon": 0.06,
    "box": 0.06,
    "ellipse": 0.05,
    "branch": 0.04,
    "wires": 0.03,
    "wheel": 0.03,
    "ring": 0.03,
}


def draw_scene(
    rng: np.random.Generator, pictures: Sequence[Picture], height: int, width: int, max_motion: float, interval: float
) -> RichScene:
    """Draw a scene in which no visible point moves further than `max_motion` pixels from t = 0 to t = 1.

    `interval` is the time between two frames, in units of t; the shutter is open for up to half of it. `pictures` must contain
    at least one photograph that is not a cut-out.
    """
    bend = 0.0 if rng.uniform() < 0.25 else abs(rng.normal(0, 0.2)) if rng.uniform() < 0.85 else rng.uniform(0.3, 1)
    opaque = [picture for picture in pictures if not picture.is_cutout]
    cutouts = [picture for picture in pictures if picture.is_cutout]
    studio = Studio(rng, opaque, cutouts, height, width, max_motion, bend)
    camera = _draw_camera(studio)
    stage = _draw_stage(studio, camera)
    backdrop, others = stage[0], stage[1:]
    for _ in range(_draw_count(rng)):
        others.append(_draw_object(studio, camera, backdrop.depth))
    still = rng.uniform() < 0.15
    camera = camera if still else _move_camera(studio, camera, [backdrop, *others])
    follows = rng.uniform() < 0.5
    moved = [_move_prop(studio, camera, prop, follows) if prop.radius else prop for prop in others]
    camera, props, longest = _limit(studio, camera, [backdrop, *sorted(moved, key=lambda prop: -prop.depth)])
    backdrop = props[0]
    layers = tuple(itertools.chain.from_iterable(paint(studio, camera, prop, prop is backdrop) for prop in props))
    shutter = 0.0 if rng.uniform() < 0.35 else rng.uniform(0.05, 0.5) * interval
    samples = 4 * int(np.clip(np.ceil(longest * shutter / 6), 1, 6))
    return RichScene(height, width, camera, layers, _draw_light(rng), shutter, samples)


def _draw_camera(studio: Studio) -> Camera:
    """Draw a camera at rest, of whose picture the frame is a random crop."""
    rng, longer = studio.rng, max(studio.height, studio.width)
    crop = rng.uniform(1, 2.5)
    away = rng.uniform(-0.5, 0.5, 2) * (crop - 1) * np.array([studio.width, studio.height])
    centre = (float(studio.width / 2 + away[0]), float(studio.height / 2 + away[1]))
    return Camera(float(rng.uniform(0.8, 2) * crop * longer), centre, Track(np.zeros(7), np.zeros(7)))


def _move_camera(studio: Studio, camera: Camera, props: Sequence[Prop]) -> Camera:
    """Give the camera a path that moves no visible point further than a randomly drawn length."""
    rng = studio.rng
    move = str(rng.choice(list(_CAMERA_MOVES)))
    shares = np.array(_CAMERA_MOVES[move]) * rng.uniform(-1, 1, 7)
    if move == "orbit":  # the camera rotates back towards what it passes
        shares[3:5] = [-shares[1], shares[0]]
    diagonal = np.hypot(studio.height, studio.width)
    middle = float(np.sqrt(props[0].depth))  # between the nearest objects, at a depth of 1, and the backdrop
    one_pixel = np.array([*[middle / camera.focal] * 2, 2 * middle / diagonal, *[1 / camera.focal] * 2, *[2 / diagonal] * 2])
    path = Track(shares * one_pixel, _draw_bend(studio, shares) * one_pixel)
    target = _draw_length(studio)
    sheets = [prop.parts[-1].sheet for prop in props]
    for _ in range(12):
        camera = dataclasses.replace(camera, path=path)
        longest = max(_reach(studio, _views(camera), sheet) for sheet in sheets)
        if 0.7 * target <= longest <= target:
            break
        path = path.scaled(float(np.clip(0.9 * target / max(longest, 1e-9), 0.1, 100)))
    else:
        camera = dataclasses.replace(camera, path=path.scaled(0.0))
    return camera


def _draw_length(studio: Studio) -> float:
    """Draw a displacement in pixels over all orders of magnitude; about a quarter of them exceed half of the maximum."""
    most = 0.96 * studio.max_motion
    if most <= LEAST_MOTION:
        return most
    return LEAST_MOTION * (most / LEAST_MOTION) ** float(np.sqrt(studio.rng.uniform()))


def _draw_bend(studio: Studio, total: np.ndarray) -> np.ndarray:
    """Draw an acceleration for a displacement, with components along and across it."""
    rng, size = studio.rng, np.linalg.norm(total)
    across = rng.normal(0, 1, total.shape) * (total != 0)
    return studio.bend * (rng.normal() * total + rng.normal(0, 0.5) * size * across / max(np.linalg.norm(across), 1e-9))


def _draw_count(rng: np.random.Generator) -> int:
    """Draw the number of objects: often a few, at times none or a dozen."""
    return int(rng.choice([0, 1, 2, 3, 4, 5, 6, 8, 10, OBJECTS], p=[0.08, 0.14, 0.18, 0.16, 0.12, 0.1, 0.08, 0.06, 0.04, 0.04]))


def _draw_stage(studio: Studio, camera: Camera) -> list[Prop]:
    """Draw everything that does not move: the backdrop first, then maybe a ground, skylines and a fence."""
    rng = studio.rng
    blur = studio.unit * float(np.exp(rng.uniform(np.log(0.4), np.log(4)))) if rng.uniform() < 0.25 else 0.0
    ground = _draw_ground(studio, camera) if rng.uniform() < 0.4 else None
    depth = ground.depth * rng.uniform(1, 1.5) if ground else float(np.exp(rng.uniform(np.log(1.5), np.log(10))))
    tilt = rng.normal(0, 0.12, 2).clip(-0.3, 0.3)
    sheet = Sheet(_stand(camera, (studio.width / 2, studio.height / 2), depth, tilt), ENDLESS)
    stage = [Prop(depth, (Part(sheet, "backdrop", pick(studio), _draw_zoom(rng), blur),))]
    if ground:
        stage.append(ground)
    for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.55, 0.25, 0.13, 0.07]))):
        stage.append(_draw_wide(studio, camera, "skyline", depth * rng.uniform(0.3, 0.95), blur / 2))
    if rng.uniform() < 0.15:
        near = studio.unit * rng.uniform(0.3, 4) if rng.uniform() < 0.4 else 0.0
        stage.append(_draw_wide(studio, camera, "bars", float(rng.uniform(0.9, max(depth * 0.6, 1))), near))
    return stage


def _draw_ground(studio: Studio, camera: Camera) -> Prop | None:
    """Draw a level plane below the camera that ends at a line in the frame; return None if the horizon leaves no room."""
    rng, (x, y) = studio.rng, camera.centre
    bottom = studio.height + 1.5 * studio.max_motion + 0.1 * studio.height
    top = studio.height * rng.uniform(0.3, 0.75)
    if top - y < (bottom - y) / 5:  # too close to the horizon: the texture would be compressed beyond recognition
        return None
    below, far = (bottom - y) / camera.focal, (bottom - y) / (top - y)  # the near edge is at a depth of 1
    middle = np.sqrt(far)
    scale = middle / camera.focal
    lean = rng.normal(0, 0.03)
    basis = np.array([[scale, 0, 0], [scale * lean, 0, below], [0, scale, middle], [0, 0, 1]])
    reach = 1.5 * studio.max_motion + 0.2 * studio.width
    extent = (
        (-x - reach) * far / middle,
        (1 - middle) / scale,
        (studio.width - x + reach) * far / middle,
        (far - middle) / scale,
    )
    return Prop(far, (Part(Sheet(basis, extent), "ground", pick(studio), _draw_zoom(rng)),))


def _draw_wide(studio: Studio, camera: Camera, kind: str, depth: float, blur: float) -> Prop:
    """Draw an upright item from border to border of the frame."""
    rng = studio.rng
    margin = 1.3 * studio.max_motion + 0.15 * studio.width
    top = studio.height * rng.uniform(0.1, 0.8) if kind == "skyline" else -margin
    basis = _stand(camera, (0.0, 0.0), depth, rng.normal(0, 0.1, 2).clip(-0.25, 0.25))
    extent = (-margin, top, studio.width + margin, studio.height + margin)
    return Prop(depth, (Part(Sheet(basis, extent), kind, pick(studio), _draw_zoom(rng), blur),))


def _draw_object(studio: Studio, camera: Camera, deepest: float) -> Prop:
    """Draw one object at rest."""
    rng = studio.rng
    depth = float(np.exp(rng.uniform(0, np.log(deepest))))
    radius = min(studio.height, studio.width) * float(np.exp(rng.uniform(np.log(0.04), np.log(0.5))))
    middle = (rng.uniform(-0.05, 1.05) * studio.width, rng.uniform(-0.05, 1.05) * studio.height)
    basis = _stand(camera, middle, depth, rng.normal(0, 0.25, 2).clip(-0.6, 0.6))
    kinds = [kind for kind in _KINDS if kind != "cut-out" or studio.cutouts]
    shares = np.array([_KINDS[kind] for kind in kinds])
    kind = str(rng.choice(kinds, p=shares / shares.sum()))
    blur = studio.unit * float(np.exp(rng.uniform(np.log(0.3), np.log(2)))) if rng.uniform() < 0.15 else 0.0
    if kind == "figure":
        parts = _draw_figure(studio, basis, radius, blur)
    else:
        picture = pick(studio, cutout=kind == "cut-out")
        extent = (-radius, -radius, radius, radius)
        parts = (Part(Sheet(basis, extent), kind, picture, _draw_zoom(rng), blur),)
    return Prop(depth, parts, radius, shadow=bool(kind != "figure" and rng.uniform() < 0.25))


def _draw_figure(studio: Studio, basis: np.ndarray, radius: float, blur: float) -> tuple[Part, ...]:
    """Draw a trunk and a head with swinging limbs of one to three segments, some behind the trunk and some in front of it."""
    rng = studio.rng
    clothes = [(pick(studio), _draw_zoom(rng)) for _ in range(2)]
    upright = rng.uniform() < 0.6
    lying, standing = radius * rng.uniform(0.3, 0.5), radius * rng.uniform(0.12, 0.3)
    half = (standing, lying) if upright else (lying, standing)
    trunk = Sheet(basis, (-half[0], -half[1], half[0], half[1]))
    behind: list[Part] = []
    before: list[Part] = []
    for _ in range(int(rng.integers(2, 7))):
        root = np.array(half) * rng.choice([-0.75, 0.75], 2) * rng.uniform(0.3, 1, 2)
        angle = rng.uniform(0, np.pi) if rng.uniform() < 0.7 else rng.uniform(-np.pi, np.pi)
        thick = radius * rng.uniform(0.06, 0.18)
        target = behind if rng.uniform() < 0.5 else before
        joints: tuple[Joint, ...] = ()
        picture, zoom = clothes[int(rng.integers(2))]
        for _ in range(int(rng.integers(1, 4))):
            length = radius * rng.uniform(0.25, 0.5)
            swing = _draw_length(studio) * rng.uniform(0.2, 0.8) / (2 * length) * rng.choice([-1, 1])
            track = Track(np.array([np.clip(swing, -1.2, 1.2)]), studio.bend * rng.normal(0, 0.6, 1) * abs(swing))
            joints = (Joint(float(root[0]), float(root[1]), track), *joints)
            tip = root + length * np.array([np.cos(angle), np.sin(angle)])
            low, high = np.minimum(root, tip) - thick, np.maximum(root, tip) + thick
            sheet = Sheet(basis, (low[0], low[1], high[0], high[1]), joints=joints)
            target.append(Part(sheet, "limb", picture, zoom, blur, angle, (length + 0.8 * thick, thick)))
            root, angle, thick = tip, angle + rng.uniform(-0.9, 0.9), thick * rng.uniform(0.6, 0.95)
    head = radius * rng.uniform(0.1, 0.25)
    nod = Joint(0.0, -half[1], Track(rng.normal(0, 0.1, 1), np.zeros(1)))
    top = Sheet(basis, (-head, -half[1] - 1.7 * head, head, -half[1] + 0.3 * head), joints=(nod,))
    before.append(Part(top, "ellipse", pick(studio), _draw_zoom(rng), blur))
    return (*behind, Part(trunk, "trunk", *clothes[0], blur), *before)


def _move_prop(studio: Studio, camera: Camera, prop: Prop, follows: bool) -> Prop:
    """Give an object its own motion, small enough to stay within max_motion together with the camera's."""
    rng, radius = studio.rng, prop.radius
    sheet = prop.parts[0].sheet
    pivot = sheet.basis[:3, 2]
    scale = pivot[2] / camera.focal
    total, bend = np.zeros(6), np.zeros(6)
    if rng.uniform() < 0.85:
        length, way = _draw_length(studio), rng.uniform(0, 2 * np.pi)
        share = rng.dirichlet([4, 1, 1, 0.7])  # translation, rotation, approach, tilt
        total[:2] = share[0] * length * scale * np.array([np.cos(way), np.sin(way)])
        total[2] = rng.choice([-1, 1]) * pivot[2] * min(share[2] * length / radius, 0.4)
        total[3:5] = rng.normal(0, 1, 2) * min(share[3] * length / radius, 0.5)
        total[5] = rng.choice([-1, 1]) * min(share[1] * length / radius, 1.2)
        bend = np.concatenate([_draw_bend(studio, total[:3]), _draw_bend(studio, total[3:])])
        if studio.bend and rng.uniform() < 0.2:
            bend[1] += rng.uniform(0, 1) * length * scale  # it falls
    if follows and rng.uniform() < 0.6:
        half, end = _follow(camera, sheet, scale)
        total[:2] += end
        bend[:2] += 4 * (end / 2 - half)
    ripples: tuple[Ripple, ...] = ()
    if prop.parts[0].kind != "limb" and len(prop.parts) == 1 and rng.uniform() < 0.25:
        ripples = tuple(_draw_ripple(studio, radius) for _ in range(int(rng.integers(1, 3))))
    body = Body(pivot, Track(total, bend))
    parts = tuple(
        dataclasses.replace(part, sheet=dataclasses.replace(part.sheet, body=body, ripples=ripples)) for part in prop.parts
    )
    views = _views(camera)
    for factor in (0.7,) * 10 + (0.0,):
        if max(_reach(studio, views, part.sheet) for part in parts) <= 0.97 * studio.max_motion:
            break
        parts = tuple(dataclasses.replace(part, sheet=part.sheet.scaled(factor)) for part in parts)
    return dataclasses.replace(prop, parts=parts)


def _limit(studio: Studio, camera: Camera, props: list[Prop]) -> tuple[Camera, list[Prop], float]:
    """Slow everything down until no visible point moves further than max_motion; return the largest displacement, too."""
    while True:
        views = _views(camera)
        longest = max(_reach(studio, views, part.sheet) for prop in props for part in prop.parts)
        if longest <= 0.985 * studio.max_motion or longest < 1e-6:
            return camera, props, longest
        camera = dataclasses.replace(camera, path=camera.path.scaled(0.9))
        props = [
            dataclasses.replace(
                prop, parts=tuple(dataclasses.replace(part, sheet=part.sheet.scaled(0.9)) for part in prop.parts)
            )
            for prop in props
        ]


def _views(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    return camera.matrix(0.0), camera.matrix(1.0)


def _follow(camera: Camera, sheet: Sheet, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the world displacements, at t = 1/2 and t = 1, that roughly keep a sheet's middle at its place in the frame."""
    start, half, end = (place(camera.matrix(t), sheet, np.zeros(2), t) for t in (0.0, 0.5, 1.0))
    return (start - half) * scale, (start - end) * scale


def _draw_ripple(studio: Studio, radius: float) -> Ripple:
    rng = studio.rng
    length = radius * rng.uniform(0.8, 4)
    rate = rng.uniform(0.3, 2.5) * rng.choice([-1, 1])
    amplitude = min(_draw_length(studio) / (2 * np.sin(min(abs(rate), np.pi) / 2)), 0.1 * length)
    return Ripple(float(amplitude), float(length), rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), float(rate))


def _draw_light(rng: np.random.Generator) -> Light:
    """Draw the light: in about half of the scenes it does not change, and seldom by more than a tenth."""
    change = float(np.exp(rng.uniform(np.log(0.005), np.log(0.2)))) if rng.uniform() < 0.45 else 0.0
    gain = Track(change * (rng.normal() + 0.25 * rng.normal(0, 1, 3)), change * rng.normal(0, 0.5) * np.ones(3))
    offset = Track(0.1 * change * abs(rng.normal()) * np.ones(3), np.zeros(3))
    vignette = rng.uniform(0, 0.5) if rng.uniform() < 0.3 else 0.0
    noise = float(np.exp(rng.uniform(np.log(0.3), np.log(3)))) if rng.uniform() < 0.3 else 0.0
    return Light(gain, offset, vignette, noise, int(rng.integers(2**31)))


def _draw_zoom(rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(0.8), np.log(3))))


def _stand(camera: Camera, pixel: tuple[float, float], depth: float, tilt: np.ndarray) -> np.ndarray:
    """Return the basis of a plane through the point visible at `pixel`, where one unit is one pixel at rest."""
    turned = rotation(np.array([tilt[0], tilt[1], 0.0]))
    scale = depth / camera.focal
    middle = scale * np.array([pixel[0] - camera.centre[0], pixel[1] - camera.centre[1], camera.focal])
    return np.vstack([np.column_stack([scale * turned[:, :2], middle]), [0, 0, 1]])


def _reach(studio: Studio, views: tuple[np.ndarray, np.ndarray], sheet: Sheet) -> float:
    """Return the largest displacement in pixels, from t = 0 to t = 1, of a sheet's points visible in the frame.

    It is infinite if a point goes behind the camera. `views` are the camera's matrices at these times.
    """
    first, last = views
    points = source(first, sheet, _grid(studio.height, studio.width), 0.0)
    u0, v0, u1, v1 = sheet.extent
    if sheet.extent != ENDLESS:
        corners = np.array([[u, v] for u in (u0, (u0 + u1) / 2, u1) for v in (v0, (v0 + v1) / 2, v1)])
        u, v = points.T
        points = np.concatenate([points[(u > u0) & (u < u1) & (v > v0) & (v < v1)], corners])
    start, end = place(first, sheet, points, 0.0), place(last, sheet, points, 1.0)
    x, y = start.T
    ways = np.hypot(*(end - start)[(x > -2) & (x < studio.width + 2) & (y > -2) & (y < studio.height + 2)].T)
    return float(np.nan_to_num(ways, nan=np.inf).max(initial=0.0))


@functools.lru_cache(maxsize=4)
def _grid(height: int, width: int) -> np.ndarray:
    """Return a grid of points over a frame, including its corners: [81, 2]."""
    x, y = np.meshgrid(np.linspace(0, width, 9), np.linspace(0, height, 9))
    return np.stack([x, y], axis=-1).reshape(-1, 2)
