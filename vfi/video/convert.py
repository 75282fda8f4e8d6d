"""Convert a video or a folder of frames to one with more frames or to slow motion."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from shards.codecs import upright_size
from shards.field_filters import DEINTERLACE, DETELECINE
from shards.frame_sources import natural
from shards.schema import IMAGE_EXTENSIONS
from shards.sequence_filter import CUT
from vfi.errors import JobError
from vfi.inference.engine import InterpolationEngine, Settings
from vfi.model.interpolator import MIN_SIZE
from vfi.runtime.device import DeviceName, PrecisionName, describe_precision
from vfi.video.container import Encoding, VideoOutput
from vfi.video.folder import FolderInput, FolderOutput, numbered_gaps
from vfi.video.pipe import PIPE, PipeOutput
from vfi.video.pipeline import ConversionStats, FrameFilter, add_frames
from vfi.video.resume import Partial, PartialVideoReader, copy_frames
from vfi.video.timeline import FrameMultiplier, Rate, Timeline
from vfi.video.video_input import VideoInput

DEFAULT_FPS = 15.0
_NAMED = 8  # missing frames that a note names


@dataclasses.dataclass(frozen=True)
class ConversionSettings:
    """How frames are interpolated and written; each field is a flag of `vfi interpolate`."""

    model: Path | None = None
    """Run folder, checkpoint folder, weights file, folder of `vfi export`, or ORG/NAME on the Hugging Face hub; default:
    `shipped`, the model that comes with the package."""
    multiplier: int | None = None
    """Factor by which the number of frames grows; default: 2."""
    fps: float | None = None
    """Frames per second of the output, evenly spaced, instead of a multiplier; 23.976, 29.97, 59.94 are fractions of 1001."""
    slowmo: int | None = None
    """Slow-motion factor: the video gets this many times longer at the same frame rate, without sound and subtitles."""
    timestep: float | None = None
    """Time of the new image between two images: above 0 (the first) and below 1 (the second); default: 0.5."""
    input_fps: float | None = None
    """Frames per second of a folder of frames; default: 15."""
    fill_gaps: bool = False
    """Also make the frames whose numbers are missing in a folder of frames."""
    scene_cut: float = CUT
    """Change between two frames above which they are a scene cut, which is not blended; 0: no cuts are detected."""
    drop_duplicates: bool = False
    """Drop frames that repeat the one before, as in animation or after pulldown."""
    max_gap: float | None = None
    """Seconds between two frames above which nothing is interpolated, as in recordings of a still screen; default: five times
    the usual time, at least 0.5."""
    video_stream: int | None = None
    """Number of the video stream to read, as in the message about a file with several; default: the file's own choice."""
    deinterlace: bool = False
    """Make whole frames of the fields of interlaced video (FFmpeg's bwdif)."""
    detelecine: bool = False
    """Find the frames of a film in 30 interlaced or combed frames a second: 24 remain (FFmpeg's fieldmatch and decimate)."""
    keep_interlaced: bool = False
    """Take interlaced video as it is, or what says so and is not."""
    allow_damaged: bool = False
    """Convert what can be decoded of a damaged video."""
    tta: bool = False
    """Test-time augmentation: average with the prediction for the frames rotated by 180 degrees; takes twice the time."""
    codec: str = ""
    """Video encoder, such as libx265, libsvtav1 or prores_ks; default: H.264, or H.265 for more than 8 bits."""
    crf: int | None = None
    """Quality of the encoder: lower is better; default: 14 to 24, hard to tell from the original."""
    encoder_preset: str = ""
    """The encoder's own name or number for its balance of speed and file size: ultrafast to veryslow for H.264 (default:
    veryfast with subme=1) and H.265 (default: medium), 0 (smallest) to 13 (fastest) for libsvtav1."""
    pix_fmt: str = ""
    """Pixel format of the video, such as yuv420p10le; default: that of the input."""
    scale: float | Literal["auto"] | None = None
    """Estimate flow at this fraction of the frame size: 1, 0.5 (for 2K), 0.25 (4K), or auto, which decides for each pair from
    its size and motion; default: as trained."""
    static_regions: bool = True
    """Keep regions that are the same in two frames unchanged in between: captions, backgrounds."""
    tile: int | None = None
    """Interpolate in overlapping tiles of at most this side; default: whole frames, or tiles where memory does not suffice."""
    max_memory: float | None = None
    """Largest memory to use in GiB (of the GPU, or of this machine); default: what is free."""
    resume: bool = False
    """Resume a conversion that was stopped from its NAME_partial; starts from scratch where there is none."""
    precision: PrecisionName = "auto"
    """auto is bf16 autocast on a GPU that supports it, otherwise fp32; fp16 is faster there on GPUs without bf16."""
    device: DeviceName = "auto"
    """auto selects a GPU if there is one."""


