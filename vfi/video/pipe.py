"""Video through standard input and output, as YUV4MPEG2: ffmpeg … | vfi interpolate - -o - | mpv -."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path

import av

from shards.color_conversion import Colours, from_rgb, is_rgb, reformat, to_rgb
from vfi.errors import JobError

PIPE = Path("-")
"""The name of standard input and standard output on a command line."""
FORMATS = (
    *("yuv420p", "yuv422p", "yuv444p", "yuv411p", "gray"),
    *("yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p12le", "yuv422p12le", "yuv444p12le", "gray10le", "gray12le"),
)


class PipeOutput:
    """Frames on standard output at a constant rate; the format has no times, so each frame is one period long."""

    done = 0

    def __init__(self, colours: Colours, given: str, asked: str, size: tuple[int, int], rate: Fraction) -> None:
        """`given`: pixel format of the input, which is kept if the format can say it; `size`: (height, width)."""
        if asked and asked not in FORMATS:
            raise JobError(f"--pix_fmt {asked} can't be written to standard output: choose from {', '.join(FORMATS)}")
        nearest = "yuv420p" if colours.bits <= 8 else "yuv420p10le"
        self.pix_fmt = asked or (given if given in FORMATS else nearest)
        self.colours, self.period, self.count = colours, 1 / rate, 0
        self.container = av.open("pipe:1", "w", format="yuv4mpegpipe", container_options={"strict": "-1"})
        self.stream = self.container.add_stream("wrapped_avframe", rate=rate)
        self.stream.height, self.stream.width, self.stream.pix_fmt = *size, self.pix_fmt
        self.stream.codec_context.time_base = self.period

    def write(self, frame: av.VideoFrame, pts: int, duration: int = 0, last: bool = False) -> None:
        """Write the next frame."""
        if frame.format.name != self.pix_fmt:
            if is_rgb(frame.format):
                frame = from_rgb(to_rgb(frame, self.colours, self.colours.depth), self.colours, self.pix_fmt)
            else:
                frame = reformat(frame, self.pix_fmt)
        frame.pts, frame.time_base = self.count, self.period
        self.count += 1
        try:
            self.container.mux(self.stream.encode(frame))
        except (av.FFmpegError, OSError) as error:
            raise JobError(f"standard output cannot be written: {error.strerror or error}") from error

    def copy(self, packet: av.Packet) -> None:
        """Ignore the packet: the format holds frames alone."""

    def close(self) -> None:
        """Finish the output."""
        with contextlib.suppress(av.FFmpegError, OSError):  # a reader that has gone was reported by `write`
            self.container.close()
