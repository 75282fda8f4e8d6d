#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1.2): RGB that is encoded as H.264 and decoded again has its chroma half a pixel to the left.
#
# Seen: libswscale puts chroma of 4:2:0 in the center between two luma samples, since a frame made of an array does not say where it
# is wanted. H.264 without a tag has it on the left one, and so FFmpeg's decoder says; reading takes it from there. Columns of chroma
# arrive .5 pixels aside. PyAV has no attribute for it.
# Expected: chroma lies after the way through a lossless file where it was before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --root-user-action=ignore --target "$folder" av==18.1.0 numpy==2.4.6
cd "$folder" && PYTHONPATH="$folder" "${PYTHON:-python3}" - <<'EOF'
import io

import av
import numpy as np
from av.video.reformatter import Interpolation

EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
image = np.full((64, 96, 3), 128.0) + (np.arange(96) - 48)[None, :, None] * np.array([1.0, -0.5, 0.2])  # redder from left to right
frame = av.VideoFrame.from_ndarray(np.rint(image).astype(np.uint8), format="rgb24")
file = io.BytesIO()
with av.open(file, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=25)
    stream.width, stream.height, stream.pix_fmt, stream.options = 96, 64, "yuv420p", {"qp": "0"}
    container.mux(stream.encode(frame.reformat(format="yuv420p", interpolation=EXACT)))
    container.mux(stream.encode())
before = frame.reformat(format="yuv420p", interpolation=EXACT).reformat(format="rgb24", interpolation=EXACT).to_ndarray()
file.seek(0)
with av.open(file) as container:
    after = next(container.decode(video=0)).reformat(format="rgb24", interpolation=EXACT).to_ndarray()


def shift(found):
    """Pixels by which the difference of red and green, a ramp of 1.5 levels a pixel, moved to the left."""
    moved = (found[..., 0].astype(float) - found[..., 1]) - (image[..., 0] - image[..., 1])
    return float(moved[8:-8, 8:-8].mean() / 1.5)


print(f"chroma moved to the left by {shift(before):+.2f} pixels without a file, by {shift(after):+.2f} through a lossless file")
assert abs(shift(before)) < 0.1
assert abs(abs(shift(after)) - 0.5) < 0.1
EOF
