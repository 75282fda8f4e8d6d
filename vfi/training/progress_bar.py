"""Progress of a run and the time it will take: a bar on a terminal, or a line a minute elsewhere, as in a cluster's log."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

_SECONDS = 60.0  # between two printed lines
_LINE = "step {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} to go, {rate_fmt}{postfix}"


class _Lines:
    """Print each state of a bar as a line of its own; on a terminal it would overwrite the previous one."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if state := text.strip():
            self.file.write(f"{state}\n")

    def flush(self) -> None:
        self.file.flush()


def progress(step: int, total: int, shown: bool = True, file: TextIO | None = None) -> tqdm:
    """Return a progress bar that starts at `step`; on stderr unless `file` is given.

    The steps before `step` count neither for the rate nor for the remaining time.
    """
    file = sys.stderr if file is None else file
    if file.isatty():
        return tqdm(initial=step, total=total, unit="step", disable=not shown, dynamic_ncols=True, file=file)
    return tqdm(
        initial=step, total=total, unit="step", disable=not shown, file=_Lines(file), bar_format=_LINE,
        mininterval=_SECONDS, maxinterval=_SECONDS, miniters=1,
    )  # fmt: skip
