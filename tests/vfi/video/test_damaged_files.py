"""Files with flipped bits, or cut off, end in a result or in one line, within bounds of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_videos import EVEN, make, new_run
from PIL import Image
from warm import ROOT

pytestmark = pytest.mark.slow
FILES, SECONDS, GIB = 200, 240, 6
CONVERT = """
import contextlib, io, json, pathlib, random, resource, sys, time
folder, run, files = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
import torch
from vfi.interpolate import main
torch.set_num_threads(1)
whole = {path.suffix: path.read_bytes() for path in sorted(folder.glob("whole.*"))}
rng, ended = random.Random(0), []
for number in range(files):
    suffix = rng.choice(sorted(whole))
    data = bytearray(whole[suffix])
    for _ in range(rng.choice((1, 3, 10, 40))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.15:
        data = data[:rng.randrange(len(data))]
    (folder / f"damaged{suffix}").write_bytes(data)
    (folder / "out.mkv").unlink(missing_ok=True)
    flags = ["--allow_damaged"] * (number % 2)
    said, began = io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main([str(folder / f"damaged{suffix}"), "-o", str(folder / "out.mkv"), "--model", run, "--device", "cpu",
                  "--codec", "ffv1", *flags])
        ended.append("result" if (folder / "out.mkv").is_file() else "nothing")
    except SystemExit as stop:
        lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        ended.append("line" if stop.code == 2 and len(lines) == 1 and not (folder / "out.mkv").exists() else said.getvalue())
    except Exception as error:
        ended.append(f"{number} {suffix}: {error!r}")
    if time.monotonic() - began > 20:
        ended.append(f"{number} {suffix} took {time.monotonic() - began:.0f} s")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"ended": ended, "GiB": peak, "left": sorted(path.name for path in folder.iterdir())}))
"""


def test_damaged_files_end_in_a_result_or_one_line(tmp_path):
    run, folder = new_run(tmp_path / "runs" / "fresh"), tmp_path / "files"
    folder.mkdir()
    times = [*EVEN, 200, 240]
    for suffix, codec in (
        (".mp4", "libx264"),
        (".mkv", "libx264"),
        (".webm", "libvpx-vp9"),
        (".avi", "mpeg4"),
        (".ts", "libx264"),
    ):
        make(folder / f"whole{suffix}", times, codec=codec, sound=suffix == ".mkv")
    images = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (48, 64, 3), dtype=np.uint8)) for n in range(5)]
    images[0].save(folder / "whole.gif", save_all=True, append_images=images[1:], duration=100)
    done = subprocess.run([sys.executable, "-c", CONVERT, str(folder), str(run), str(FILES)], cwd=ROOT,
                          capture_output=True, text=True, timeout=SECONDS, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    others = [end for end in found["ended"] if end not in ("result", "line")]
    assert not others
    assert len(found["ended"]) == FILES
    assert min(found["ended"].count(end) for end in ("result", "line")) > FILES / 5
    assert found["GiB"] < GIB
    assert all(Path(name).stem in ("whole", "damaged", "out") for name in found["left"])
