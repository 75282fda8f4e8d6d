#!/usr/bin/env bash
# VapourSynth 81: SelectEvery refuses a cycle of one frame.
# Behaviour:  std.SelectEvery takes `offsets` from each `cycle` of frames, and offsets may repeat, which multiplies frames. A cycle of 1 is
#             an error, so that doubling every frame needs a cycle of 2 with the offsets 0, 0, 1, 1.
# Output seen: "invalid cycle size (must be greater than 1)"; with a cycle of 2 three frames become six.
# Expected:   cycle=1, offsets=[0, 0] makes the same six frames.
# Exit code 1 if the behaviour changes. Needs Python 3.12 or newer (PYTHON=python3.12), for which there are wheels.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet vapoursynth==81
"$venv/bin/python" - <<'P'
import vapoursynth as vs

clip = vs.core.std.BlankClip(length=3)
doubled = vs.core.std.SelectEvery(clip, cycle=2, offsets=[0, 0, 1, 1])
print("cycle 2:", doubled.num_frames, "frames")
assert doubled.num_frames == 6
try:
    again = vs.core.std.SelectEvery(clip, cycle=1, offsets=[0, 0])
except vs.Error as error:
    print("cycle 1:", error)
    assert "greater than 1" in str(error)
else:
    raise SystemExit(f"changed: a cycle of 1 makes {again.num_frames} frames")
print("as described")
P
