"""The status of a run: written by its main process at the start and at the end, and checked by its readers.

with recorded(folder, total, step):     status.json: running …
    train()                             … finished, stopped or failed, unless it is killed
read_status(folder)                     one of STATES
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vfi.errors import Stopped, message_of
from vfi.io.dataclass_json import RecordError, from_object, to_json, write_text
from vfi.io.writer_lock import process_start

STATUS = "status.json"
STATES = {
    "running": "its process is there",
    "finished": "all steps are done",
    "stopped": "told to stop before that",
    "failed": "an error ended it",
    "killed": "its process is gone and had no time to say why",
    "unclear": "started on another machine, and has not said that it ended",
    "unknown": "nothing was written down",
}


@dataclasses.dataclass(frozen=True)
class Status:
    """The content of status.json."""

    state: str
    """One of STATES; the file holds one of the first four."""
    total: int = 0
    """Steps that the run is to have; 0: unknown."""
    why: str = ""
    host: str = ""
    pid: int = 0
    started: str = ""
    """Start time of the process, which tells it from a later one with the same number."""


@contextmanager
def recorded(folder: Path, total: int, step: Callable[[], int]) -> Iterator[None]:
    """Record that this process trains in `folder` towards `total` steps, and how it ended; `step()` returns the last step.

    Where all steps are done and recorded as finished, the record stays as it is.
    """
    if step() >= total and read_status(folder).state == "finished":
        yield
        return
    status = Status("running", total, "", platform.node(), os.getpid(), process_start(os.getpid()))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STATUS, to_json(status))
    state, why = "stopped", ""
    try:
        yield
        state = "finished" if step() >= total else "stopped"
    except Exception as error:
        state, why = "stopped" if isinstance(error, Stopped) else "failed", message_of(error) or type(error).__name__
        raise
    finally:
        with suppress(OSError):  # a full disk: what ended the run matters more, and is on the screen
            write_text(folder / STATUS, to_json(dataclasses.replace(status, state=state, why=why)))


def read_status(folder: Path) -> Status:
    """Return the state of a run folder, as far as it is visible from this machine."""
    try:
        status: Status = from_object(Status, json.loads((folder / STATUS).read_bytes()), STATUS)
    except FileNotFoundError:
        return Status("unknown")
    except (OSError, ValueError, RecordError) as error:
        return Status("unknown", why=f"{STATUS} cannot be read: {error}")
    if status.state != "running":
        return status
    if status.host != platform.node():
        return dataclasses.replace(status, state="unclear", why=f"started on {status.host}")
    if process_start(status.pid) != status.started:
        return dataclasses.replace(status, state="killed", why=f"process {status.pid} is gone")
    return status


def age(moment: float) -> str:
    """Return the time since `moment` (seconds since 1970) in its largest unit."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
