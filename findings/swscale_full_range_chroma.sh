#!/usr/bin/env bash
# PyAV 18.1.0 (libswscale 9.5.102 of FFmpeg 8.1.2): chroma of full range comes out half a level too low.
#
# Seen: random colours as yuv444p of full range have Cb and Cr .5 levels too low on average; of limited range they have no bias. In
# 10 bits it is half a 10-bit level: the middle is put at 127.5 instead of 128 (H.273: Cb = Round(255 * E'Cb) + 128).
# Expected: no bias, as in limited range.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --root-user-action=ignore --target "$folder" av==18.1.0 numpy==2.4.6
cd "$folder" && PYTHONPATH="$folder" "${PYTHON:-python3}" - <<'EOF'
import av
import numpy as np
from av.video.reformatter import Interpolation

EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
frame = av.VideoFrame.from_ndarray(image, format="rgb24")
r, g, b = np.moveaxis(image / 255, 2, 0)
luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
chroma = (b - luma) / 1.8556, (r - luma) / 1.5748
for name, span in (("MPEG", 224), ("JPEG", 255)):
    made = frame.reformat(format="yuv444p", dst_colorspace="ITU709", src_color_range="JPEG", dst_color_range=name, interpolation=EXACT)
    planes = [np.frombuffer(plane, np.uint8).reshape(128, -1)[:, :128] for plane in made.planes[1:]]
    errors = [float((plane - (128 + span * one)).mean()) for plane, one in zip(planes, chroma)]
    print(f"{name}: mean error of Cb {errors[0]:+.2f}, of Cr {errors[1]:+.2f} levels")
    assert all(-0.6 < one < -0.4 if name == "JPEG" else abs(one) < 0.05 for one in errors)
EOF