def build_engine(settings: ConversionSettings) -> InterpolationEngine:
    """Load the model with its settings for the engine."""
    return InterpolationEngine(
        Settings(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)})
    )


def new_timeline(settings: ConversionSettings) -> Timeline:
    """Return a new timeline for each video, since it has state; JobError for flags that don't go together."""
    given = {"--multiplier": settings.multiplier, "--fps": settings.fps, "--slowmo": settings.slowmo}
    named = [f"{name} {value}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise JobError(f"{' and '.join(named)} exclude each other: give one of them")
    for name in ("--multiplier", "--slowmo"):
        if (value := given[name]) is not None and not 2 <= value <= 64:
            raise JobError(f"{name} {value} must lie between 2 and 64")
    if sum((settings.deinterlace, settings.detelecine, settings.keep_interlaced)) > 1:
        raise JobError("--deinterlace, --detelecine and --keep_interlaced exclude each other: give one of them")
    if settings.max_gap is not None and settings.max_gap < 0:
        raise JobError(f"--max_gap {settings.max_gap} must not be negative")
    if settings.fps is not None:
        if not 0.1 <= settings.fps <= 1000:
            raise JobError(f"--fps {settings.fps} must lie between 0.1 and 1000")
        return Rate(_fraction(settings.fps))
    factor, slower = settings.slowmo or settings.multiplier or 2, bool(settings.slowmo)
    return FrameMultiplier(factor, slower, fill=settings.fill_gaps)


def _fraction(fps: float) -> Fraction:
    """Return the exact rate: 29.97 is 30000 / 1001."""
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if ntsc and abs(float(ntsc) - fps) < 0.005 and fps != round(fps) else Fraction(fps).limit_denominator(1001)


def convert(
    settings: ConversionSettings, path: Path, out: Path, model: InterpolationEngine, tick: Callable[[], object] = lambda: None
) -> str:
    """Convert a video or folder of frames to either kind, and return a line about it; `tick` is called for each frame read.

    `model` is that of `build_engine`. Raises JobError or ShardError where the input, the flags or the output can't be used.
    """
    if PIPE in (path, out) and settings.resume:
        raise JobError("--resume needs files: a conversion through a pipe can't be continued")
    if out == PIPE:
        return _convert_to_pipe(settings, path, model)
    line, partial, temporary = new_timeline(settings), Partial.of(out), temporary_path(out)
    facts = functools.partial(_facts, settings, path, model)  # hashes all weights: only for when it is stopped or resumed
    done = _done(settings, partial, facts)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, temporary)
        source, size = _open(settings, path, stack)
        sink = _create(settings, temporary, source, size, line, stack, partial.path, done)
        bar = stack.enter_context(tqdm(total=source.expected, unit="frame", desc=path.name, disable=None))
        began, busy = time.perf_counter(), model.seconds
        try:
            counts = add_frames(source, sink, line, model.start, _filter(settings), lambda: (bar.update(), tick()))
        except KeyboardInterrupt:
            if isinstance(sink, VideoOutput):
                sink.close()
            if sink.count >= done:
                partial.keep(temporary, facts(), sink.count)
                tqdm.write(f"stopped: what was done is {partial.path}; --resume continues it")
            raise
        if isinstance(sink, VideoOutput):
            sink.close()
        temporary.replace(out)
    partial.remove()
    seconds = time.perf_counter() - began
    return _described(out, source, counts, line, model) + _pace(counts, seconds, model.seconds - busy)


