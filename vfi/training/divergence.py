"""Recover from diverged steps: name their samples, keep good states in memory, return to the newest good one.

    snapshots = Snapshots(every)
    if snapshots.should_keep(step, guard.first_doubtful_step()):
        snapshots.keep(snapshot)
    snapshot = go_back(accelerator, run_folder, verdict.began, snapshots)

vfi/training/state.py defines what a state consists of, in memory as on disk.
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
from vfi.model.hyper_connections import annealing_factor, set_annealing
from vfi.model.interpolator import FrameInterpolator
from vfi.training.state import Snapshot, read_snapshot

_ANNEALING_RISE = 0.1  # fraction of the remaining distance to the identity, each time the guard sees an explosion building
Part = tuple[Tensor, tuple[str, ...]]
"""One forward pass: its loss, still on the device, and the keys of its samples."""


def raise_annealing(network: FrameInterpolator) -> float:
    """Move the residual mixing a tenth closer to the identity, and return the annealing factor."""
    now = annealing_factor(network)
    set_annealing(network, now + _ANNEALING_RISE * (1 - now))
    return annealing_factor(network)


def suspects(parts: list[Part]) -> list[str]:
    """Return the sample keys of the forward passes with a non-finite loss, over all processes; of all passes if none has.

    To be called by all processes together.
    """
    own = [(math.isfinite(loss.item()), list(keys)) for loss, keys in parts]
    everything: list[tuple[bool, list[str]]] = gather_object(own)
    broken = [key for finite, keys in everything if not finite for key in keys]
    return broken or [key for _, keys in everything for key in keys]


class Snapshots:
    """At most two states of a run in the memory of each process: the newest that is good, and a newer one in doubt.

    A state is good once no trouble can turn out to have begun before it. One in doubt is kept until then, and no newer one is
    made meanwhile: if newer ones kept replacing it, none would ever become good. The first state is that of the start.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        """Steps between two states."""
        self.states: list[Snapshot] = []
        """The states, oldest first."""

    def should_keep(self, step: int, first_doubtful: int) -> bool:
        """Return whether the state of this step is due. `first_doubtful`: the first step that is not known to be good."""
        if len(self.states) < 2:
            return not self.states or (step % self.every == 0 and step > self.states[0].state.step)
        return step % self.every == 0 and self.states[1].state.step < first_doubtful

    def keep(self, snapshot: Snapshot) -> None:
        """Keep a copy of a newer state, and discard the older one of two."""
        del self.states[:-1]  # before there is a third one
        self.states.append(snapshot.copy_to_host())

    def find_before(self, step: int) -> Snapshot | None:
        """Return the newest state of an earlier step."""
        return next((snapshot for snapshot in reversed(self.states) if snapshot.state.step < step), None)

    def forget_after(self, step: int) -> None:
        """Discard the states of steps after `step`, to which the run has gone back."""
        self.states = [snapshot for snapshot in self.states if snapshot.state.step <= step]


def go_back(accelerator: Accelerator, run_folder: Path, began: int, snapshots: Snapshots) -> Snapshot | None:
    """Return the newest state of a step before `began`, from memory or from an intact checkpoint; discard later ones.

    To be called by all processes together, which get the same answer: None where there is no such state.
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
            torch.cuda.synchronize(accelerator.device)  # the device may still be copying
        found = kept.copy_to_host()  # a copy, since the run may go back to this state again
    else:
        return None
    snapshots.forget_after(found.state.step)
    on_main(accelerator, lambda: _remove_after(run_folder, found.state.step))
    return found


def _remove_after(run_folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, newest first: a run that is killed meanwhile resumes from a remaining one."""
    for checkpoint in reversed(list_checkpoints(run_folder)):
        if checkpoint.step > step:
            remove_folder(checkpoint.path)


class TrainingError(RuntimeError):
    """Training can't continue; the message says at which step and why."""
