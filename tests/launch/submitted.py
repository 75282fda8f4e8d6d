"""Helpers with which tests follow, pause and compare a submitted run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from launch.submission import read_queued, submissions
from vfi.checkpoint import store

TRAINING = ["--crop", "64", "--num_workers", "0", "--log_every", "1", "--warmup_steps", "2", "--batch_size", "2",
            "--lr", "2e-4", "--steps", "10", "--save_every", "3", "--keep_last", "9", "--ema", "0.9"]  # fmt: skip


def wait_for(found: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Submitted:
    """A submitted run, identified by its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest = submissions(folder)[-1]
        self.id = read_queued(self.newest).job_id

    def log(self) -> str:
        """Return the logs of the tasks on all nodes."""
        return "\n".join(path.read_text() for path in sorted(self.newest.glob("slurm/*.out")))

    def pids(self) -> list[int]:
        """Return the ids of the current attempt's training processes, in order of rank."""
        attempts = self.folder / "launch" / "attempts"
        current = attempts / (attempts / "current").read_text()
        return [int(path.read_text()) for path in sorted(current.glob("rank_*.pid"))]

    def steps(self) -> list[int]:
        """Return the steps in metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def has_ended(self) -> bool:
        """Return whether the run will make no further progress."""
        return False

    def hold_at(self, step: int) -> None:
        """Wait until it has trained a step, and pause its processes where they are."""
        wait_for(lambda: step in self.steps() or self.has_ended(), f"step {step} of {self.folder}")
        assert step in self.steps(), self.log()
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Resume the paused processes."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def go_on_when_told(self, name: str = "") -> None:
        """Resume the processes once they were sent a signal of this name, or any signal."""
        text = f"{name}: process 0 is to save and stop".removeprefix(": ")
        wait_for(lambda: text in self.log(), f"{name or 'a signal'} to {self.folder}")
        self.go_on()

    def begun_at(self) -> list[int]:
        """Return the step at which each attempt began."""
        return [begin["step"] for begin in self._begun()]

    def last_begin(self) -> float:
        """Return when the last attempt began, in seconds since 1970."""
        return self._begun()[-1]["time"]

    def _begun(self) -> list[dict]:
        begun = [json.loads(path.read_text()) for path in self.folder.glob("launch/attempts/*/begin.json")]
        return sorted(begun, key=lambda begin: begin["time"])


def assert_same(folder: Path, other: Path) -> None:
    """Assert that every step ran once, and that weights and their running means are the same to the last bit."""
    last, expected = store.latest(folder), store.latest(other)
    assert last.step == expected.step == 10
    for file in (store.MODEL, store.EMA):
        mine, theirs = load_file(last.path / file), load_file(expected.path / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == list(range(1, 11))