def _convert_to_pipe(settings: ConversionSettings, path: Path, model: InterpolationEngine) -> str:
    """Convert a video or folder of frames to standard output, and return a line about it."""
    if Encoding(settings.codec, settings.crf, settings.encoder_preset) != Encoding():
        raise JobError("--codec, --crf and --encoder_preset are for files: standard output gets frames that are not encoded")
    line = new_timeline(settings)
    with contextlib.ExitStack() as stack:
        source, size = _open(settings, path, stack)
        given = source.pix_fmt if isinstance(source, VideoInput) else "rgb24"
        sink = PipeOutput(source.colours, given, settings.pix_fmt, size, line.rate(source.rate))
        stack.callback(sink.close)
        began, busy = time.perf_counter(), model.seconds
        counts = add_frames(source, sink, line, model.start, _filter(settings))
        seconds = time.perf_counter() - began
        return _described(PIPE, source, counts, line, model) + _pace(counts, seconds, model.seconds - busy)


def _filter(settings: ConversionSettings) -> FrameFilter:
    longest = math.inf if settings.fill_gaps else settings.max_gap
    return FrameFilter(settings.scene_cut, settings.drop_duplicates, longest)


def _facts(settings: ConversionSettings, path: Path, model: InterpolationEngine) -> dict[str, Any]:
    """Return everything that a result depends on."""
    elsewhere = ("model", "device", "tile", "max_memory", "resume", "timestep")
    flags = {name: value for name, value in dataclasses.asdict(settings).items() if name not in elsewhere}
    size = path.stat().st_size if path.is_file() else len(frames_of(path))
    return {"input": path.name, "input_size": size, "weights": model.loaded.fingerprint()[:16], **flags}


def _done(settings: ConversionSettings, partial: Partial, facts: Callable[[], dict[str, Any]]) -> int:
    """Return the number of frames that a stopped conversion has already written."""
    if not settings.resume:
        if partial.path.exists():
            raise JobError(
                f"{partial.path} is there, from a conversion that was stopped: --resume continues it; "
                f"to start from scratch, move it away"
            )
        return 0
    done = partial.frames(facts())
    tqdm.write(
        f"{partial.path}: {done} frames are done" if done else f"{partial.path} is not there: this starts at the first frame"
    )
    return done


def _open(
    settings: ConversionSettings, path: Path, stack: contextlib.ExitStack
) -> tuple[VideoInput | FolderInput, tuple[int, int]]:
    """Open the input; returns it and the (height, width) of its frames."""
    if not path.is_dir():
        if settings.fill_gaps:
            raise JobError(f"--fill_gaps is for a folder of numbered frames: {path} is a file")
        if settings.input_fps is not None:
            raise JobError(f"--input_fps {settings.input_fps} is for a folder of frames: {path} has a rate of its own")
        fields = DEINTERLACE if settings.deinterlace else DETELECINE if settings.detelecine else None
        video = stack.enter_context(
            VideoInput(path, settings.allow_damaged, settings.video_stream, fields, settings.keep_interlaced)
        )
        _check_size(path, (video.height, video.width))
        return video, (video.height, video.width)
    fps = DEFAULT_FPS if settings.input_fps is None else settings.input_fps
    if not 0.1 <= fps <= 1000:
        raise JobError(f"--input_fps {fps} must lie between 0.1 and 1000")
    paths = frames_of(path)
    sizes = {one: _size_of(one) for one in paths}
    check_sizes(sizes)
    numbers, missing = numbered_gaps(paths)
    frames = FolderInput(paths, _fraction(fps), numbers if missing and settings.fill_gaps else None)
    if missing:
        named = f"{', '.join(map(str, missing[:_NAMED]))}{' …' * (len(missing) > _NAMED)}"
        how = "are made" if settings.fill_gaps else "are missing: --fill_gaps makes them"
        frames.notes.append(f"frames {named} ({len(missing)}) {how}")
    return frames, sizes[paths[0]]


