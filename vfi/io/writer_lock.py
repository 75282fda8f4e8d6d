"""One writer for each output: a lock beside it that nothing killed leaves closed.

    with writer_lock(Path("runs/first"), "give another --exp_name"):
        …                                               JobError while another process is inside

`.first.writer.1` beside `runs/first` names the process that writes it; its time of change, set again every few seconds, is the
heartbeat. On the machine of that process (the same host name, boot and process namespace) its number and start time show at
once whether it still exists. From elsewhere, such as over NFS or from another container, it counts as gone once it has missed
its heartbeat for STALE seconds, by the clock of the file system. No lock of the system is used, which some network file systems
do not have.

To take over from a process that is gone, a file of the next number is created (O_EXCL, which is atomic on NFS, too) before the
old one is removed, so that of several only one can. A process that was suspended for so long that another has taken over finds
its file gone, and ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from vfi.errors import JobError
from vfi.io.dataclass_json import RecordError, from_object, to_json
from vfi.runtime.logging import logger

STALE = 60.0
"""Seconds without a heartbeat after which a process of another machine counts as gone."""
_BEAT = 5.0  # seconds between heartbeats
_LOOK = 0.5  # seconds between looks at the heartbeat of another machine


@dataclasses.dataclass(frozen=True)
class Writer:
    """The process that writes an output."""

    host: str
    boot: str
    """Identifies the machine's boot: a host name may be that of several containers."""
    namespace: str
    """Identifies the process namespace, in which the number is valid."""
    pid: int
    start: str
    """Start of the process in the kernel's ticks, which tells it from a later one of the same number."""
    started: str
    """The same as a date."""

    @property
    def machine(self) -> tuple[str, str, str]:
        """Where the number of the process is valid."""
        return self.host, self.boot, self.namespace

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, which was started at {self.started}"


@contextmanager
def writer_lock(target: Path, advice: str) -> Iterator[None]:
    """Be the only writer of `target`, a file or folder that need not exist. The ranks of a run are one: rank 0 holds the lock.

    JobError names the process that already writes it, followed by `advice`; then nothing has been written. Where that process
    was on another machine, this waits until its heartbeat is seen again, or is STALE seconds old.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    place = target.resolve()
    new_folders = [folder for folder in place.parents if not folder.exists()]
    try:
        lock = _acquire(place, target, advice)
    except OSError as error:
        raise JobError(f"{target} cannot be written: {error.strerror or error} ({place.parent})") from error
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(lock, target, ended), name="writer lock", daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        with suppress(OSError):  # a file system that is gone: what went wrong there is reported elsewhere
            lock.unlink()
            for folder in new_folders:  # fails at the first that holds anything
                folder.rmdir()


def process_start(pid: int) -> str:
    """Return when a living process started, in the kernel's ticks; empty for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before it may hold anything
    except OSError:
        return ""
    state, start = fields[0], fields[19]
    return "" if state in "ZX" else start


def _acquire(place: Path, target: Path, advice: str) -> Path:
    """Create the next lock file of `place` once the writers of all others have ended."""
    me = _this_process()
    while True:
        place.parent.mkdir(parents=True, exist_ok=True)
        former = _locks(place)
        for lock in former.values():
            _wait_for_end(lock, me, target, advice)
        own = place.with_name(f"{_prefix(place)}{max(former, default=0) + 1}")
        try:
            with own.open("x", encoding="utf-8") as file:
                file.write(to_json(me))
        except (FileExistsError, FileNotFoundError):  # another one was faster, or removed the folder that it had made
            continue
        if set(_locks(place).values()) <= {*former.values(), own}:
            for lock in former.values():
                lock.unlink(missing_ok=True)
            return own
        own.unlink(missing_ok=True)  # another number was taken at the same time
        time.sleep(random.uniform(0, _LOOK))


def _prefix(place: Path) -> str:
    return f".{place.name}.writer."


def _locks(place: Path) -> dict[int, Path]:
    """Return the lock files of an output by their number."""
    prefix = _prefix(place)
    names = [name for name in os.listdir(place.parent) if name.startswith(prefix)]
    return {int(name[len(prefix) :]): place.with_name(name) for name in names if name[len(prefix) :].isdecimal()}


def _wait_for_end(lock: Path, me: Writer, target: Path, advice: str) -> None:
    """Return once the writer of a lock file is gone, or raise JobError where it is not."""
    first, end, is_told = None, time.monotonic() + STALE + 2 * _BEAT, False
    while True:
        try:
            changed, writer = _read(lock)
        except FileNotFoundError:
            return
        first = changed if first is None else first
        is_here = writer is not None and writer.machine == me.machine and not _is_hidden(writer.pid)
        if writer is not None and is_here and process_start(writer.pid) != writer.start:
            return
        age = 0.0 if is_here else _now(lock.parent) - changed
        if age > STALE:
            return
        # a requeued job may overlap with its former attempt on a node that was lost, which ends when it sees the new one
        is_patient = "SLURM_RESTART_COUNT" in os.environ
        if is_here or time.monotonic() > end or (changed != first and not is_patient):
            raise JobError(f"{target} is being written by {writer or 'another process'}: wait for its end, or {advice}")
        if writer is not None and not is_told:
            logger.warning(f"{target} was written by {writer}: waiting up to {STALE - age:.0f} s for a sign of life from there")
            is_told = True
        time.sleep(_LOOK)


def _read(lock: Path) -> tuple[float, Writer | None]:
    """Return a lock file's time of change and the writer that it names, None for a file that is not complete yet."""
    with lock.open("rb") as file:  # the time of an open file: NFS keeps that of a path for a while
        changed, content = os.fstat(file.fileno()).st_mtime, file.read()
    try:
        return changed, from_object(Writer, json.loads(content), lock.name)
    except (ValueError, RecordError):
        return changed, None


def _now(folder: Path) -> float:
    """Return the present time by the clock of a folder's file system, which may be that of another machine."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now.") as file:
        return os.fstat(file.fileno()).st_mtime


def _is_hidden(pid: int) -> bool:
    """Return whether a process exists that this user may not look at (/proc mounted with hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not process_start(pid)
    except ProcessLookupError:
        return False
    return False


def _this_process() -> Writer:
    pid, boot = os.getpid(), Path("/proc/sys/kernel/random/boot_id")
    started = datetime.fromtimestamp(psutil.Process().create_time(), UTC).isoformat(timespec="seconds")
    namespace = os.readlink("/proc/self/ns/pid")
    return Writer(platform.node(), boot.read_text().strip(), namespace, pid, process_start(pid), started)


def _beat(lock: Path, target: Path, ended: threading.Event) -> None:
    """Thread: show that this process lives, and end it where another has taken its place."""
    while not ended.wait(_BEAT):
        try:
            os.utime(lock)
        except FileNotFoundError:
            if ended.is_set():
                return
            print(f"error: {target} is no longer this process's to write: {lock} is gone, as when another process takes over "
                  f"after {STALE:.0f} s without a heartbeat", file=sys.stderr, flush=True)  # fmt: skip
            os._exit(1)
        except OSError:  # a network file system that does not answer for a while
            continue
