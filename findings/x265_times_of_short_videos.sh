#!/usr/bin/env bash
# PyAV 18.1.0 (with libx265): the packets of a video of one or two frames have arbitrary decoding times.
#
# Seen: of 60 videos of one frame the dts of the packet differs from run to run, such as 0 or -88304527626320, and writing MP4 fails now
# and then ("Not yet implemented in FFmpeg, patches welcome"). With bframes=0, and from three frames on, it is always the same.
# Expected: dts is 0, or as much below pts as frames are reordered, whatever the number of frames.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --root-user-action=ignore --target "$folder" av==18.1.0 numpy==2.4.6
cd "$folder" && PYTHONPATH="$folder" "${PYTHON:-python3}" - <<'EOF'
import collections
import io

import av


def first_dts(count, params):
    frame = av.VideoFrame(64, 64, "yuv420p")
    for plane in frame.planes:
        plane.update(bytes([100]) * plane.buffer_size)
    found = []
    with av.open(io.BytesIO(), "w", format="mp4") as container:
        stream = container.add_stream("libx265", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.options = {"x265-params": f"{params}log-level=none"}
        try:
            for number in range(count):
                frame.pts = number
                for packet in stream.encode(frame):
                    found.append(packet.dts)
                    container.mux(packet)
            for packet in stream.encode():
                found.append(packet.dts)
                container.mux(packet)
        except av.FFmpegError as error:
            print("writing failed:", error.strerror)
    return found[0]


seen = {(count, params): collections.Counter(first_dts(count, params) for _ in range(60))
        for count, params in ((1, ""), (1, "bframes=0:"), (3, ""))}
for (count, params), times in seen.items():
    print(f"{count} frames, {params or 'default:'} {len(times)} different first dts, such as {list(times)[:3]}")
assert len(seen[1, ""]) > 1
assert len(seen[1, "bframes=0:"]) == len(seen[3, ""]) == 1
EOF
