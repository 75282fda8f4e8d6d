"""Two machines, shown as two launches on this one with a process each: they train as one launch of both processes does.

Both are started as accelerate_configs/multi_node.yaml says, on the CPU.
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

from vfi.checkpoint import latest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FLAGS = ["--preset", "tiny", "--width", "2", "--head_dim", "8", "--backbone_mode", "gated_attn_only", "--crop", "64",
         "--num_workers", "0", "--batch_size", "2", "--log_every", "1", "--warmup_steps", "2", "--lr", "1e-3", "--steps", "6",
         "--val_every", "3"]  # fmt: skip


def start(run: Path, shards: tuple[Path, Path], *launcher: object, **environment: str) -> subprocess.Popen[str]:
    """One launch, in fp32."""
    config = "accelerate_configs/multi_node.yaml"
    place = ["--data_path", shards[0], "--val_path", shards[1], "--output_dir", run.parent, "--exp_name", run.name]
    launch = ["accelerate.commands.launch", "--config_file", config, "--mixed_precision", "no", *launcher]
    command = [sys.executable, "-m", *launch, "-m", "vfi.train", *FLAGS, *place]
    settings = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)  # fmt: skip


def on_two_machines(run: Path, shards: tuple[Path, Path], processes: int = 2, **environment: str) -> list[tuple[int, str]]:
    """Exit code and output of the launches of machine 0 and 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ("--num_machines", 2, "--num_processes", processes, "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    launches = [start(run, shards, *common, "--machine_rank", rank, **environment) for rank in (0, 1)]
    try:
        outputs = [launch.communicate(timeout=120)[0] for launch in launches]
    finally:
        for launch in launches:
            launch.terminate()  # its processes with it
    return [(launch.returncode, output) for launch, output in zip(launches, outputs, strict=True)]


def rows(run: Path, event: str) -> list[dict]:
    """Of the metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("samples_per_s", "data_wait")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines if line["event"] == event]


def test_two_machines_train_as_one_with_both_processes(tmp_path, train_shards, val_shards):
    shards = train_shards, val_shards
    (code, output), (other_code, other_output) = on_two_machines(tmp_path / "two", shards)
    assert (code, other_code) == (0, 0), output + other_output
    assert "2 processes on cpu, precision no, global batch 4 = 2 * 2 * 1 accumulated" in output
    assert "PSNR" not in other_output  # what there is to say is said once
    one = start(tmp_path / "one", shards, "--num_processes", 2, "--main_process_port", 0)
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 0, output
    for event, number in (("train", 6), ("val", 2)):
        assert len(rows(tmp_path / "two", event)) == number
        assert rows(tmp_path / "two", event) == rows(tmp_path / "one", event)
    found, expected = (load_file(latest(tmp_path / name).path / "model.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# processes that are asked for, what is different in the environment, and what is said of it
MISTAKES = {
    "without a GPU": (2, {"ACCELERATE_USE_CPU": "false"}, "2 processes were started and no GPU is visible"),
    "three for two machines": (3, {}, "accelerate launch was asked for 3 processes and started 2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_number_of_processes_than_asked_for_is_refused_on_both_machines(mistake, tmp_path, train_shards, val_shards):
    """Left alone, accelerate would train twice on its own, or round down, and say nothing."""
    processes, environment, words = MISTAKES[mistake]
    for code, output in on_two_machines(tmp_path / "run", (train_shards, val_shards), processes, **environment):
        assert code != 0
        assert [line for line in output.splitlines() if line.startswith(f"error: {words}")], output
    assert not (tmp_path / "run").exists()
