"""Save what was submitted alongside the run: a copy of the code, its git state, and the environment.

code/               copy of the packages: the job runs from here, whatever happens to the checkout in the meantime. It has what
                    git tracks, and further source files; data and weights that lie between them are left out and named
changes.patch       differences from the commit, if any
environment.json    command, machine, Python, packages, git commit, variables that change how training runs, what code/ lacks
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.slurm import user_name
from vfi import shipped
from vfi.credentials import redact_all
from vfi.errors import JobError

ROOT = Path(__file__).resolve().parents[1]
CODE, PATCH, ENVIRONMENT = "code", "changes.patch", "environment.json"
PACKAGES = ("vfi", "shards", "launch", "accelerate_configs")
_SOURCES = (".py", ".pyi", ".typed", ".json", ".yaml", ".yml", ".html", ".cu", ".cuh", ".cpp", ".h")
_LARGEST = 1 << 20  # bytes of a source file that git does not track
_VARIABLES = ("NCCL_", "TORCH", "GLOO_", "OMP_", "CUDA_", "ACCELERATE_", "TRITON_", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX",
              "SLURM_", "SBATCH_")  # fmt: skip


def require_checkout() -> None:
    """Raise JobError when accelerate_configs/ is missing next to the packages, as after an install that is not editable."""
    if not (ROOT / "accelerate_configs").is_dir():
        raise JobError(f"{ROOT} is not a checkout of this project: submit from one, installed by pip install -e '.[slurm]'")


def copy_code(folder: Path) -> tuple[Path, list[str]]:
    """Copy the packages; return the folder to import them from, and what was left out, relative to the checkout.

    Copied is what git tracks, also where it was changed, and further source files of up to 1 MiB in code folders; without git
    all source files, and the shipped model. Caches and hidden files are neither copied nor named.
    """
    tracked = {ROOT / name for name in _git("ls-files", "-z", "--", *PACKAGES).split("\0")}
    tracked |= set((ROOT / "vfi" / "shipped" / shipped.FOLDER.name).glob("*"))
    folders = {parent for path in tracked for parent in path.parents} | {ROOT / "accelerate_configs"}
    left_out = list[str]()

    def copy(source: Path) -> None:
        for path in sorted(source.iterdir()):
            name = str(path.relative_to(ROOT))
            if path.name.startswith(".") or path.name == "__pycache__":
                continue
            if _is_source(path) or (path in tracked and path.is_file()):
                (folder / CODE / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, folder / CODE / name)
            elif path.is_dir() and not path.is_symlink() and (path in folders or any(path.glob("*.py"))):
                copy(path)
            else:
                left_out.append(name + "/" * path.is_dir())

    for package in PACKAGES:
        copy(ROOT / package)
    return folder / CODE, sorted(left_out)


def _is_source(path: Path) -> bool:
    return path.suffix in _SOURCES and path.is_file() and path.stat().st_size <= _LARGEST


def describe(folder: Path, argv: list[str], left_out: Sequence[str]) -> None:
    """Write environment.json, and changes.patch if the checkout has uncommitted changes; `left_out`: see copy_code."""
    commit = _git("rev-parse", "HEAD").strip()
    changes = _git("diff", "HEAD") if commit else ""
    if changes:
        (folder / PATCH).write_text(changes)
    content: dict[str, Any] = {
        "command": shlex.join(argv),
        "folder": os.getcwd(),
        "user": user_name() or str(os.getuid()),
        "host": platform.node(),
        "system": platform.platform(),
        "python": sys.version,
        "executable": sys.executable,
        "git": {"commit": commit or None, "changed": _git("status", "--porcelain").splitlines()},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "left_out": list(left_out),
        "packages": {package.name: package.version for package in sorted(metadata.distributions(), key=lambda one: one.name)},
    }
    (folder / ENVIRONMENT).write_text(json.dumps(redact_all(content), indent=1) + "\n")


def _git(*arguments: str) -> str:
    """Return the output of a git command in the checkout; "" when git fails or is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
