"""Agreement among all processes, and work that only the main process does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from vfi.errors import CheckpointError


def on_main(accelerator: Accelerator, act: Callable[[], object]) -> None:
    """Run `act` on the main process while the others wait; its CheckpointError is raised on all processes."""
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            act()
        except CheckpointError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise CheckpointError(problem[0])


def check_agreement(accelerator: Accelerator, chosen: Path | None) -> None:
    """Raise CheckpointError unless all processes resume from the same checkpoint: one may fail to read what others can."""
    names: Sequence[str] = gather_object([str(chosen and chosen.name)])
    if len(set(names)) > 1:
        each = ", ".join(f"process {rank}: {name}" for rank, name in enumerate(names))
        raise CheckpointError(f"the processes see other checkpoints ({each}): do all of them read the same folder?")
