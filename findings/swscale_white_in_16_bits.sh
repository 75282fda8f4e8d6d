#!/usr/bin/env bash
# PyAV 18.1.0 (libswscale 9.5.102 of FFmpeg 8.1.2): white is not the largest value when the number of bits changes.
#
# Seen: white of rgb24 and of limited-range YUV becomes 65283 of 65535 in 16 bits. The other way round a ramp of rgb48le is .49
# levels too bright as rgb24. One level of 8 bits is taken for 256 and not for 257 of 16 bits.
# Expected: white stays white, and values in between are scaled by 65535 / 255.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --root-user-action=ignore --target "$folder" av==18.1.0 numpy==2.4.6
cd "$folder" && PYTHONPATH="$folder" "${PYTHON:-python3}" - <<'EOF'
import av
import numpy as np
from av.video.reformatter import Interpolation

EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def to(frame, pix_fmt, **options):
    return frame.reformat(format=pix_fmt, interpolation=EXACT, dst_color_range="JPEG", **options).to_ndarray()


white = to(av.VideoFrame.from_ndarray(np.full((16, 16, 3), 255, np.uint8), format="rgb24"), "rgb48le")
print("rgb24 white in rgb48le:", white[8, 8])
assert (white < 65_300).all()

frame = av.VideoFrame(32, 32, "yuv444p10le")
for plane, value in zip(frame.planes, (940, 512, 512)):
    plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
limited = to(frame, "gbrp16le", src_color_range="MPEG", src_colorspace="ITU709")
print("yuv444p10le white in gbrp16le:", limited[8, 8])
assert (limited < 65_300).all()

ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256, 1).repeat(3, 2)
narrow = to(av.VideoFrame.from_ndarray(ramp, format="rgb48le"), "rgb24")
error = (narrow - ramp / 257).mean()
print(f"rgb48le in rgb24: {error:+.2f} levels on average")
assert error > 0.4
EOF
