#!/usr/bin/env bash
# simplejpeg 1.9.0 (Pillow 12.3.0 beside it): encode_jpeg(fastdct=False) uses the fast transform below quality 96.
#
# Seen: the bytes are the same with fastdct=True and fastdct=False. At quality 95 the picture is more than .3 dB worse than Pillow's
# with the same tables of quantization (37.78 and 38.11 dB); from 96 on it is the same.
# Expected: the accurate transform at any quality unless fastdct is true, as its help says ("If True, use fastest DCT method").
# libjpeg-turbo's older interface takes the accurate one below 96 only with TJFLAG_ACCURATEDCT.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --root-user-action=ignore --target "$folder" simplejpeg==1.9.0 numpy==2.4.6 pillow==12.3.0
cd "$folder" && PYTHONPATH="$folder" "${PYTHON:-python3}" - <<'EOF'
import io

import numpy as np
import simplejpeg
from PIL import Image

rng = np.random.default_rng(0)
small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
frame = np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC)) // 2 + rng.integers(0, 12, (480, 640, 3), dtype=np.uint8)


def by_simplejpeg(quality, fastdct):
    return simplejpeg.encode_jpeg(frame, quality=quality, colorspace="RGB", colorsubsampling="444", fastdct=fastdct)


def by_pillow(quality):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "jpeg", quality=quality, subsampling=0)
    return buffer.getvalue()


def psnr(data):
    return 10 * np.log10(255**2 / np.mean((simplejpeg.decode_jpeg(data).astype(float) - frame) ** 2))


tables = [Image.open(io.BytesIO(data)).quantization for data in (by_simplejpeg(95, False), by_pillow(95))]
assert tables[0] == tables[1]
for quality in (90, 95, 96):
    slow, fast = by_simplejpeg(quality, False), by_simplejpeg(quality, True)
    print(f"quality {quality}: same bytes with and without fastdct: {slow == fast}; "
          f"simplejpeg {psnr(slow):.2f} dB, Pillow {psnr(by_pillow(quality)):.2f} dB")
assert by_simplejpeg(95, False) == by_simplejpeg(95, True)
assert psnr(by_simplejpeg(95, False)) < psnr(by_pillow(95)) - 0.3
assert abs(psnr(by_simplejpeg(96, False)) - psnr(by_pillow(96))) < 0.01
EOF
