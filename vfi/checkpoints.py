"""List the checkpoints of a run and verify each of them (`vfi checkpoints`).

    vfi checkpoints runs/NAME
    vfi checkpoints runs/NAME --json

Every file is read again and compared with the manifest. Exits with 1 if a checkpoint is damaged; `--resume auto` skips it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from shards.cli import parse_flags
from vfi.checkpoint.store import check, list_checkpoints, newest_run, read_state
from vfi.errors import CheckpointError, JobError, clear_errors
from vfi.io.text_table import aligned
from vfi.tracking.run_status import age


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the command."""

    run: tyro.conf.Positional[Path | None] = None
    """Folder of a run; by default the run in ./runs that was trained last."""
    json: bool = False
    """Print a JSON list in place of the table."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Numbers of a checkpoint; None if unknown."""

    name: str
    step: int
    status: Literal["verified", "damaged"]
    problems: tuple[str, ...]
    """What is wrong with which file."""
    best: bool
    """It has the highest PSNR of those that are here."""
    psnr: float | None
    """Of the validation at this step, in dB."""
    epoch: int | None
    ema: bool
    """It has EMA weights."""
    bytes: int
    written: float
    """Seconds since 1970."""


@clear_errors(CheckpointError)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: print a line for each checkpoint, the oldest first."""
    options = parse_flags(Options, "vfi checkpoints", __doc__, argv)
    run = options.run or newest_run()
    checkpoints = describe_all(run)
    print(json.dumps([dataclasses.asdict(c) for c in checkpoints], indent=1) if options.json else table(checkpoints))
    if damaged := sum(checkpoint.status == "damaged" for checkpoint in checkpoints):
        print(f"error: {damaged} of {len(checkpoints)} checkpoints of {run} damaged", file=sys.stderr)
        sys.exit(1)


def describe_all(run_folder: Path) -> list[Checkpoint]:
    """Return all checkpoints of a run, verified; JobError where there is none."""
    found = list_checkpoints(run_folder)
    if not found:
        raise JobError(f"{run_folder} holds no checkpoint: give the folder of a run (`vfi runs` lists them)")
    checkpoints = [_describe(checkpoint.path, checkpoint.step) for checkpoint in found]
    best = max((c.psnr for c in checkpoints if c.psnr is not None), default=None)
    return [dataclasses.replace(c, best=best is not None and c.psnr == best) for c in checkpoints]


def _describe(path: Path, step: int) -> Checkpoint:
    problems = check(path)
    try:
        state = read_state(path)
        psnr, epoch, ema = state.psnr, state.epoch, state.ema_updates > 0
    except CheckpointError:  # among the problems
        psnr, epoch, ema = None, None, False
    return Checkpoint(
        name=path.name,
        step=step,
        status="damaged" if problems else "verified",
        problems=tuple(problems),
        best=False,
        psnr=psnr,
        epoch=epoch,
        ema=ema,
        bytes=sum(file.lstat().st_size for file in path.iterdir()),
        written=path.stat().st_mtime,
    )


def table(checkpoints: Sequence[Checkpoint]) -> str:
    """Return checkpoints as aligned text."""
    lines = [("step", "written", "size", "PSNR", "epoch", "EMA", "status")]
    for c in checkpoints:
        psnr = "-" if c.psnr is None else f"{c.psnr:.2f} dB"
        epoch = "-" if c.epoch is None else str(c.epoch)
        status = ", ".join([c.status.upper() if c.problems else c.status, *c.problems, *["best"] * c.best])
        size, ema = f"{c.bytes / 1e6:.1f} MB", "yes" if c.ema else "-"
        lines.append((str(c.step), f"{age(c.written)} ago", size, psnr, epoch, ema, status))
    return aligned(lines, left=(5, 6))


if __name__ == "__main__":
    main()
