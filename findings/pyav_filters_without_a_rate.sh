#!/usr/bin/env bash
# PyAV 18.1.0: a filter graph on a video stream doesn't know the stream's frame rate, so filters that need one can't be set up.
# Behaviour:  Graph.add_buffer(template=stream) passes size, pixel format and time base of the stream to FFmpeg's source of frames, but
#             not its rate, and has no parameter for it. decimate (and so inverse telecine, fieldmatch,decimate) wants a constant rate.
# Output seen: av.error.ArgumentError: Invalid argument, when the graph is configured. With the filter fps before it, it works: of 10
#             frames 8 remain.
# Expected:   the rate of the template is used, as ffmpeg does with the same chain of filters.
# Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet av==18.1.0 numpy
cd "$tmp"
"$venv/bin/python" - <<'P'
from fractions import Fraction

import av
import numpy as np

with av.open("in.mkv", "w") as container:
    stream = container.add_stream("ffv1", rate=30)
    stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
    stream.codec_context.time_base = Fraction(1, 30)
    for number in range(10):
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, 30)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def filtered(*filters):
    with av.open("in.mkv") as container:
        stream, graph, count = container.streams.video[0], av.filter.Graph(), 0
        print(f"{', '.join(name for name, _ in filters)}: the stream has {stream.average_rate} frames a second", end="; ")
        chain = [graph.add_buffer(template=stream), *(graph.add(*one) for one in filters), graph.add("buffersink")]
        graph.link_nodes(*chain).configure()
        for frame in [*container.decode(stream), None]:
            graph.push(frame)
            while True:
                try:
                    graph.pull()
                except (av.BlockingIOError, av.EOFError):
                    break
                count += 1
    print(f"{count} frames come out")
    return count


assert filtered(("fps", "30"), ("decimate", "")) == 8
try:
    filtered(("decimate", ""))
except av.ArgumentError as error:
    print(f"ArgumentError: {error.strerror}")
else:
    raise SystemExit("changed: the rate of the stream is known")
print("as described")
P
