#!/usr/bin/env bash
# PyAV 18.1.0 (libswscale 9.5.102 of FFmpeg 8.1.2): blue far beyond white becomes 0 instead of 255.
#
# Seen: Y = 254, Cb = 254, Cr = 128 of 8-bit limited BT.709, codes that BT.709 allows a signal, as gbrp or by FULL_CHR_H_INT as rgb24
# has blue 0; with Cb = 230 blue is 255. From 512 levels on the number wraps round.
# Expected: blue is cut off at 255.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --root-user-action=ignore --target "$folder" av==18.1.0 numpy==2.4.6
cd "$folder" && PYTHONPATH="$folder" "${PYTHON:-python3}" - <<'EOF'
import av
from av.video.reformatter import Interpolation

EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def blue(cb, pix_fmt):
    frame = av.VideoFrame(32, 32, "yuv444p")
    for plane, value in zip(frame.planes, (254, cb, 128)):
        plane.update(bytes([value]) * plane.buffer_size)
    options = {"src_colorspace": "ITU709", "src_color_range": "MPEG", "dst_color_range": "JPEG", "interpolation": EXACT}
    return int(frame.reformat(format=pix_fmt, **options).to_ndarray()[16, 16, 2])


found = {(cb, pix_fmt): blue(cb, pix_fmt) for cb in (230, 254) for pix_fmt in ("gbrp", "rgb24")}
print("blue by Cb and format:", found)
assert all(value == (255 if cb == 230 else 0) for (cb, _), value in found.items())
EOF
