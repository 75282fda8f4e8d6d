"""Combs in unmarked frames: found where fields of different times are woven, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable

import av
import numpy as np
import pytest

from vfi.video.comb_detection import find_combs

ROWS, COLUMNS = 96, 128
Scene = Callable[[float], np.ndarray]
"""Time, in frames of a film -> picture [ROWS, COLUMNS], 0 to 255."""


@functools.cache
def textured(seed: int) -> np.ndarray:
    """A picture [4 ROWS, 4 COLUMNS] with the spectrum of photographs, which repeats at its borders."""
    noise = np.random.default_rng(seed).standard_normal((4 * ROWS, 4 * COLUMNS))
    frequency = np.hypot(np.fft.fftfreq(4 * ROWS)[:, None], np.fft.rfftfreq(4 * COLUMNS)[None])
    frequency[0, 0] = 1
    image = np.fft.irfft2(np.fft.rfft2(noise) / frequency**1.2, noise.shape)
    return np.clip(128 + 50 * (image - image.mean()) / image.std(), 0, 255)


TEXTURE = textured(0)
ROW = np.arange(ROWS)[:, None] * np.ones((1, COLUMNS))


def pan(time: float) -> np.ndarray:
    """A camera that turns by 4 pixels a frame."""
    return np.roll(TEXTURE, round(4 * time), 1)[:ROWS, :COLUMNS]


def moving_block(time: float) -> np.ndarray:
    image = TEXTURE[:ROWS, :COLUMNS].copy()
    left = round(10 + 3 * time) % 80
    image[30:60, left : left + 30] = TEXTURE[200:230, 200:230]
    return image


def pan_behind_stripes(time: float) -> np.ndarray:
    """Stripes of one row each, as combs have, that stand still."""
    image = pan(time)
    image[20:60] = np.where(ROW[20:60] % 2, 220, 30)
    return image


QUIET: dict[str, Scene] = {
    "static": lambda time: TEXTURE[:ROWS, :COLUMNS],
    "static stripes": lambda time: np.where(ROW % 2, 220, 30),
    "stripes that move by a row": lambda time: np.where((ROW - round(time)) % 2, 220, 30),
    "fine stripes that move": lambda time: 128 + 90 * np.sin(2 * np.pi * (ROW - time) / 3.3),
    "scrolling text of doubled rows": lambda time: (
        np.roll(TEXTURE[:ROWS, :COLUMNS] > 128, -round(time), 0).repeat(2, 0)[:ROWS] * 200
    ),
    "vertical pan": lambda time: np.roll(TEXTURE, round(2.3 * time), 0)[:ROWS, :COLUMNS],
    "cuts": lambda time: textured(int(time) // 4)[:ROWS, :COLUMNS],
    "fade": lambda time: TEXTURE[:ROWS, :COLUMNS] * max(0.0, 1 - time / 40),
}
MOVING: dict[str, Scene] = {"pan": pan, "moving block": moving_block, "pan behind stripes": pan_behind_stripes}


def weave(even: np.ndarray, odd: np.ndarray) -> np.ndarray:
    frame = even.copy()
    frame[1::2] = odd[1::2]
    return frame


def interlaced(scene: Scene, number: int) -> np.ndarray:
    return weave(scene(number), scene(number + 0.5))


def interlaced_odd_first(scene: Scene, number: int) -> np.ndarray:
    return weave(scene(number + 0.5), scene(number))


def pulldown(scene: Scene, number: int, fields: tuple[tuple[int, int], ...], start: int = 0) -> np.ndarray:
    group, place = divmod(number + start, 5)
    even, odd = fields[place]
    return weave(scene(4 * group + even), scene(4 * group + odd))


CLASSIC = ((0, 0), (1, 1), (1, 2), (2, 3), (3, 3))
ADVANCED = ((0, 0), (1, 1), (1, 2), (2, 2), (3, 3))  # 2:3:3:2, of cameras


def pattern(frame: Callable[[int], np.ndarray], noise: float = 0.0, count: int = 30) -> str:
    random = np.random.default_rng(1)

    def frames():
        for number in range(count):
            image = frame(number) + noise * random.standard_normal((ROWS, COLUMNS))
            yield av.VideoFrame.from_ndarray(np.clip(image, 0, 255).astype(np.uint8), format="gray")

    return find_combs(frames())


@pytest.mark.parametrize("noise", [0, 2])
@pytest.mark.parametrize("name", [*QUIET, *MOVING])
def test_whole_frames_are_no_combs(name, noise):
    scene = (QUIET | MOVING)[name]
    assert pattern(scene, noise) == ""
    assert pattern(lambda number: scene(2 * (number // 2)), noise) == ""  # drawn on twos
    assert pattern(lambda number: scene(number * 4 // 5), noise) == ""  # every fifth frame twice


@pytest.mark.parametrize("noise", [0, 2])
@pytest.mark.parametrize("name", MOVING)
def test_telecine_is_found_at_any_start_and_with_either_field_first(name, noise):
    for start in range(5):
        for fields in (CLASSIC, ADVANCED, tuple((odd, even) for even, odd in CLASSIC)):
            assert pattern(lambda number: pulldown(MOVING[name], number, fields, start), noise) == "telecine"  # noqa: B023


@pytest.mark.parametrize("name", ["pan", "pan behind stripes"])
@pytest.mark.parametrize("kind", [interlaced, interlaced_odd_first])
def test_interlaced_video_is_found(name, kind):
    assert pattern(lambda number: kind(MOVING[name], number)) == "interlaced"


def test_no_more_frames_are_taken_than_needed():
    taken = []

    def frame(number: int) -> np.ndarray:
        taken.append(number)
        return pan(number)

    assert pattern(frame) == ""
    assert len(taken) == 13  # twelve pairs


@pytest.mark.parametrize("rows", range(1, 8))
@pytest.mark.filterwarnings("error")
def test_frames_of_few_rows_are_no_combs(rows):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, rows, 32), dtype=np.uint8)
    assert find_combs(av.VideoFrame.from_ndarray(image, format="gray") for image in images) == ""
