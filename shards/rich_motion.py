"""Motion of the rich synthetic scenes: a pinhole camera, flat sheets in space, joints and ripples, all in closed form.

A sheet is a flat piece of the world. Its points have plane coordinates (u, v); `place` maps them to pixels at a given time and
`source` maps pixels back, both in closed form (float64), so that flow needs no search:

    pixels = place(camera.matrix(t), sheet, points, t)      # [..., 2] -> [..., 2]
    points = source(camera.matrix(t), sheet, pixels, t)

Pixels are (x, y); the centre of the first pixel is at (0.5, 0.5). Time t is 0 at the first frame and 1 at the last; every
motion is smooth and also defined slightly before and after, where the shutter is open. World coordinates are (x, y, z) with y
down and z into the picture; the camera at rest is at the origin.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Track:
    """A vector over time, `total * t + bend * (t * t - t)`: zero at t = 0, `total` at t = 1, accelerated by `2 * bend`."""

    total: np.ndarray
    bend: np.ndarray

    def at(self, t: float) -> np.ndarray:
        """Return the vector at time t."""
        return self.total * t + self.bend * (t * t - t)

    def scaled(self, factor: float) -> Track:
        """Return the track with all displacements multiplied by `factor`."""
        return Track(self.total * factor, self.bend * factor)


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera; `path` holds its position (3), rotation vector in radians (3) and the logarithm of its zoom (1)."""

    focal: float  # in pixels
    centre: tuple[float, float]  # intersection of the optical axis and the frame, in pixels; off the middle of a cropped frame
    path: Track

    def matrix(self, t: float) -> np.ndarray:
        """Return the 3x4 matrix from homogeneous world points to homogeneous pixels at time t."""
        pose = self.path.at(t)
        focal = self.focal * np.exp(pose[6])
        lens = np.array([[focal, 0, self.centre[0]], [0, focal, self.centre[1]], [0, 0, 1]])
        turned = rotation(pose[3:6])
        return lens @ np.column_stack([turned, -turned @ pose[:3]])


@dataclasses.dataclass(frozen=True)
class Body:
    """Rigid motion of an object about a pivot in the world; `path` holds translation (3) and rotation vector (3)."""

    pivot: np.ndarray
    path: Track

    def matrix(self, t: float) -> np.ndarray:
        """Return the 4x4 matrix from homogeneous world points at rest to those at time t."""
        pose = self.path.at(t)
        turned = rotation(pose[3:6])
        matrix = np.eye(4)
        matrix[:3, :3] = turned
        matrix[:3, 3] = self.pivot + pose[:3] - turned @ self.pivot
        return matrix


@dataclasses.dataclass(frozen=True)
class Joint:
    """A hinge in a sheet's plane: whatever is attached rotates about (u, v) by the angle in `swing` (1), in radians."""

    u: float
    v: float
    swing: Track

    def matrix(self, t: float) -> np.ndarray:
        """Return the 3x3 matrix on homogeneous plane coordinates at time t."""
        angle = float(self.swing.at(t)[0])
        cos, sin = np.cos(angle), np.sin(angle)
        u = self.u - cos * self.u + sin * self.v
        v = self.v - sin * self.u - cos * self.v
        return np.array([[cos, -sin, u], [sin, cos, v], [0, 0, 1]])