def _create(
    settings: ConversionSettings, path: Path, source: VideoInput | FolderInput, size: tuple[int, int], line: Timeline,
    stack: contextlib.ExitStack, partial: Path, done: int,
) -> VideoOutput | FolderOutput:  # fmt: skip
    """Open the output; its first `done` frames are copied from `partial`."""
    encoding = Encoding(settings.codec, settings.crf, settings.encoder_preset, settings.pix_fmt)
    if not path.suffix:
        if encoding != Encoding():
            raise JobError("--codec, --crf, --encoder_preset and --pix_fmt are for a video: frames are written as PNG")
        if done:
            copy_frames(partial, path)
        else:
            path.mkdir()
        return FolderOutput(path, source.colours, done)
    video = source if isinstance(source, VideoInput) else None
    base = line.start(0, source.base)
    begun = stack.enter_context(contextlib.closing(PartialVideoReader(partial, done))) if done else None
    sink = VideoOutput(path, video, size, base, line.rate(source.rate), encoding, line.slowdown, begun, source.colours)
    stack.callback(sink.give_up)
    for reason in sink.left_out:
        tqdm.write(f"left out: {reason}")
    return sink


def _described(
    out: Path, source: VideoInput | FolderInput, counts: ConversionStats, line: Timeline, model: InterpolationEngine
) -> str:
    rates = (
        f"{counts.written} frames at {float(line.rate(source.rate)):g} per second from {counts.read} at {float(source.rate):g}"
    )
    notes = [f"{counts.cuts} scene cuts"] if counts.cuts else []
    notes += [f"{counts.dropped} duplicates left out"] if counts.dropped else []
    notes += [f"{counts.gaps} gaps that are not interpolated (--max_gap)"] if counts.gaps else []
    notes += source.notes
    notes += [source.damage] if isinstance(source, VideoInput) and source.damage else []
    return ", ".join([f"{out}: {rates}", *notes, made_by(model)])


def _pace(counts: ConversionStats, seconds: float, model: float) -> str:
    """Describe the speed and the time of the three stages, which run concurrently: the slowest one is the bottleneck."""
    shares = {"reading": counts.reading, "model": model, "writing": counts.writing}
    parts = ", ".join(f"{name} {part / seconds:.0%}" for name, part in shares.items())
    return f"; {counts.written / seconds:.3g} frames/s ({parts} of the time)"


def frames_of(folder: Path) -> list[Path]:
    """Return the image files of a folder sorted by name, frame2 before frame10; JobError for fewer than two."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")]
    if len(paths) < 2:
        raise JobError(f"{folder} holds {len(paths)} images; two or more are needed ({', '.join(sorted(IMAGE_EXTENSIONS))})")
    return sorted(paths, key=lambda path: natural(path.name))


def _size_of(path: Path) -> tuple[int, int]:
    """Read (height, width) from the header of the file alone."""
    try:
        return upright_size(path)
    except OSError as error:
        raise JobError(f"{path} cannot be read as an image: {error}") from error


def check_sizes(sizes: Mapping[Path, tuple[int, ...]]) -> None:
    """Raise JobError unless all frames have the same size, and are large enough."""
    first, (height, width) = next(iter(sizes.items()))
    for path, size in sizes.items():
        if size != (height, width):
            raise JobError(
                f"frames must be of one size: {first} is {width}x{height} and {path} is {size[1]}x{size[0]} (width x height)"
            )
    _check_size(first, (height, width))


def _check_size(path: Path, size: tuple[int, int]) -> None:
    if min(size) < MIN_SIZE:
        raise JobError(f"{path} is {size[1]}x{size[0]} (width x height): each side must be at least {MIN_SIZE}")


def temporary_path(out: Path) -> Path:
    """Return the path of an incomplete result; it keeps the extension, from which writers infer the format."""
    return out.with_name(f".{out.stem}_{os.getpid()}{out.suffix}")


def _remove(path: Path) -> None:
    """Remove an unfinished result; a finished one has been renamed."""
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def made_by(model: InterpolationEngine) -> str:
    return f"by {model.loaded.name} at step {model.loaded.step} ({model.device.type}, {describe_precision(model.precision)})"
