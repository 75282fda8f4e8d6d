#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1, x264): of stereo video only the frames that carry the message are decoded as stereo.
# Behaviour:  x264 writes the frame packing with keyframes, with a repetition period of 1: until the next sequence. FFmpeg's decoder gives
#             it to the frame it was written with and to none of those that follow.
# Output seen: of ten frames with one keyframe the first has stereo side data, in MP4, Matroska and MPEG-TS.
# Expected:   all ten have it (H.264, D.2.26: a period of 1 means that the message persists).
# Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet av==18.1.0 numpy
cd "$tmp"
"$venv/bin/python" - <<'P'
import av
import numpy as np

found = {}
for name in ("out.mp4", "out.mkv", "out.ts"):
    with av.open(name, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "frame-packing=3:bframes=0:log=none"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            image = np.full((48, 64, 3), 20 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(name) as container:
        frames = list(container.decode(video=0))
        found[name] = [any(data.type.name == "STEREO3D" for data in frame.side_data) for frame in frames]
        print(name, "stereo:", found[name])
assert all(len(stereo) == 10 and stereo[0] for stereo in found.values())
if all(all(stereo) for stereo in found.values()):
    raise SystemExit("changed: all frames are stereo")
assert all(sum(stereo) == 1 for stereo in found.values())
print("as described")
P
