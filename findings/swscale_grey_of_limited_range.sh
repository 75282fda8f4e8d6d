#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1.2): grey video of limited range is read as full range.
#
# Seen: a lossless HEVC file of pixel format gray says limited range (tv), its black is 16 and its white 235; both come out as they are.
# yuv420p with the same luma gives 0 and 255.
# Expected: 0 and 255 for both; src_color_range="MPEG" makes no difference.
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


def ends(pix_fmt):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx265", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        stream.options = {"x265-params": "lossless=1:log-level=none"}
        stream.codec_context.color_range = 1
        frame = av.VideoFrame(64, 64, pix_fmt)
        for number, plane in enumerate(frame.planes):
            rows = np.full((plane.height, plane.line_size), 16 if number == 0 else 128, np.uint8)
            if number == 0:
                rows[:, 32:] = 235
            plane.update(rows.tobytes())
        for number in range(4):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        found = next(container.decode(video=0))
    assert (found.format.name, found.color_range) == (pix_fmt, 1)
    image = found.to_ndarray(format="rgb24", src_color_range="MPEG", dst_color_range="JPEG", interpolation=EXACT)
    return int(image[32, 8, 1]), int(image[32, 56, 1])


print("black and white of gray:", ends("gray"), "of yuv420p:", ends("yuv420p"))
assert ends("gray") == (16, 235)
assert ends("yuv420p") == (0, 255)
EOF
