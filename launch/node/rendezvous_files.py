"""How do the nodes of a job tell each other what happened? By small files in the run folder, which all of them see.

launch/attempts/current                  name of the attempt that the run folder belongs to now
launch/attempts/4711_0002/begin.json     job 4711, requeued twice: from which step, when, on which hosts
                          node_1.json    how it ended on node 1: nothing is there while it runs, or when the machine is gone
                          rank_3.log …   see rank.py

A job that is requeued begins another attempt. One whose node was only thought dead sees that, and ends.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from launch.submission import LAUNCH
from vfi.io.dataclass_json import from_object, to_json, write_text

_BEGIN, _CURRENT, _PERIOD = "begin.json", "current", 0.5


@dataclasses.dataclass(frozen=True)
class Begin:
    """How an attempt began."""

    job_id: str
    step: int
    """Of the newest checkpoint."""
    time: float
    """Seconds since 1970."""
    hosts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an attempt ended on one node, or altogether."""

    kind: str
    """done, stopped (by a signal, and saved), failed (by itself), or lost (a node is gone)."""
    code: int = 0
    """Exit code of what failed."""
    signals: tuple[str, ...] = ()
    """That the node was sent, by name."""
    why: str = ""
    time: float = 0.0
    """Seconds since 1970."""


class Attempt:
    """One attempt of a job at its run, seen from one of its nodes."""

    def __init__(self, run_folder: Path, job_id: str, restart: int) -> None:
        self.all = run_folder / LAUNCH / "attempts"
        self.job_id, self.name = job_id, f"{job_id}_{restart:04d}"
        self.folder = self.all / self.name

    def begin(self, step: int, hosts: tuple[str, ...]) -> None:
        """On node 0: the run folder belongs to this attempt from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / _BEGIN, to_json(Begin(self.job_id, step, time.time(), hosts)))
        write_text(self.all / _CURRENT, self.name)

    def without_progress(self, step: int) -> int:
        """How many attempts of this job, the last ones, began at the step at which this one is to begin."""
        steps = [begin.step for begin in sorted(self._begun(), key=lambda begin: begin.time)]
        further = [number for number, earlier in enumerate(steps, 1) if earlier != step]
        return len(steps) - (further[-1] if further else 0)

    def _begun(self) -> list[Begin]:
        paths = (path for path in self.all.glob(f"{self.job_id}_*/{_BEGIN}") if path.parent != self.folder)
        return [from_object(Begin, json.loads(path.read_bytes()), str(path)) for path in paths]

    def is_current(self) -> bool:
        """Does the run folder belong to this attempt?"""
        try:
            return (self.all / _CURRENT).read_text() == self.name
        except FileNotFoundError:
            return False

    def wait_to_begin(self, seconds: float) -> bool:
        """On the other nodes: wait for node 0; False when it did not begin."""
        end = time.monotonic() + seconds
        while not self.is_current():
            if time.monotonic() > end:
                return False
            time.sleep(_PERIOD)
        return True

    def write(self, node: int, outcome: Outcome) -> None:
        """Tell how it ended on a node."""
        write_text(self.folder / f"node_{node}.json", to_json(dataclasses.replace(outcome, time=time.time())))

    def read(self, nodes: int) -> dict[int, Outcome]:
        """How it ended on those nodes that have told."""
        paths = {node: self.folder / f"node_{node}.json" for node in range(nodes)}
        return {
            node: from_object(Outcome, json.loads(path.read_bytes()), str(path))
            for node, path in paths.items()
            if path.is_file()
        }

    def wait_for_all(self, nodes: int, seconds: float) -> dict[int, Outcome]:
        """As `read`, once all have told, another attempt has begun, or so many seconds have passed."""
        end = time.monotonic() + seconds
        while len(told := self.read(nodes)) < nodes and self.is_current() and time.monotonic() < end:
            time.sleep(_PERIOD)
        return told

    def number_of(self, kind: str, rank: int) -> int | None:
        """What a process wrote into rank_R.pid or rank_R.exit; None when it has not."""
        try:
            return int((self.folder / f"rank_{rank}.{kind}").read_text())
        except FileNotFoundError:
            return None


def last_outcome(run_folder: Path, nodes: int) -> Outcome | None:
    """How the attempt ended that was the last one; None where none has begun or told."""
    attempts = Attempt(run_folder, "", 0).all
    try:
        job_id, _, restart = (attempts / _CURRENT).read_text().rpartition("_")
    except FileNotFoundError:
        return None
    told = Attempt(run_folder, job_id, int(restart)).read(nodes)
    return together(told, nodes) if told else None


def together(told: dict[int, Outcome], nodes: int) -> Outcome:
    """What the outcomes of the nodes mean for the job, the same on each of them.

    A node that does not tell is gone; then the errors of the others come from that.
    """
    signals = tuple(sorted({name for outcome in told.values() for name in outcome.signals}))
    if missing := [node for node in range(nodes) if node not in told]:
        return Outcome("lost", signals=signals, why=f"nothing is heard of node {', '.join(map(str, missing))}")
    for kind in ("failed", "stopped"):
        for node, outcome in sorted(told.items(), key=lambda one: one[1].time):  # the first error may have made the others
            if outcome.kind == kind:
                return dataclasses.replace(outcome, signals=signals, why=f"node {node}: {outcome.why}" if outcome.why else "")
    return Outcome("done", signals=signals)
