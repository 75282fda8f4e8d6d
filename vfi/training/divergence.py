"""Recover after steps that went wrong: name their samples, keep good states in memory, go back to the newest one.

    snapshots = Snapshots(every)
    if snapshots.should_keep(step, guard.first_doubtful_step()):
        snapshots.keep(snapshot)
    snapshot = go_back(accelerator, run_folder, verdict.began, snapshots)

What a state is made of is training_state.py's, in memory as on disk.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from vfi.checkpoint.store import check, list_checkpoints
from vfi.distributed.collectives import on_main
from vfi.io.verified_folder import remove_folder
from vfi.training.state import Snapshot, read_snapshot

_ANNEALING_RISE = 0.1  # of what is left to the identity, each time that the guard sees an explosion building
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


class Snapshots:
    """At most two states of a run in the memory of each process: the newest that is good, and a newer one in doubt.

    A state is good once no trouble can turn out to have begun before it. One in doubt is kept until then, and no newer one is
    made meanwhile: of many that replace each other none would ever become good. The first is that of the start.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        """Steps from one to the next."""
        self.states: list[Snapshot] = []
        """Oldest first."""

    def should_keep(self, step: int, first_doubtful: int) -> bool:
        """Return if the state of this step is due. `first_doubtful`: the first step that is not known to be good."""
        if len(self.states) < 2:
            return not self.states or (step % self.every == 0 and step > self.states[0].state.step)
        return step % self.every == 0 and self.states[1].state.step < first_doubtful

    def keep(self, snapshot: Snapshot) -> None:
        """Copy a newer state, and forget the oldest one of two."""
        del self.states[:-1]  # before there is a third one
        self.states.append(snapshot.copy_to_host())

    def find_before(self, step: int) -> Snapshot | None:
        """Return the newest state of an earlier step."""
        return next((snapshot for snapshot in reversed(self.states) if snapshot.state.step < step), None)

    def forget_after(self, step: int) -> None:
        """Forget the states of later steps, which a run left behind that went back to this one."""
        self.states = [snapshot for snapshot in self.states if snapshot.state.step <= step]


def go_back(accelerator: Accelerator, run_folder: Path, began: int, snapshots: Snapshots) -> Snapshot | None:
    """Return the newest state of a step before `began`, from memory or from a checkpoint that is whole; forget later ones.

    Every process takes part and gets the same answer: None where there is no such state.
    """
    kept = snapshots.find_before(began)
    chosen: list[Path | None] = [None]
    if accelerator.is_main_process:
        at_least = kept.state.step + 1 if kept else 0
        newer = [found.path for found in list_checkpoints(run_folder) if at_least <= found.step < began]
        chosen = [next((path for path in reversed(newer) if not check(path)), None)]
    broadcast_object_list(chosen)
    if chosen[0] is not None:
        found = read_snapshot(chosen[0])
    elif kept is not None:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)  # which may still be copying
        found = kept.copy_to_host()  # it may be gone back to again
    else:
        return None
    snapshots.forget_after(found.state.step)
    on_main(accelerator, lambda: _remove_after(run_folder, found.state.step))
    return found


def _remove_after(run_folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, the newest first: a run that is killed here goes on from one that is left."""
    for checkpoint in reversed(list_checkpoints(run_folder)):
        if checkpoint.step > step:
            remove_folder(checkpoint.path)


class TrainingError(RuntimeError):
    """Training can't go on; the message says at which step and why."""
