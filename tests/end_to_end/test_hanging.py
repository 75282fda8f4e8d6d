"""Two ranks of one run, of which one is told to stop, or hangs, and the effect on the other."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from warm import Process, start_ranks

from vfi.checkpoint.store import list_checkpoints
from vfi.errors import STOPPED

FLAGS = ["--preset", "tiny", "--crop", "64", "--num_workers", "0", "--log_every", "1", "--warmup_steps", "2", "--batch_size",
         "2", "--steps", "1000", "--save_every", "4"]  # fmt: skip
SLEEPS = """
import os, sys, time
from vfi import train
from vfi.training import trainer
losses, calls = trainer.training_losses, 0
def slow(*arguments):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        time.sleep(300)
    return losses(*arguments)
if os.environ["HANGS"]:
    trainer.training_losses = slow
train.main(sys.argv[1:])
"""


@pytest.fixture
def pair() -> Iterator[Callable[..., list[Process]]]:
    """Start two ranks of one run; those that are still running at the end are killed."""
    started: list[Process] = []

    def start(run: Path, shards: Path, *flags: object, hangs: bool = False) -> list[Process]:
        place = ["--data_path", shards, "--output_dir", run.parent, "--exp_name", run.name]
        started.extend(start_ranks(2, SLEEPS, *FLAGS, *place, *flags, HANGS="yes" * hangs))
        return started

    yield start
    for process in started:
        process.kill()


def steps_of(run: Path) -> list[int]:
    """Return the steps of the training rows."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in lines if line["event"] == "train"]


def wait_for_step(run: Path, step: int, processes: list[Process]) -> None:
    """Wait until that step is in the metrics."""
    deadline = time.monotonic() + 120
    while step not in steps_of(run):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), [process.communicate(60)[0] for process in processes]
        time.sleep(0.02)


@pytest.mark.slow
def test_a_signal_at_one_process_stops_all_after_the_same_step(pair, tmp_path, train_shards):
    """The signal goes to the process group of rank 1, as from a launcher: its loader processes must outlive it, too."""
    run = tmp_path / "run"
    processes = pair(run, train_shards, "--num_workers", 1)
    wait_for_step(run, 2, processes)
    os.killpg(processes[1].pid, signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [STOPPED, STOPPED], outputs
    steps = steps_of(run)
    assert [found.step for found in list_checkpoints(run)][-1] == steps[-1] < 1000
    assert f"stopped after step {steps[-1]} of 1000 (another process was told to stop)" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True], ids=["it sleeps within a step", "it is stopped"])
def test_a_process_that_hangs_is_named_and_ends_the_run(stopped, pair, tmp_path, train_shards):
    run = tmp_path / "run"
    processes = pair(run, train_shards, "--timeout_minutes", 0.1, hangs=not stopped)
    wait_for_step(run, 2, processes)
    if stopped:
        processes[1].send_signal(signal.SIGSTOP)
    output, _ = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 1
    error = output.splitlines()[-1]
    if stopped:
        assert "no sign of life (stopped, killed, or its machine is gone) from rank 1 at" in error
    else:
        assert error == (
            "error: nothing has moved for 6 s (--timeout_minutes 0.1): the others wait for rank 1 at the forward pass of step 3"
        )
        other, _ = processes[1].communicate(timeout=60)
        assert processes[1].returncode == 1
        assert ", in slow" in other
