#!/usr/bin/env bash
# PyAV 18.1.0: the aspect of pixels doesn't reach the header of Matroska and WebM.
# Behaviour:  An encoder gets codec_context.sample_aspect_ratio. Matroska's writer takes the aspect from the stream, where PyAV doesn't
#             put it, and which has no attribute that can be set. Codecs whose own bits don't state it lose it silently.
# Output seen: VP9 with an aspect of 2 has 2 in MP4 and none in Matroska; H.264, which states it itself, has 2 in both.
# Expected:   2 in all four, as ffmpeg -vf setsar=2 (5.1) makes them.
# Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet av==18.1.0
cd "$tmp"
"$venv/bin/python" - <<'P'
from fractions import Fraction

import av

found = {}
for codec in ("libx264", "libvpx-vp9"):
    for name in ("out.mp4", "out.mkv"):
        with av.open(name, "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.sample_aspect_ratio = Fraction(2)
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
            container.mux(stream.encode())
        with av.open(name) as container:
            found[codec, name] = container.streams.video[0].sample_aspect_ratio
            print(codec, name, found[codec, name])
assert found["libvpx-vp9", "out.mp4"] == found["libx264", "out.mkv"] == found["libx264", "out.mp4"] == 2
if found["libvpx-vp9", "out.mkv"] == 2:
    raise SystemExit("changed: the aspect reaches Matroska")
print("as described")
P
