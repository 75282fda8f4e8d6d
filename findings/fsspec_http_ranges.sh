#!/usr/bin/env bash
# fsspec 2026.9.0 (with aiohttp 3.14.5): a part of a file over http is the whole file where the server knows no ranges.
# Behaviour:  HTTPFileSystem.cat_file(url, start, end) asks for a range by the header Range and takes whatever is answered. A server
#             may ignore that header (RFC 9110, section 14.2) and answer 200 with the whole file; Python's http.server does.
#             open() of the same address, by contrast, refuses to read from elsewhere than the beginning.
# Output seen: cat_file(url, start=1000, end=2000) of a file of 30000 bytes returns 30000 bytes; cat_ranges likewise.
# Expected:   1000 bytes, or an error as open() raises it. Who continues a broken download by cat_file gets a damaged file.
# Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet fsspec==2026.9.0 aiohttp==3.14.5
cd "$tmp"
"$venv/bin/python" - <<'P'
import functools
import http.server
import random
import threading

import fsspec

content = random.Random(0).randbytes(30000)
with open("shard.tar", "wb") as file:
    file.write(content)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory="."))
threading.Thread(target=server.serve_forever, daemon=True).start()
system, path = fsspec.core.url_to_fs(f"http://127.0.0.1:{server.server_port}/shard.tar")
part = system.cat_file(path, start=1000, end=2000)
parts = system.cat_ranges([path, path], [0, 1000], [1000, 2000])
print(f"cat_file(start=1000, end=2000): {len(part)} bytes, the whole file: {part == content}")
print(f"cat_ranges of two parts of 1000: {[len(one) for one in parts]} bytes")
assert part == content
assert parts == [content, content]
try:
    with system.open(path, "rb") as file:
        file.seek(1000)
        file.read(1000)
except ValueError as error:
    print(f"open: ValueError: {error}")
else:
    raise SystemExit("changed: open() reads a part")
print("as described")
P
