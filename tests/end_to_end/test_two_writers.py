"""Two jobs with one output: the second ends before it has written anything, and nothing that was killed blocks the next."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from warm import TRAIN, Process, finish

from vfi import benchmark, export, interpolate, train
from vfi.checkpoint.store import list_checkpoints
from vfi.io.writer_lock import writer_lock

FLAGS = ["--preset", "tiny", "--num_workers", 0, "--batch_size", 2, "--log_every", 1, "--save_every", 4, "--exp_name", "run"]


def content(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, but for the lock, whose heartbeat goes on."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".writer." not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def test_the_second_training_of_a_name_ends_and_a_killed_one_is_resumed(tmp_path, train_shards):
    flags = [*FLAGS, "--data_path", train_shards, "--output_dir", tmp_path, "--resume", "auto", "--steps"]
    first = Process(TRAIN, *flags, 100_000)
    wait_for(lambda: list_checkpoints(tmp_path / "run"))
    second = Process(TRAIN, *flags, 100_000)
    output = second.communicate(60)[0]
    assert second.returncode == 2, output
    (line,) = output.splitlines()
    assert line.startswith(f"error: {tmp_path}/run is being written by process {first.pid} on ")
    assert "which was started at 2" in line
    assert first.poll() is None
    first.kill()
    saved = list_checkpoints(tmp_path / "run")[-1].step
    (output,) = finish([Process(TRAIN, *flags, saved + 2, "--schedule", "keep")])
    assert "waiting" not in output
    assert f"(step {saved})" in output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_of_two_tasks_without_a_launcher_one_trains(tmp_path, train_shards):
    """As `srun -n 2 vfi train` starts them."""
    flags = [*FLAGS, "--data_path", train_shards, "--output_dir", tmp_path, "--steps", 300]
    tasks = [Process(TRAIN, *flags, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(task)) for task in range(2)]
    wait_for(lambda: any(task.poll() is not None for task in tasks))
    (refused,) = (task for task in tasks if task.poll() is not None)
    (trains,) = (task for task in tasks if task is not refused)
    output = refused.communicate(60)[0]
    assert refused.returncode == 2
    assert f"process {trains.pid} on " in output
    assert output.endswith("srun started 2 tasks without a launcher, each a run of its own: use srun -n 1\n")
    trains.kill()


def test_a_dry_run_is_not_blocked(tmp_path, train_shards):
    flags = map(str, [*FLAGS, "--data_path", train_shards, "--output_dir", tmp_path, "--dry_run"])
    with writer_lock(tmp_path / "run", "…"):
        train.main(list(flags))
        assert [path.name for path in tmp_path.iterdir()] == [".run.writer.1"]


def _train(out: Path, shards: Path) -> None:
    train.main([str(flag) for flag in (*FLAGS, "--data_path", shards, "--output_dir", out.parent, "--steps", 2)])


def _benchmark(out: Path, shards: Path) -> None:
    flags = "--model", "shipped", "--device", "cpu", "--workers", 0, "--data", shards, "--out", out
    benchmark.main([str(flag) for flag in flags])


def _export(out: Path, _: Path) -> None:
    export.main(["shipped", "-o", str(out)])


def _interpolate(out: Path, _: Path) -> None:
    frames = out.parent.with_name("frames")
    frames.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64)).save(frames / f"{number}.png")
    inputs = sorted(frames.iterdir()) if out.suffix == ".png" else [frames]
    interpolate.main([*map(str, inputs), "-o", str(out), "--device", "cpu"])


JOBS = {"run": _train, "scores.json": _benchmark, "model": _export, "video.mp4": _interpolate, "image.png": _interpolate}


@pytest.mark.parametrize("name", JOBS)
def test_no_job_writes_what_another_one_is_writing(tmp_path, val_shards, capsys, name):
    out = tmp_path / "out" / name
    with writer_lock(out, "…"):
        with pytest.raises(SystemExit) as end:
            JOBS[name](out, val_shards)
        assert content(out.parent) == {}
    assert end.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert f"error: {out} is being written by process {os.getpid()} on " in errors
