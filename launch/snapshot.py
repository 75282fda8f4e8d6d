"""Save what was submitted alongside the run: a copy of the code, its git state, and the environment.

code/               copy of the packages: the job runs from here, whatever happens to the checkout in the meantime
changes.patch       differences from the commit, if any
environment.json    command, machine, Python, packages, git commit, variables that change how training runs
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from vfi.credentials import redact_all
from vfi.errors import JobError

ROOT = Path(__file__).resolve().parents[1]
CODE, PATCH, ENVIRONMENT = "code", "changes.patch", "environment.json"
PACKAGES = ("vfi", "shards", "launch", "accelerate_configs")
_VARIABLES = ("NCCL_", "TORCH", "GLOO_", "OMP_", "CUDA_", "ACCELERATE_", "TRITON_", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX",
              "SLURM_", "SBATCH_")  # fmt: skip


def require_checkout() -> None:
    """Raise JobError when accelerate_configs/ is missing next to the packages, as after an install that is not editable."""
    if not (ROOT / "accelerate_configs").is_dir():
        raise JobError(f"{ROOT} is not a checkout of this project: submit from one, installed by pip install -e '.[slurm]'")


def copy_code(folder: Path) -> Path:
    """Copy the packages and return the folder to import them from."""
    code = folder / CODE
    for package in PACKAGES:
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return code


def describe(folder: Path, argv: list[str]) -> None:
    """Write environment.json, and changes.patch if the checkout has uncommitted changes."""
    commit = _git("rev-parse", "HEAD").strip()
    changes = _git("diff", "HEAD") if commit else ""
    if changes:
        (folder / PATCH).write_text(changes)
    content: dict[str, Any] = {
        "command": shlex.join(argv),
        "folder": os.getcwd(),
        "user": getpass.getuser(),
        "host": platform.node(),
        "system": platform.platform(),
        "python": sys.version,
        "executable": sys.executable,
        "git": {"commit": commit or None, "changed": _git("status", "--porcelain").splitlines()},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
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
