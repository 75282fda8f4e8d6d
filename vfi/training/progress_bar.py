"""How far is a run, and how long will it take? A bar on a terminal; elsewhere, as in a cluster's log, a line a minute."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

_SECONDS = 60.0  # between two lines
_LINE = "step {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} to go, {rate_fmt}{postfix}"


class _Lines:
    """Makes a line of each state of a bar, which on a terminal overwrites the one before."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if state := text.strip():
            self.file.write(f"{state}\n")

    def flush(self) -> None:
        self.file.flush()


def progress(step: int, total: int, shown: bool = True, file: TextIO | None = None) -> tqdm:
    """A bar from `step` on, which is not counted for the rate and the time to go; on stderr unless `file` is given."""
    file = sys.stderr if file is None else file
    if file.isatty():
        return tqdm(initial=step, total=total, unit="step", disable=not shown, dynamic_ncols=True, file=file)
    return tqdm(
        initial=step, total=total, unit="step", disable=not shown, file=_Lines(file), bar_format=_LINE,
        mininterval=_SECONDS, maxinterval=_SECONDS, miniters=1,
    )  # fmt: skip
