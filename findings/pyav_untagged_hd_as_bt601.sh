#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1.2): HD video without colour tags is converted by BT.601.
#
# Seen: a 1920x1080 H.264 file without tags, of the samples that RGB (200, 100, 50) has by BT.709, becomes (191, 93, 53) or so.
# Expected: BT.709 for HD, as players assume (mpv, VLC, Chromium: from 720 or 576 rows on), or a way to ask for that default. By
# src_colorspace the matrix has to be known, and to_ndarray does not say that it guessed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --root-user-action=ignore --target "$folder" av==18.1.0 numpy==2.4.6
cd "$folder" && PYTHONPATH="$folder" "${PYTHON:-python3}" - <<'EOF'
import io

import av
import numpy as np

file = io.BytesIO()
with av.open(file, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=25)
    stream.width, stream.height, stream.pix_fmt, stream.options = 1920, 1080, "yuv420p", {"qp": "0", "preset": "ultrafast"}
    frame = av.VideoFrame(1920, 1080, "yuv420p")
    for plane, value in zip(frame.planes, (117, 96, 174)):  # (200, 100, 50) by BT.709
        plane.update(bytes([value]) * plane.buffer_size)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
file.seek(0)
with av.open(file) as container:
    found = next(container.decode(video=0))
usual = found.to_ndarray(format="rgb24")[540, 960]
told = found.to_ndarray(format="rgb24", src_colorspace="ITU709")[540, 960]
print(f"matrix in the file: {found.colorspace} (2: unspecified); RGB {usual}, with src_colorspace ITU709 {told}")
assert found.colorspace == 2
assert np.abs(told - np.array([200.0, 100, 50])).max() <= 2
assert np.abs(usual - np.array([200.0, 100, 50])).max() > 6
EOF
