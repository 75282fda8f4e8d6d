"""Partial results of a stopped conversion, and the means to resume from them.

    NAME_partial.mp4 (or a folder)       the frames that are done, playable
    NAME_partial.json                    what they were made from and how

A resumed conversion does not encode the frames of the partial video again: it copies their packets into the new file, and
starts with a key frame after them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.bitstream import BitStreamFilterContext
from av.video.stream import VideoStream

from vfi.errors import JobError

_TO_STREAM = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}
"""Bitstream filters for codecs whose packets have another form in containers than encoders emit."""
_RENAMED = {"keep_still": "static_regions"}  # flags of which a partial result may have the former name
_ANEW = "to start from scratch, move it away"
_APART = Fraction(1, 500)  # seconds: some containers have timestamps in milliseconds


@dataclasses.dataclass(frozen=True)
class Partial:
    """The partial result of a stopped conversion, next to the path of the complete one."""

    path: Path

    @classmethod
    def of(cls, out: Path) -> Partial:
        """Return the partial result that belongs to `out`."""
        return cls(out.with_name(f"{out.stem}_partial{out.suffix}"))

    @property
    def facts_path(self) -> Path:
        """Return the path of the file that says what the frames were made from."""
        return self.path.with_name(f"{self.path.stem}.json")

    def frames(self, facts: dict[str, Any]) -> int:
        """Return the number of frames that are done, 0 without a partial result. JobError if its inputs or settings differ."""
        if not self.path.exists():
            return 0
        try:
            found = json.loads(self.facts_path.read_text())
            done = int(found["frames"])
            theirs = {_RENAMED.get(name, name): value for name, value in dict(found["facts"]).items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"--resume: {self.facts_path}, which says how {self.path} was made, cannot be read ({error}); {_ANEW}"
            ) from error
        here = json.loads(json.dumps(facts))
        differing = [name for name in {**here, **theirs} if theirs.get(name) != here.get(name)]
        if differing:
            what = ", ".join(f"{name} {theirs.get(name)} (now {here.get(name)})" for name in differing)
            raise JobError(f"--resume: {self.path} was made with {what}: use the same again; {_ANEW}")
        return done

    def keep(self, temporary: Path, facts: dict[str, Any], frames: int) -> None:
        """Keep what is done as the partial result, in place of the one that it resumed from."""
        self.remove()
        temporary.replace(self.path)
        self.facts_path.write_text(json.dumps({"frames": frames, "facts": facts}, indent=1) + "\n")

    def remove(self) -> None:
        """Remove the frames and their description, if they exist."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.path.unlink(missing_ok=True)
        self.facts_path.unlink(missing_ok=True)


def copy_frames(source: Path, target: Path) -> None:
    """Copy the files of a folder into a new one, as hard links where the file system supports them."""
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)


class PartialVideoReader:
    """The packets of a partial video, one for each of its frames, in the order in which they were written."""

    def __init__(self, path: Path, frames: int) -> None:
        self.path, self.frames = path, frames
        self.container = self._open()
        self.stream: VideoStream = self.container.streams.video[0]
        with self._open() as counted:
            times = [packet.pts for packet in counted.demux(counted.streams.video[0]) if packet.size]
        if len(times) != frames:
            self.container.close()
            raise JobError(f"--resume: {path} holds {len(times)} frames, and {frames} were written; {_ANEW}")
        self.first = min((pts for pts in times if pts is not None), default=0)
        self.shift = Fraction(0)
        self.wanted, self.found = list[Fraction](), list[Fraction]()
        self.packets = self._packets()

    def next(self, pts: int, base: Fraction, stream: VideoStream) -> list[av.Packet]:
        """Return the packets to write to `stream` for the frame at `pts`, in units of `base`."""
        packet = next(self.packets)
        assert packet.pts is not None
        assert packet.time_base is not None
        if not self.wanted:  # Matroska moves all streams where the sound of an MP4 begins before zero
            self.shift = pts * base - self.first * packet.time_base
        self.wanted.append(pts * base)
        self.found.append(packet.pts * packet.time_base + self.shift)
        packet.pts = round(self.found[-1] / base)
        packet.dts = None if packet.dts is None else round((packet.dts * packet.time_base + self.shift) / base)
        packet.time_base = base
        packet.stream = stream
        if len(self.found) == self.frames:
            self._check()
        return [packet]

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def _packets(self) -> Iterator[av.Packet]:
        name = _TO_STREAM.get(self.stream.codec_context.name)
        change = BitStreamFilterContext(name, self.stream) if name else None
        for packet in self.container.demux(self.stream):
            if packet.size:
                yield from change.filter(packet) if change else [packet]

    def _check(self) -> None:
        """Raise JobError unless the packets have the times of the frames that they replace."""
        apart = max(abs(one - other) for one, other in zip(sorted(self.wanted), sorted(self.found), strict=True))
        if apart > _APART:
            raise JobError(f"--resume: {self.path} has its frames at other times, by {float(apart):.3f} s; {_ANEW}")

    def _open(self) -> Any:
        try:
            return av.open(str(self.path))
        except (av.FFmpegError, OSError) as error:
            raise JobError(f"--resume: {self.path} cannot be read: {error.strerror or error}; {_ANEW}") from error
