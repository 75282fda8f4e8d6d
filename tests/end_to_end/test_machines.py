"""Two machines, simulated by two launches on this one with a rank each: they train as two ranks on one machine do.

They are started as accelerate_configs/multi_node.yaml says, on the CPU.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from warm import ON_CPU, ROOT, TRAIN, finish, start_ranks

from vfi.checkpoint.store import latest

pytestmark = pytest.mark.slow
FLAGS = ["--preset", "tiny", "--width", "2", "--head_dim", "8", "--backbone_mode", "gated_attn_only", "--crop", "64",
         "--num_workers", "0", "--batch_size", "2", "--log_every", "1", "--warmup_steps", "2", "--lr", "1e-3", "--steps", "6",
         "--val_every", "3"]  # fmt: skip


def flags(run: Path, shards: tuple[Path, Path]) -> list[object]:
    """Return the flags of the training."""
    return [*FLAGS, "--data_path", shards[0], "--val_path", shards[1], "--output_dir", run.parent, "--exp_name", run.name]


def start(run: Path, shards: tuple[Path, Path], *settings: object) -> subprocess.Popen[str]:
    """Start a launch on one machine, in fp32."""
    config = "accelerate_configs/multi_node.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", config, "--mixed_precision", "no", *settings]
    command = [sys.executable, "-m", *launcher, "-m", "vfi.train", *flags(run, shards)]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=os.environ | ON_CPU, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def on_two_machines(run: Path, shards: tuple[Path, Path], processes: int = 2) -> list[tuple[int | None, str]]:
    """Return exit code and output of the launches of machine 0 and 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ("--num_machines", 2, "--num_processes", processes, "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    launches = [start(run, shards, *common, "--machine_rank", rank) for rank in (0, 1)]
    try:
        outputs = [launch.communicate(timeout=120)[0] for launch in launches]
    finally:
        for launch in launches:
            launch.terminate()  # its processes with it
    return [(launch.returncode, output) for launch, output in zip(launches, outputs, strict=True)]


def rows(run: Path, event: str) -> list[dict]:
    """Return the rows of the metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("samples_per_s", "data_wait")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines if line["event"] == event]


def test_two_machines_train_as_one_with_both_processes(tmp_path, train_shards, val_shards):
    shards = train_shards, val_shards
    (code, output), (other_code, other_output) = on_two_machines(tmp_path / "two", shards)
    assert (code, other_code) == (0, 0), output + other_output
    assert "2 processes on cpu, precision no, global batch 4 = 2 * 2 * 1 accumulated" in output
    assert "PSNR" not in other_output  # messages are printed only once
    finish(start_ranks(2, TRAIN, *flags(tmp_path / "one", shards)))
    for event, number in (("train", 6), ("val", 2)):
        assert len(rows(tmp_path / "two", event)) == number
        assert rows(tmp_path / "two", event) == rows(tmp_path / "one", event)
    found, expected = (load_file(latest(tmp_path / name).path / "model.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_processes_leave_their_group_before_they_exit(tmp_path, train_shards, val_shards):
    """Otherwise some are aborted after their work, and the launchers of other machines wait for minutes."""
    at_exit = "import atexit, torch.distributed as group; print('in', group.is_initialized()); atexit._run_exitfuncs()"
    code = f"{TRAIN}; {at_exit}; print('in', group.is_initialized())"
    for output in finish(start_ranks(2, code, *flags(tmp_path / "run", (train_shards, val_shards)), "--steps", "1")):
        assert output.splitlines()[-2:] == ["in True", "in False"]


def test_another_number_of_processes_than_asked_for_is_refused_on_both_machines(tmp_path, train_shards, val_shards):
    """Left alone, accelerate would round down silently."""
    launches = on_two_machines(tmp_path / "run", (train_shards, val_shards), processes=3)
    assert_refused(launches, "accelerate launch was asked for 3 processes and started 2")
    assert not (tmp_path / "run").exists()


def test_machines_without_a_gpu_are_refused_unless_the_cpu_was_asked_for(tmp_path, train_shards, val_shards):
    """Left alone, accelerate would silently train two independent runs."""
    words = flags(tmp_path / "run", (train_shards, val_shards))
    processes = start_ranks(2, TRAIN, *words, ACCELERATE_USE_CPU="false")
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    ended = [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
    assert_refused(ended, "2 processes were started and no GPU is visible")
    assert not (tmp_path / "run").exists()


def assert_refused(ended: list[tuple[int | None, str]], words: str) -> None:
    """Assert that each launch ended with an error of these words."""
    for code, output in ended:
        assert code not in (0, None)
        assert [line for line in output.splitlines() if line.startswith(f"error: {words}")], output
