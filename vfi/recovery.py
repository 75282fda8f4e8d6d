"""A step went wrong: which samples was it made of, and which checkpoint does the run go back to?"""

from __future__ import annotations

import math
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from vfi.checkpoint import check, list_checkpoints
from vfi.manifest import remove_folder
from vfi.training_state import on_main

Part = tuple[Tensor, tuple[str, ...]]
"""One forward pass: its loss, still on the device, and the keys of its samples."""


def suspects(parts: list[Part]) -> list[str]:
    """Keys of the samples, of all processes, of those forward passes whose loss is no number; of all where there are none.

    Every process takes part.
    """
    own = [(math.isfinite(loss.item()), list(keys)) for loss, keys in parts]
    everything: list[tuple[bool, list[str]]] = gather_object(own)
    broken = [key for finite, keys in everything if not finite for key in keys]
    return broken or [key for _, keys in everything for key in keys]


def go_back(accelerator: Accelerator, run_folder: Path, began: int) -> Path | None:
    """The newest checkpoint that is whole and older than the step `began`; those after it are removed.

    Every process takes part and gets the same answer.
    """
    chosen: list[Path | None] = [None]
    if accelerator.is_main_process:
        older = [found.path for found in list_checkpoints(run_folder) if found.step < began]
        chosen = [next((path for path in reversed(older) if not check(path)), None)]
    broadcast_object_list(chosen)
    if chosen[0] is not None:
        on_main(accelerator, lambda: _remove_after(run_folder, chosen[0]))
    return chosen[0]


def _remove_after(run_folder: Path, kept: Path | None) -> None:
    """Remove what was written after a checkpoint, the newest first: a run that is killed here goes on from one that is left."""
    for checkpoint in reversed(list_checkpoints(run_folder)):
        if checkpoint.path == kept:
            return
        remove_folder(checkpoint.path)
