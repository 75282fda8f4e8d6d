"""The trained model that comes with the package, for use without training.

    folder = shipped_model()     # vfi/shipped/small, verified: a folder that `vfi export` wrote
    is_shipped("shipped")        # the name of this model on all command lines: `vfi benchmark --model shipped`

SHA256SUMS next to its three files is the output of `sha256sum README.md config.json model.safetensors`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

SHIPPED = "shipped"
"""Name of the shipped model; a run or folder of this name is given by its path, such as runs/shipped."""
FOLDER = Path(__file__).parent / "small"
SUMS = "SHA256SUMS"
FILES = ("README.md", "config.json", "model.safetensors")


def is_shipped(path: str | Path) -> bool:
    """Return whether `path` is the name of the shipped model."""
    return str(path) == SHIPPED


def has_shipped_model() -> bool:
    """Return whether the package came with a model, intact or damaged."""
    return FOLDER.is_dir()


def shipped_model() -> Path:
    """Return the folder of the shipped model after comparing its files with their checksums.

    Raises CheckpointError where the package came without a model, and for a missing or modified file.
    """
    from vfi.errors import CheckpointError  # deferred: it imports torch, which takes seconds

    if not has_shipped_model():
        raise CheckpointError(
            f"this installation has no shipped model: {FOLDER} is missing. Install a wheel or a checkout of the project that "
            f"holds it, or name a model: a run (--model runs/NAME), a folder of `vfi export`, or ORG/NAME on the hub"
        )
    if damage := list(_damage()):
        raise CheckpointError(
            f"the shipped model in {FOLDER} is damaged: {', '.join(damage)}. Install the project again (in a checkout: "
            f"git checkout -- {FOLDER}), or name another model"
        )
    return FOLDER


def _damage() -> Iterator[str]:
    """Yield a description of what is wrong with each file."""
    try:
        lines = (FOLDER / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield f"{SUMS} cannot be read ({error})"
        return
    sums = {name.strip().removeprefix("*"): digest for digest, _, name in (line.partition(" ") for line in lines)}
    for name in FILES:
        if name not in sums:
            yield f"{SUMS} does not list {name}"
        elif not (FOLDER / name).is_file():
            yield f"{name} is missing"
        elif _sha256(FOLDER / name) != sums[name]:
            yield f"{name} is not what was shipped (its sha256 differs)"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