@dataclasses.dataclass(frozen=True)
class Ripple:
    """A shear that bends a sheet: points move along a direction by a sine of their coordinate across it.

    The coordinate across the direction is unchanged, so the inverse is the same shear with the opposite sign.
    """

    amplitude: float  # in units of the plane
    length: float  # of the wave, in units of the plane
    angle: float  # of the direction, in radians
    phase: float
    rate: float  # radians by which the wave advances from t = 0 to t = 1

    def bend(self, u: np.ndarray, v: np.ndarray, t: float, sign: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Return points (u, v) displaced at time t, or restored with `sign` -1; float32 stays float32."""
        cos, sin = float(np.cos(self.angle)), float(np.sin(self.angle))
        wave = 2 * np.pi / self.length
        shift = np.sin((wave * cos) * v - (wave * sin) * u + float(self.phase + self.rate * t))
        return u + (sign * self.amplitude * cos) * shift, v + (sign * self.amplitude * sin) * shift


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Position and motion of a flat piece of the world: by ripples, then joints from tip to root, then its body."""

    basis: np.ndarray  # 4x3, from homogeneous plane coordinates to homogeneous world points
    extent: tuple[float, float, float, float]  # u0, v0, u1, v1: the painted part, before ripples
    body: Body | None = None
    joints: tuple[Joint, ...] = ()  # from the tip to the root
    ripples: tuple[Ripple, ...] = ()

    def matrix(self, view: np.ndarray, t: float) -> np.ndarray:
        """Return the 3x3 matrix from homogeneous plane coordinates, after the ripples, to homogeneous pixels at time t.

        `view` is the camera's matrix at that time.
        """
        return self.hinge(self.stand(view, t), t)

    def stand(self, view: np.ndarray, t: float) -> np.ndarray:
        """Return the matrix of the plane, without joints, which all sheets with this body and basis share."""
        return view @ (self.basis if self.body is None else self.body.matrix(t) @ self.basis)

    def hinge(self, matrix: np.ndarray, t: float) -> np.ndarray:
        """Apply the joints of this sheet to the matrix of the shared plane and return the product."""
        for joint in reversed(self.joints):
            matrix = matrix @ joint.matrix(t)
        return matrix

    def scaled(self, factor: float) -> Sheet:
        """Return the sheet with its own motion multiplied by `factor`; the camera's motion is unaffected."""
        return dataclasses.replace(
            self,
            body=self.body and dataclasses.replace(self.body, path=self.body.path.scaled(factor)),
            joints=tuple(dataclasses.replace(joint, swing=joint.swing.scaled(factor)) for joint in self.joints),
            ripples=tuple(dataclasses.replace(ripple, amplitude=ripple.amplitude * factor) for ripple in self.ripples),
        )


def place(view: np.ndarray, sheet: Sheet, points: np.ndarray, t: float) -> np.ndarray:
    """Return the pixels [..., 2] of points [..., 2] of the sheet's plane at time t; NaN behind the camera.

    `view` is the camera's matrix at that time.
    """
    u, v = points[..., 0], points[..., 1]
    for ripple in sheet.ripples:
        u, v = ripple.bend(u, v, t)
    return _join(*project(sheet.matrix(view, t), u, v))


def source(view: np.ndarray, sheet: Sheet, pixels: np.ndarray, t: float) -> np.ndarray:
    """Return the points [..., 2] of the sheet's plane at pixels [..., 2] at time t; `view` is the camera's matrix then."""
    u, v = project(np.linalg.inv(sheet.matrix(view, t)), pixels[..., 0], pixels[..., 1], signed=True)
    return _join(*unbend(sheet, u, v, t))


def unbend(sheet: Sheet, u: np.ndarray, v: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Undo the ripples of a sheet at time t for points (u, v) of its plane."""
    for ripple in reversed(sheet.ripples):
        u, v = ripple.bend(u, v, t, sign=-1.0)
    return u, v


def project(matrix: np.ndarray, x: np.ndarray, y: np.ndarray, signed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Apply a 3x3 matrix to points (x, y) and divide; a third coordinate that is not positive gives NaN unless `signed`."""
    (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
    depth = g * x + h * y + i
    if not signed:
        depth = np.where(depth > 0, depth, np.nan)
    return (a * x + b * y + c) / depth, (d * x + e * y + f) / depth


def _join(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack([x, y], axis=-1)


def rotation(vector: np.ndarray) -> np.ndarray:
    """Return the 3x3 matrix that rotates about `vector` by its length in radians (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector))
    if angle == 0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
