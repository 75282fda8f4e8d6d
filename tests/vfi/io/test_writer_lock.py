"""One writer of an output, on one machine and as seen from another."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from vfi.errors import JobError
from vfi.io import writer_lock as module
from vfi.io.writer_lock import STALE, Writer, writer_lock

HOLD = """
import sys
from pathlib import Path
from vfi.io import writer_lock
writer_lock._BEAT = float(sys.argv[2])
with writer_lock.writer_lock(Path(sys.argv[1]), "…"):
    print("inside", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that is the writer until its input ends."""
    running = []

    def holder(target: Path, beat: float = 5) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([sys.executable, "-c", HOLD, str(target), str(beat)], **pipes))
        assert running[-1].stdout.readline() == "inside\n"
        return running[-1]

    yield holder
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s")

    monkeypatch.setattr(module.time, "sleep", refuse)


def enter(target: Path) -> None:
    with writer_lock(target, "give another name"):
        pass


def remains(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def elsewhere(target: Path, age: float, **changed: object) -> Path:
    """Leave what a writer of another machine would, with its last heartbeat `age` seconds ago."""
    lock = target.with_name(f".{target.name}.writer.7")
    writer = Writer("node7", "boot", "pid:[1]", 12, "99", "2026-01-02T03:04:05+00:00")
    lock.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(writer, **changed))))
    os.utime(lock, (time.time() - age,) * 2)
    return lock


@pytest.mark.usefixtures("no_wait")
def test_a_second_process_is_refused_and_a_killed_one_blocks_nothing(tmp_path, start):
    first = start(tmp_path / "run")
    started = psutil.Process(first.pid).create_time()
    with pytest.raises(JobError) as refused:
        enter(tmp_path / "run")
    text = str(refused.value)
    assert f"process {first.pid} on {platform.node()}" in text
    shown = text.partition("started at ")[2].partition(": ")[0]
    assert abs(module.datetime.fromisoformat(shown).timestamp() - started) < 2
    assert text.endswith("or give another name")
    enter(tmp_path / "new" / "folder" / "another")
    assert not (tmp_path / "new").exists()
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(JobError):
        enter(tmp_path / "run")
    first.kill()  # it is not waited for: a zombie
    _until_dead(first.pid)
    enter(tmp_path / "run")
    assert remains(tmp_path) == []


def _until_dead(pid: int) -> None:
    end = time.monotonic() + 10
    while module.process_start(pid) and time.monotonic() < end:
        os.sched_yield()


@pytest.mark.usefixtures("no_wait")
def test_one_folder_under_two_names_is_one(tmp_path, start):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "run").mkdir(parents=True)
    start(tmp_path / "real" / "run")
    with pytest.raises(JobError):
        enter(tmp_path / "link" / "run")


@pytest.mark.usefixtures("no_wait")
def test_the_number_of_an_ended_process_may_be_another_ones(tmp_path):
    me = module._this_process()
    elsewhere(tmp_path / "run", 0, **dataclasses.asdict(dataclasses.replace(me, start="1")))
    enter(tmp_path / "run")
    assert remains(tmp_path) == []


@pytest.mark.usefixtures("no_wait")
def test_other_ranks_are_part_of_the_same_writer(tmp_path, start, monkeypatch):
    start(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    enter(tmp_path / "run")
    assert remains(tmp_path) == [".run.writer.1"]


@pytest.mark.parametrize("differs", ["host", "boot", "namespace"])
def test_a_process_of_another_machine_or_container_is_judged_by_its_heartbeat(tmp_path, differs, monkeypatch, capsys):
    """The number of this very process means nothing there; after a minute of silence it counts as gone."""
    writer = dataclasses.asdict(module._this_process()) | {differs: "another"}
    lock, looks = elsewhere(tmp_path / "run", STALE - 10, **writer), []

    def silent(seconds: float) -> None:
        looks.append(seconds)
        os.utime(lock, (time.time() - STALE + 10 - 4 * len(looks),) * 2)

    monkeypatch.setattr(module.time, "sleep", silent)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # or a change of the time would be a heartbeat
    enter(tmp_path / "run")
    assert len(looks) == 3
    note = capsys.readouterr().err
    assert note.count("note:") == 1
    assert f"{writer['host']}, which was started at {writer['started']}: waiting up to 10 s" in note
    assert remains(tmp_path) == []


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("content", [None, "", "{"])
def test_after_a_minute_of_silence_nothing_waits(tmp_path, content):
    lock = elsewhere(tmp_path / "run", STALE + 1)
    if content is not None:  # of a process that was killed while it wrote it
        lock.write_text(content)
        os.utime(lock, (time.time() - STALE - 1,) * 2)
    enter(tmp_path / "run")
    assert remains(tmp_path) == []


def test_a_sign_of_life_from_another_machine_refuses(tmp_path, monkeypatch):
    lock = elsewhere(tmp_path / "run", 20)
    monkeypatch.setattr(module.time, "sleep", lambda _: os.utime(lock))
    with pytest.raises(JobError, match="process 12 on node7, which was started at 2026-01-02T03:04:05"):
        enter(tmp_path / "run")
    assert lock.exists()


def test_a_requeued_job_outlasts_the_former_attempt(tmp_path, monkeypatch):
    """A node that was lost may live on for a while; its processes end when they see the new attempt."""
    lock, looks = elsewhere(tmp_path / "run", 20), []

    def beats_four_times(_: float) -> None:
        looks.append(lock)
        os.utime(lock) if len(looks) <= 4 else lock.unlink()

    monkeypatch.setattr(module.time, "sleep", beats_four_times)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    enter(tmp_path / "run")
    assert len(looks) == 5


def test_heartbeats_and_a_writer_that_was_overtaken(tmp_path, start):
    first = start(tmp_path / "run", beat=0.05)
    (lock,) = tmp_path.iterdir()
    os.utime(lock, (0, 0))
    end = time.monotonic() + 30
    while lock.stat().st_mtime == 0 and time.monotonic() < end:
        time.sleep(0.01)
    assert abs(lock.stat().st_mtime - time.time()) < 20
    lock.unlink()  # as one does that takes over
    assert first.wait(30) == 1
    assert "is no longer this process's to write" in first.stderr.read()


def _compete(target: Path, ready: object, results: object, done: object) -> None:
    ready.wait()
    try:
        with writer_lock(target, "…"):
            results.put(os.getpid())
            done.wait()
    except JobError:
        results.put(0)


@pytest.mark.parametrize("left_behind", [False, True])
def test_of_many_at_once_one_wins(tmp_path, left_behind):
    many, context = 6, multiprocessing.get_context("fork")
    for attempt in range(5):
        target = tmp_path / f"run{attempt}"
        if left_behind:
            elsewhere(target, STALE + 100)
        ready, results, done = context.Barrier(many), context.SimpleQueue(), context.Event()
        processes = [context.Process(target=_compete, args=(target, ready, results, done)) for _ in range(many)]
        for process in processes:
            process.start()
        outcomes = [results.get() for _ in processes]
        done.set()
        for process in processes:
            process.join()
        assert sum(pid > 0 for pid in outcomes) == 1
    assert remains(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="cannot be written"):
        enter(tmp_path / "file" / "run")
