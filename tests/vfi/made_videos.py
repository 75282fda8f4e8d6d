"""Small videos for tests, with known frames at known times, and functions that read the content of a video."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vfi.checkpoint import store
from vfi.config import presets
from vfi.interpolate import main
from vfi.io.dataclass_json import to_json
from vfi.model.interpolator import FrameInterpolator

SIZE = (48, 64)
EVEN = [0, 40, 80, 120, 160]
"""Milliseconds."""


def new_run(folder: Path, noise: float = 0.0, step: int = 1) -> Path:
    """A run of a network as it is before training: without noise on its weights it makes the mean of two frames, weighted by
    the timestep.
    """
    torch.manual_seed(0)
    config = presets.tiny()
    model = FrameInterpolator(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    store.save(folder, store.State(step), config, model.state_dict(), {})
    (folder / "config.json").write_text(to_json(config))
    return folder


def planes(number: int, pix_fmt: str, size: tuple[int, int] = SIZE) -> av.VideoFrame:
    """A frame that is smooth in place and time, far from the ends of the range."""
    frame = av.VideoFrame(size[1], size[0], pix_fmt)
    bits = frame.format.components[0].bits
    for which, plane in enumerate(frame.planes):
        kind, step = (np.uint8, 1) if bits == 8 else (np.uint16, 2)
        array = np.frombuffer(plane, kind).reshape(plane.height, plane.line_size // step)
        y, x = np.mgrid[: plane.height, : plane.line_size // step]
        middle, swing, speed = (100, 20, 6) if which == 0 else (128, 8, 2.5)  # colours that RGB can hold
        smooth = middle + swing * np.sin((x + 2 * y) / plane.width * 3 + which) + speed * number
        array = (smooth * 2 ** (bits - 8)).astype(kind)
        plane.update(array.tobytes())
    return frame


def scene(level: int, number: int = 0) -> av.VideoFrame:
    """Another picture for each level."""
    image = np.random.default_rng(level).integers(0, 60, (6, 8, 3)).repeat(8, 0).repeat(8, 1) + 20 + level + number
    return av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24").reformat(format="yuv420p")


def make(
    path: Path, times: Sequence[int] = EVEN, *, pix_fmt: str = "yuv420p", codec: str = "ffv1", size: tuple[int, int] = SIZE,
    sound: bool = False, tags: dict[str, int] | None = None, frames: Sequence[av.VideoFrame] | None = None,
    rotation: int = 0, start: int = 0, options: dict[str, str] | None = None, stream_tags: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """A video with these frames at these milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = *size, pix_fmt, options or {}
        stream.metadata.update(stream_tags or {})
        context = stream.codec_context
        context.time_base = Fraction(1, 1000)
        for name, value in (tags or {}).items():
            setattr(context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        audio = container.add_stream("aac" if path.suffix == ".mp4" else "flac", rate=48_000, layout="mono") if sound else None
        container.metadata["title"] = "Straße 1"
        for number, pts in enumerate(times):
            frame = frames[number] if frames else planes(number, pix_fmt, size)
            frame.pts, frame.time_base = pts + start, Fraction(1, 1000)
            container.mux(stream.encode(frame))
            if audio:
                wave = np.sin(np.arange(1920) * (0.05 + 0.01 * number)) * 0.3
                kind = "fltp" if path.suffix == ".mp4" else "s16"
                samples = wave.astype(np.float32) if kind == "fltp" else (wave * 32767).astype(np.int16)
                piece = av.AudioFrame.from_ndarray(samples[None], format=kind, layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = 48_000, number * 1920, Fraction(1, 48_000)
                container.mux(audio.encode(piece))
        container.mux(stream.encode())
        if audio:
            container.mux(audio.encode())
    return path


def call(*arguments: object) -> None:
    main([str(argument) for argument in (*arguments, "--device", "cpu")])


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def frames_of(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def times_of(path: Path) -> list[float]:
    return [frame.time for frame in frames_of(path)]


def packets_of(path: Path, kind: str) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        (stream,) = [stream for stream in container.streams if stream.type == kind]
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.dts is not None]


def pixels(frame: av.VideoFrame, plane: int | None = None) -> np.ndarray:
    """All values of a planar frame in a row, or those of one plane."""
    found = []
    for one in frame.planes if plane is None else [frame.planes[plane]]:
        kind = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
        rows = np.frombuffer(one, kind).reshape(one.height, one.line_size // kind().itemsize)
        found.append(rows[:, : one.width].ravel().astype(np.int64))
    return np.concatenate(found)
