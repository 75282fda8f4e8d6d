"""Watchdog threads that name the process that hangs, and spread the request to stop to all processes.

    with Watchdog(device, seconds) as watch:
        watch.at("waiting for data")     # all processes pass the same places in the same order
        if watch.stop(): …               # the same answer on all of them after the same step

When a process hangs, all others wait for it in a collective operation, and none of them can tell which one is missing. So each
process counts the places that it passes, and writes the count into the store through which the launcher connected the
processes. Where nothing has moved for too long, the process that is silent or behind is named, and the run ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn, Self

import torch
import torch.distributed as dist

from vfi.runtime.stop_signals import Agreement, StopSignals

_PERIOD = 0.5  # seconds between two looks
_LISTEN = 8  # looks at the others before a process is named: a live process writes at every look
# seconds that the hanging process outlives the others, so that they end with this error and not a broken connection
_LINGER = 3.0
_LOST = 30.0  # seconds without progress that suffice once the store is lost, together with the process that held it
_numbers = itertools.count()


class Heartbeat(NamedTuple):
    """The heartbeat that a process writes at every look."""

    number: int
    """Number of the heartbeat; it stays the same when the whole process is stopped or gone."""
    passed: int
    """Number of places that training has passed."""
    idle: float
    """Seconds since the last progress."""
    place: str


_NOTHING = Heartbeat(0, 0, 0.0, "the start")


class Watchdog:
    """Progress of this process and of the others, and the request to stop; to be entered around training.

    Ends the process with code 1 when no process has moved for `seconds`.
    """

    def __init__(self, device: torch.device, seconds: float, signals: bool = True) -> None:
        self.seconds = seconds
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.store = _store() if several else None
        self.signals = StopSignals() if signals else None
        self.agreement = Agreement(device)
        self.others_stop = False
        self.place, self.passed, self.moves, self.idle = _NOTHING.place, 0, 0, 0.0
        self.talks, self.lost = 0, False  # with the store
        self.listened, self.heard, self.silent = 0, [_NOTHING] * self.world, [0] * self.world
        self.done = threading.Event()
        targets = [self._look] + [self._talk] * several
        self.threads = [threading.Thread(target=target, daemon=True) for target in targets]

    def __enter__(self) -> Self:
        self.watched = threading.get_ident()
        if self.signals:
            self.signals.__enter__()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join(timeout=5)  # a store that does not answer would block it
        if self.signals:
            self.signals.__exit__()

    def at(self, place: str) -> None:
        """Record that training has reached `place`."""
        self.place, self.passed, self.moves = place, self.passed + 1, self.moves + 1

    @contextlib.contextmanager
    def on_main(self, place: str) -> Iterator[None]:
        """Wrap work of the main process for which the others wait: they are one place ahead of it meanwhile."""
        self.at(place)
        if self.rank:
            self.at(f"the wait for rank 0 at {place}")
        yield
        if not self.rank:
            self.at(f"the end of {place}")

    def should_continue(self) -> bool:
        """Record progress within a long place; to be called often. False when this process knows of a request to stop.

        Other processes may learn of the request later.
        """
        self.moves += 1
        return not self.wanted

    @property
    def wanted(self) -> bool:
        """Whether this process has been told to stop, or has heard that another one has."""
        return self.others_stop or (self.signals is not None and self.signals.received is not None)

    def stop(self, at_once: bool = False) -> bool:
        """Return whether any process has been told to stop. See `Agreement.any`."""
        return self.agreement.any(self.wanted, at_once)

    @property
    def reason(self) -> str:
        """The reason why training stops."""
        received = self.signals.received if self.signals else None
        return received.name if received else "another process was told to stop"

    def _look(self) -> None:
        """Thread: count the looks without progress rather than clock time, so that a machine that slept does not count it."""
        seen, talks, deaf = self.moves, 0, 0
        while not self.done.wait(_PERIOD):
            self.idle = self.idle + _PERIOD if self.moves == seen else 0.0
            deaf = deaf + 1 if self.talks == talks else 0
            seen, talks = self.moves, self.talks
            if self.idle < min(self.seconds, _LOST if self.lost else math.inf):
                continue
            if self.store is None:
                self._end([self.rank], f"this process hangs at {self.place}")
            elif self.lost or deaf >= _LISTEN:
                # which may have ended because it waited for this process: its stack is shown, too
                self._end([0, self.rank], "rank 0, or the launcher that holds the store of the processes, does not answer")
            elif self.listened >= _LISTEN and (found := find_stalled_ranks(self.heard, self.silent, self.seconds)):
                self._end(*found)

    def _talk(self) -> None:
        """Thread: write this process's heartbeat into the store and read those of the others; the store may block it."""
        assert self.store is not None
        try:
            for number in itertools.count(1):
                if self.done.wait(_PERIOD):
                    return
                self._exchange(self.store, number)
                self.talks += 1
        except dist.DistError:  # the process that held the store has ended, or training is over
            self.lost = True

    def _exchange(self, store: dist.Store, number: int) -> None:
        """Do one look; a process reads about the others only once it begins to suspect them."""
        store.set(f"beat {self.rank}", json.dumps(Heartbeat(number, self.passed, self.idle, self.place)))
        if self.signals and self.signals.received:
            store.set("stop", "")
        elif store.check(["stop"]):
            self.others_stop = True
        if self.idle < self.seconds - _LISTEN * _PERIOD:
            self.listened = 0
            return
        for rank in range(self.world):
            key = f"beat {rank}"
            beat = Heartbeat(*json.loads(store.get(key))) if store.check([key]) else _NOTHING
            self.silent[rank] = self.silent[rank] + 1 if self.listened and beat.number == self.heard[rank].number else 0
            self.heard[rank] = beat
        self.listened += 1

    def _end(self, named: Sequence[int], text: str) -> NoReturn:
        """Print which process hangs and, if it is this one, its stack; then end the process, whatever it is waiting for."""
        where = "".join(traceback.format_stack(sys._current_frames()[self.watched])) if self.rank in named else ""
        print(f"\n{where}error: nothing has moved for {self.idle:.0f} s (--timeout_minutes {self.seconds / 60:g}): {text}",
              file=sys.stderr, flush=True)  # fmt: skip
        if self.rank in named and self.world > 1:
            time.sleep(_LINGER)
        os._exit(1)


def find_stalled_ranks(heard: Sequence[Heartbeat], silent: Sequence[int], seconds: float) -> tuple[list[int], str] | None:
    """Return the ranks that all others wait for, and a text about them; None while a process still moves.

    By rank: `heard`, the last heartbeat; `silent`, looks without a new one.
    """
    gone = [rank for rank, looks in enumerate(silent) if looks >= _LISTEN - 2]
    if any(beat.idle < seconds / 2 for rank, beat in enumerate(heard) if rank not in gone):
        return None
    last = min(beat.passed for beat in heard)
    behind = gone or [rank for rank, beat in enumerate(heard) if beat.passed == last]
    names = ", ".join(f"rank {rank} at {heard[rank].place}" for rank in behind)
    if gone:
        return gone, f"no sign of life (stopped, killed, or its machine is gone) from {names}"
    if len(behind) == len(heard):
        return behind, f"all processes stand at {heard[0].place}"
    return behind, f"the others wait for {names}"


def _store() -> dist.Store:
    """Return a separate connection to the store of the launcher (or of rank 0), with keys that no other watchdog has used."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"vfi watch {restarts} {next(_numbers)}", store)
