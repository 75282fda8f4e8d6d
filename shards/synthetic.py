"""Generate training data from photographs: layers that move, with exact middle frames and exact flow.

    python -m shards.synthetic --out data/synthetic/train --samples 1000 --size 128x128 --seed 0
    python -m shards.synthetic --out data/synthetic/val --samples 100 --size 128x128 --split val
    python -m shards.synthetic --out data/rich --style rich --photographs photographs --size 256x256 --no-flow --workers 16

Style `simple`: a background and one to four shapes, each filled with a part of a photograph. Each layer translates, rotates and
scales at a constant rate, and the layers occlude each other. Style `rich`: a camera moves through flat sheets at different
depths with up to a dozen independently moving objects, acceleration, limbs, thin structures, motion blur, changing light and
noise (`shards.rich_drawing`). In both, each frame is rendered from scratch at its own time, so the middle frame is a true frame
and not a blend, and the flow follows from the motion itself.

The photographs are those that scikit-image ships (nothing is downloaded), or those of a folder. `train` and `val` use different
ones: a tenth of a folder, chosen by a hash of the names, is for `val`. A sample depends only on (seed, split, its number, the
options, the photographs).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards import codecs, photographs, writer
from shards.cli import run_job
from shards.schema import Index, SampleMeta, ShardError
from shards.synthetic_scene import PHOTOGRAPHS, Scene, photograph_paths, scene

if TYPE_CHECKING:
    from shards.rich_scene import RichScene

MIN_SIDE, MAX_SIDE = 32, 4096
STYLES = {"simple": 0.06, "rich": 0.25}  # style -> default of max_motion, as a fraction of the width


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `make`; each field is a flag of the command."""

    out: Path
    """Shard folder to write."""
    samples: int = 1000
    """Number of samples."""
    size: str = "128x128"
    """Size of the frames in pixels, as HEIGHTxWIDTH."""
    seed: int = 0
    """Random seed, 0 or more; another seed gives other samples."""
    split: str = "train"
    """Split to generate: train or val, which use different photographs."""
    style: str = "simple"
    """Style of the scenes: simple or rich, which needs OpenCV (pip install 'vfi-training-stack[scenes]')."""
    photographs: Path | None = None
    """Folder of photographs, searched to any depth; default: those of scikit-image. Pictures with transparent parts become
    objects in the style rich."""
    codec: str = "png"
    """How frames are stored: png or qoi (both lossless) or jpeg."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    max_motion: float | None = None
    """Largest displacement of a point from the first frame to the last, in pixels; default: 6 % of the width, rich 25 %."""
    frames: int = 3
    """Number of frames per sample, at equal distances in time."""
    flow: bool = True
    """Store the exact flow from the middle frame to the first and to the last (needs an odd number of frames)."""
    samples_per_shard: int = writer.SAMPLES_PER_SHARD
    """Maximum number of samples per tar."""
    workers: int = 1
    """Number of processes; the bytes written do not depend on it."""


def make(options: Options) -> Index:
    """Write the shard folder and return its index; a folder that is already complete is left as it is.

    Raises ShardError for unusable options and for an output folder that holds something else.
    """
    _check(options)
    arguments: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in ("out", "workers", "photographs")
    }
    if options.style == "simple":  # keep the fingerprint of folders that were written before there were styles
        del arguments["style"]
    material = _find_material(options)
    source = writer.source_of("shards.synthetic", arguments) | {"photographs": material.source}
    if options.style == "rich":
        source["versions"]["opencv"] = _opencv_version()
    tasks = tuple(
        writer.ShardTask(
            f"samples {part[0]} to {part[-1]}", len(part), functools.partial(_samples, options, material.paths, part)
        )
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
        skipped=material.faults,
    )
    return writer.write(options.out, plan, writer.fingerprint(source, material.files), options.workers)


def parse_size(text: str) -> tuple[int, int]:
    """Parse 'HxW' into (height, width). Raises ShardError for anything else and for sides outside of 32 to 4096."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if not match:
        raise ShardError(f"size {text!r} is not HEIGHTxWIDTH, for example 128x192")
    height, width = int(match[1]), int(match[2])
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise ShardError(f"size {text}: each side must be from {MIN_SIDE} to {MAX_SIDE} pixels")
    return height, width


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: parse flags, write the folder and print a summary. Returns the exit code."""
    return run_job(Options, _job, "shards.synthetic", __doc__, argv)


def _job(options: Options) -> int:
    print(writer.describe(options.out, make(options)))
    return 0


def _check(options: Options) -> None:
    codecs.check_codec(options.codec)
    codecs.check_quality(options.quality)
    if options.style not in STYLES:
        raise ShardError(f"unknown style {options.style!r}: choose one of {', '.join(STYLES)}")
    if options.style == "rich":
        _opencv_version()
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
    return STYLES[options.style] * parse_size(options.size)[1] if options.max_motion is None else options.max_motion


def _clip_name(options: Options, number: int) -> str:
    return f"{options.split}-{options.seed}-{number:06d}"


@dataclasses.dataclass(frozen=True)
class _Material:
    """The photographs of a job: their description in the index, their files, and faults of unusable ones."""

    source: Any
    paths: tuple[Path, ...]
    files: tuple[tuple[str, os.stat_result], ...] = ()
    faults: dict[str, str] = dataclasses.field(default_factory=dict)


def _find_material(options: Options) -> _Material:
    if options.photographs is None:
        paths = tuple(photograph_paths(options.split))
        return _Material(list(PHOTOGRAPHS[options.split]), paths, tuple((path.name, path.stat()) for path in paths))
    survey = photographs.survey(options.photographs, options.workers)
    for fault in survey.faults.values():
        print(f"shards.synthetic: a photograph is skipped: {fault}", file=sys.stderr)
    names = photographs.deal(survey, options.split)
    source = {
        "folder": options.photographs.name,
        "count": len(names),
        "sha256": photographs.digest_of(survey.digests, names),
    }
    return _Material(source, tuple(options.photographs / name for name in names), (), survey.faults)


def _opencv_version() -> str:
    """Return the version of OpenCV, whatever its package is called; raise ShardError if it is missing."""
    try:
        import cv2
    except ImportError as error:
        raise ShardError("style rich needs OpenCV: pip install 'vfi-training-stack[scenes]', or choose style simple") from error
    return cv2.__version__


def _samples(options: Options, paths: tuple[Path, ...], numbers: Sequence[int]) -> Iterator[writer.Sample]:
    height, width = parse_size(options.size)
    for number in numbers:
        drawn = _draw(options, paths, number, height, width)
        times = np.linspace(0, 1, options.frames)
        middle = float(times[options.frames // 2])
        yield writer.Sample(
            key=f"synthetic-{_clip_name(options, number)}",
            meta=SampleMeta(_clip_name(options, number), tuple(range(options.frames)), height, width),
            frames=tuple(codecs.encode(drawn.render(float(t)), options.codec, options.quality) for t in times),
            flow_t0=drawn.flow(middle, 0.0) if options.flow else None,
            flow_t1=drawn.flow(middle, 1.0) if options.flow else None,
        )


def _draw(options: Options, paths: tuple[Path, ...], number: int, height: int, width: int) -> Scene | RichScene:
    if options.style == "simple" and options.photographs is None:
        return scene(options.seed, options.split, number, height, width, _max_motion(options))
    deck = _open_deck(paths, photographs.longest_side(height, width))
    pictures = deck.pictures(options.seed, number)
    if options.style == "simple":
        opaque = [picture.levels[0] for picture in pictures if not picture.is_cutout]
        return scene(options.seed, options.split, number, height, width, _max_motion(options), opaque)
    import cv2

    from shards.rich_drawing import draw_scene

    cv2.setNumThreads(1)  # parallelism comes from the worker processes
    rng = np.random.default_rng([options.seed, list(PHOTOGRAPHS).index(options.split), number, 1])
    return draw_scene(rng, pictures, height, width, _max_motion(options), 1 / (options.frames - 1))


@functools.lru_cache(maxsize=1)
def _open_deck(paths: tuple[Path, ...], longest: int) -> photographs.Deck:
    """Return the deck of this process, cached so that photographs are read only once."""
    return photographs.Deck(paths, longest)


if __name__ == "__main__":
    sys.exit(main())
