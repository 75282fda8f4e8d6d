"""How do we get training data without any data set? Photographs in layers that move, with exact middle frames and exact flow.

    python -m shards.synthetic --out shards/synthetic/train --samples 1000 --size 128x128 --seed 0
    python -m shards.synthetic --out shards/synthetic/val --samples 100 --size 128x128 --split val

A sample is a background and one to four shapes, each filled with a part of a photograph that scikit-image ships (nothing is
downloaded). Every layer translates, turns and grows at a constant rate, the layers hide each other, and each frame is
rendered from scratch at its own time, so the middle frame is a true frame and not a blend. The flow comes from the layers'
affine maps. `train` and `val` use different photographs. A sample depends on (seed, split, its number, the options) alone.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards import images, writer
from shards.cli import run_job
from shards.schema import Index, SampleMeta, ShardError
from shards.synthetic_scene import PHOTOGRAPHS, photograph_paths, scene

MIN_SIDE, MAX_SIDE = 32, 4096


@dataclasses.dataclass(frozen=True)
class Options:
    """What `make` needs; each field is a flag of the job."""

    out: Path
    """Shard folder to write."""
    samples: int = 1000
    """Number of samples."""
    size: str = "128x128"
    """Height x width of the frames in pixels."""
    seed: int = 0
    """Another seed gives other samples."""
    split: str = "train"
    """train or val: they use different photographs."""
    codec: str = "png"
    """How frames are stored: png or qoi (both lossless) or jpeg."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    max_motion: float | None = None
    """Longest way in pixels that a point goes from the first frame to the last; by default 6 % of the width."""
    frames: int = 3
    """Frames in a sample, at equal distances in time."""
    flow: bool = True
    """Store the exact flow from the middle frame to the first and to the last (needs an odd number of frames)."""
    samples_per_shard: int = writer.SAMPLES_PER_SHARD
    """Most samples in one tar."""
    workers: int = 1
    """Processes; the bytes written do not depend on it."""


def make(options: Options) -> Index:
    """Write the shard folder and return its index; a folder that is already complete is left as it is.

    Raises ShardError for unusable options and for an output folder that holds something else.
    """
    _check(options)
    arguments: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in ("out", "workers")
    }
    source = writer.source_of("shards.synthetic", arguments) | {"photographs": list(PHOTOGRAPHS[options.split])}
    mark = writer.fingerprint(source, [(path.name, path.stat()) for path in photograph_paths(options.split)])
    tasks = tuple(
        writer.ShardTask(f"samples {part[0]} to {part[-1]}", len(part), functools.partial(_samples, options, part))
        for part in writer.chunks(options.samples, options.samples_per_shard)
    )
    plan = writer.Plan(
        split=options.split,
        codec=options.codec,
        frames=options.frames,
        has_flow=options.flow,
        source=source,
        clips=tuple(_clip_name(options, number) for number in range(options.samples)),
        shards=tasks,
    )
    return writer.write(options.out, plan, mark, options.workers)


def parse_size(text: str) -> tuple[int, int]:
    """'HxW' to (height, width). Raises ShardError for anything else and for sizes that make no sense."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if not match:
        raise ShardError(f"size {text!r} is not HEIGHTxWIDTH, for example 128x192")
    height, width = int(match[1]), int(match[2])
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise ShardError(f"size {text}: each side must be from {MIN_SIDE} to {MAX_SIDE} pixels")
    return height, width


def main(argv: Sequence[str] | None = None) -> int:
    """The job: parse flags, make the folder, say what it holds. Returns the exit code."""
    return run_job(Options, _job, "shards.synthetic", __doc__, argv)


def _job(options: Options) -> int:
    print(writer.describe(options.out, make(options)))
    return 0


def _check(options: Options) -> None:
    images.check_codec(options.codec)
    images.check_quality(options.quality)
    if options.split not in PHOTOGRAPHS:
        raise ShardError(f"split {options.split!r} has no photographs: choose train or val")
    if options.samples < 1:
        raise ShardError(f"samples {options.samples}: give 1 or more")
    if options.frames < 2:
        raise ShardError(f"frames {options.frames}: a sample needs 2 or more")
    if options.flow and options.frames % 2 == 0:
        raise ShardError(f"frames {options.frames} is even, so there is no middle frame to give flow for: add --no-flow")
    if options.seed < 0:
        raise ShardError(f"seed {options.seed} is negative: give 0 or more")
    height, width = parse_size(options.size)
    if not 0 <= _max_motion(options) <= min(height, width) / 2:
        raise ShardError(f"max_motion {options.max_motion} is out of range: 0 to half of the shorter side of {options.size}")


def _max_motion(options: Options) -> float:
    return 0.06 * parse_size(options.size)[1] if options.max_motion is None else options.max_motion


def _clip_name(options: Options, number: int) -> str:
    return f"{options.split}-{options.seed}-{number:06d}"


def _samples(options: Options, numbers: Sequence[int]) -> Iterator[writer.Sample]:
    height, width = parse_size(options.size)
    for number in numbers:
        drawn = scene(options.seed, options.split, number, height, width, _max_motion(options))
        times = np.linspace(0, 1, options.frames)
        middle = float(times[options.frames // 2])
        yield writer.Sample(
            key=f"synthetic-{_clip_name(options, number)}",
            meta=SampleMeta(_clip_name(options, number), tuple(range(options.frames)), height, width),
            frames=tuple(images.encode(drawn.render(float(t)), options.codec, options.quality) for t in times),
            flow_t0=drawn.flow(middle, 0.0) if options.flow else None,
            flow_t1=drawn.flow(middle, 1.0) if options.flow else None,
        )


if __name__ == "__main__":
    sys.exit(main())
