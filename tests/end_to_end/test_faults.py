"""Faults under a running job, and what its user sees: bad samples, and processes that die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm import TORCHRUN, TRAIN, Process, finish, start_ranks

from vfi import train
from vfi.checkpoint.store import latest
from vfi.errors import STOPPED
from vfi.runtime.stop_signals import STOPPING

FLAGS = ["--preset", "tiny", "--crop", "64", "--log_every", "2", "--warmup_steps", "2", "--lr", "2e-4"]


def children(pid: int) -> list[int]:
    """Return the child processes of a process, in the order of their start."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def wait_for(condition, process: Process, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate(60)[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_metrics(run: Path, process: Process) -> None:
    """Wait until it trains."""
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)


def rows(run: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def damaged(train_shards, tmp_path) -> tuple[Path, str]:
    """Return a folder of 22 samples, of which one has junk in place of a frame, and the key of that sample."""
    folder = Path(shutil.copytree(train_shards, tmp_path / "damaged"))
    tar = folder / "shard-000001.tar"
    with tarfile.open(tar) as members:
        member = next(member for member in members if member.name.endswith("im2.png"))
    with tar.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(b"junk")
    return folder, member.name.partition(".")[0]


def test_a_bad_sample_is_skipped_counted_and_named(damaged, tmp_path, capsys):
    folder, key = damaged
    train.main([*FLAGS, "--data_path", str(folder), "--steps", "10", "--batch_size", "4", "--num_workers", "1",
                "--output_dir", str(tmp_path), "--exp_name", "run"])  # fmt: skip
    found = rows(tmp_path / "run", "fault")
    where = f"image: {folder}/shard-000001.tar: sample {key}: im2.png: it is not a png file"
    assert [row["named"] for row in found] == [[where]] * len(found)
    total = len(found)
    assert total in (1, 2)  # two epochs of 20 of 22 samples
    assert found[-1]["image"] == total
    assert found[-1]["rate"] == pytest.approx(total / found[-1]["reads"])
    assert f"skipped 1 samples that can't be used, {found[0]['rate']:.2%} so far\n  {where}" in capsys.readouterr().out
    assert latest(tmp_path / "run").step == 10
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("fault/image")] == [row["image"] for row in found]
    assert "fault/named/text_summary" in board.Tags()["tensors"]


def test_too_many_bad_samples_end_training(damaged, tmp_path, capsys):
    folder, key = damaged
    with pytest.raises(SystemExit) as stop:
        train.main([*FLAGS, "--data_path", str(folder), "--steps", "10", "--batch_size", "4", "--num_workers", "0",
                    "--output_dir", str(tmp_path), "--max_bad_sample_rate", "0"])  # fmt: skip
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 of ")
    assert f"more than --max_bad_sample_rate 0.0 allows (it is judged as of 1000 reads). One of them: {folder}/shard" in error
    assert key in error


def test_validation_skips_nothing(damaged, train_shards, tmp_path, capsys):
    folder, key = damaged
    with pytest.raises(SystemExit):
        train.main([*FLAGS, "--data_path", str(train_shards), "--val_path", str(folder), "--steps", "2", "--val_every", "2",
                    "--batch_size", "4", "--num_workers", "1", "--output_dir", str(tmp_path)])  # fmt: skip
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {folder}/shard-000001.tar: sample {key}: im2.png: it is not a png file"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_process_that_is_killed_ends_the_run(train_shards, tmp_path, workers):
    process = Process(TRAIN, *FLAGS, "--data_path", train_shards, "--steps", 100_000, "--batch_size", 2, "--num_workers",
                      workers, "--output_dir", tmp_path, "--exp_name", "run")  # fmt: skip
    wait_for_metrics(tmp_path / "run", process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: a loader process died: DataLoader worker (pid")
    assert "Killed" in error
    assert "Traceback" not in output


@pytest.mark.parametrize("number", STOPPING)
def test_signals_may_come_to_loader_processes_too(train_shards, tmp_path, number):
    """Some clusters signal all processes of a job. Here the loaders get two signals; training would end at a second one."""
    process = Process(TRAIN, *FLAGS, "--data_path", train_shards, "--steps", 100_000, "--batch_size", 2, "--num_workers", 2,
                      "--output_dir", tmp_path, "--exp_name", "run")  # fmt: skip
    wait_for_metrics(tmp_path / "run", process)
    loaders = children(process.pid)
    for pid in (*loaders, *loaders, process.pid):
        os.kill(pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, output
    assert output.count(f"{number.name}: the step is finished and saved") == 1
    step = latest(tmp_path / "run").step
    assert f"stopped after step {step} of 100000 ({number.name})" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in loaders)


def launch_two_ranks(shards: Path, folder: Path) -> tuple[Process, list[int]]:
    """Return torchrun and the numbers of its two ranks, once they train in folder/run."""
    launcher = ("--nproc_per_node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "vfi.train")
    process = Process(TORCHRUN, *launcher, *FLAGS, "--data_path", shards, "--steps", 100_000, "--batch_size", 2,
                      "--num_workers", 0, "--output_dir", folder, "--exp_name", "run")  # fmt: skip
    wait_for_metrics(folder / "run", process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    return process, ranks


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(train_shards, tmp_path):
    process, ranks = launch_two_ranks(train_shards, tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
def test_no_rank_outlives_a_launcher_that_is_killed(train_shards, tmp_path):
    """Nor one that is stopped, which no other signal ends."""
    process, numbers = launch_two_ranks(train_shards, tmp_path)
    ranks = [psutil.Process(rank) for rank in numbers]
    ranks[1].suspend()
    process.kill()
    _, left = psutil.wait_procs(ranks, timeout=20)
    alive = [rank for rank in left if rank.status() != psutil.STATUS_ZOMBIE]
    for rank in alive:
        rank.kill()
    assert alive == []


@pytest.mark.slow
def test_faults_of_all_processes_are_added_up(damaged, tmp_path):
    folder, key = damaged
    flags = [*FLAGS, "--data_path", folder, "--steps", 10, "--num_workers", 1, "--output_dir", tmp_path]
    output, _ = finish(start_ranks(2, TRAIN, *flags, "--batch_size", 2, "--exp_name", "two"))
    train.main([*map(str, flags), "--batch_size", "4", "--exp_name", "one"])
    assert rows(tmp_path / "two", "fault") == rows(tmp_path / "one", "fault") != []
    assert key in output
