"""Exchange outcomes between the nodes of a job through small files in the run folder, which all of them share.

launch/attempts/current                  name of the attempt that owns the run folder now
launch/attempts/4711_0002/begin.json     job 4711, requeued twice: from which step, when, on which hosts
                          node_1.json    outcome on node 1: absent while it runs, or when the machine is lost
                          rank_3.log …   see rank.py

A requeued job begins another attempt. A node that was only presumed dead notices this, and exits.
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
    """Record of how an attempt began."""

    job_id: str
    step: int
    """Step of the newest checkpoint."""
    time: float
    """Seconds since 1970."""
    hosts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Record of how an attempt ended, on one node or as a whole."""

    kind: str
    """One of done, stopped (by a signal, after saving), failed (by itself), or lost (a node did not report)."""
    code: int = 0
    """Exit code of the process that failed."""
    signals: tuple[str, ...] = ()
    """Names of the signals that the node received."""
    why: str = ""
    time: float = 0.0
    """Seconds since 1970."""


class Attempt:
    """One attempt of a job to execute its run, seen from one of its nodes."""

    def __init__(self, run_folder: Path, job_id: str, restart: int) -> None:
        self.all = run_folder / LAUNCH / "attempts"
        self.job_id, self.name = job_id, f"{job_id}_{restart:04d}"
        self.folder = self.all / self.name

    def begin(self, step: int, hosts: tuple[str, ...]) -> None:
        """Make this attempt the owner of the run folder. Called on node 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / _BEGIN, to_json(Begin(self.job_id, step, time.time(), hosts)))
        write_text(self.all / _CURRENT, self.name)

    def without_progress(self, step: int) -> int:
        """Return how many of this job's most recent attempts, without a gap, began at `step`, where this one is to begin."""
        steps = [begin.step for begin in sorted(self._begun(), key=lambda begin: begin.time)]
        further = [number for number, earlier in enumerate(steps, 1) if earlier != step]
        return len(steps) - (further[-1] if further else 0)

    def _begun(self) -> list[Begin]:
        paths = (path for path in self.all.glob(f"{self.job_id}_*/{_BEGIN}") if path.parent != self.folder)
        return [from_object(Begin, json.loads(path.read_bytes()), str(path)) for path in paths]

    def is_current(self) -> bool:
        """Return whether this attempt owns the run folder."""
        try:
            return (self.all / _CURRENT).read_text() == self.name
        except FileNotFoundError:
            return False

    def wait_to_begin(self, seconds: float) -> bool:
        """Wait up to `seconds` for node 0; return False when it did not begin. Called on the other nodes."""
        end = time.monotonic() + seconds
        while not self.is_current():
            if time.monotonic() > end:
                return False
            time.sleep(_PERIOD)
        return True

    def write(self, node: int, outcome: Outcome) -> None:
        """Report the outcome of a node."""
        write_text(self.folder / f"node_{node}.json", to_json(dataclasses.replace(outcome, time=time.time())))

    def read(self, nodes: int) -> dict[int, Outcome]:
        """Return the outcomes of the nodes that have reported."""
        paths = {node: self.folder / f"node_{node}.json" for node in range(nodes)}
        return {
            node: from_object(Outcome, json.loads(path.read_bytes()), str(path))
            for node, path in paths.items()
            if path.is_file()
        }

    def wait_for_all(self, nodes: int, seconds: float) -> dict[int, Outcome]:
        """Wait until all nodes have reported, another attempt has begun, or `seconds` have passed; then return `read`."""
        end = time.monotonic() + seconds
        while len(told := self.read(nodes)) < nodes and self.is_current() and time.monotonic() < end:
            time.sleep(_PERIOD)
        return told

    def number_of(self, kind: str, rank: int) -> int | None:
        """Return the number in rank_R.pid or rank_R.exit; None when the rank has not written it."""
        try:
            return int((self.folder / f"rank_{rank}.{kind}").read_text())
        except FileNotFoundError:
            return None


def last_outcome(run_folder: Path, nodes: int) -> Outcome | None:
    """Return the outcome of the most recent attempt; None when none has begun or no node has reported."""
    attempts = Attempt(run_folder, "", 0).all
    try:
        job_id, _, restart = (attempts / _CURRENT).read_text().rpartition("_")
    except FileNotFoundError:
        return None
    told = Attempt(run_folder, job_id, int(restart)).read(nodes)
    return together(told, nodes) if told else None


def together(told: dict[int, Outcome], nodes: int) -> Outcome:
    """Combine the outcomes of the nodes into that of the job; every node arrives at the same result.

    A node that does not report is lost, and then the errors of the others are consequences of the loss.
    """
    signals = tuple(sorted({name for outcome in told.values() for name in outcome.signals}))
    if missing := [node for node in range(nodes) if node not in told]:
        return Outcome("lost", signals=signals, why=f"node {', '.join(map(str, missing))} did not report")
    for kind in ("failed", "stopped"):
        for node, outcome in sorted(told.items(), key=lambda one: one[1].time):  # the first error may have caused the others
            if outcome.kind == kind:
                return dataclasses.replace(outcome, signals=signals, why=f"node {node}: {outcome.why}" if outcome.why else "")
    return Outcome("done", signals=signals)
