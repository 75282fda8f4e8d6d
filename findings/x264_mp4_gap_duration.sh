#!/usr/bin/env bash
# PyAV 18.1.0 (libx264, FFmpeg's MP4): a video with a gap before its last frame says that it ends long before that frame.
# Behaviour:  with B-frames x264 gives a frame the decoding time of a frame shown before it, and an MP4's length is the sum of the
#             distances of decoding times. A gap before the last frames is not among them.
# Output seen: frames at 0, 0.1, 0.2, 3.2 and 3.3 s; the file says 0.5 s, and its last frame is read at 3.3 s. Without B-frames (bf=0)
#             it says 3.4 s; Matroska with them as well.
# Expected:   a length that holds all frames.
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

TIMES = (0, 100, 200, 3200, 3300)


def seconds(name, **options):
    """Write a video with frames at these milliseconds; return the length that it states and the time of its last frame."""
    with av.open(name, "w") as container:
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(TIMES):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * number, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(name) as container:
        last = [frame.time for frame in container.decode(video=0)][-1]
        print(f"{name} {options}: says {container.duration / 1e6:.2f} s, last frame at {last:.2f} s")
        return container.duration / 1e6, last


stated, last = seconds("frames.mp4")
assert stated < 1 < 3.29 < last, (stated, last)
for name, options in (("without.mp4", {"bf": "0"}), ("frames.mkv", {})):
    stated, last = seconds(name, **options)
    assert stated >= last, (stated, last)
print("as described")
P
