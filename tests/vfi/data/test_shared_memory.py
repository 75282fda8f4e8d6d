"""Test that shared memory which is too small is refused before training, by what the loaders really take."""

from __future__ import annotations

import dataclasses
import json
import os
import types

import pytest
from warm import Process

from vfi.config.configs import DataConfig
from vfi.data.shared_memory import check_shared_memory, evaluation_bytes, training_bytes
from vfi.errors import JobError

MEASURE = """
import ctypes, itertools, json, os, subprocess, sys, time
import torch
from vfi import train
from vfi.config.configs import DataConfig
from vfi.data.evaluation_loader import evaluation_batches
from vfi.data.loader import TrainingLoader

if ctypes.CDLL(None).unshare(0x00020000) != 0:  # CLONE_NEWNS: mounts of this process alone
    sys.exit(77)

def mount(megabytes):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", "/dev/shm"], check=True)

def peak(batches):
    used = 0
    for _ in batches:
        time.sleep(0.05)
        state = os.statvfs("/dev/shm")
        used = max(used, (state.f_blocks - state.f_bfree) * state.f_frsize)
    return used

subprocess.run(["mount", "--make-rprivate", "/"], check=True)
shards, cpu = sys.argv[1], torch.device("cpu")
config = DataConfig(data_path=(shards,), batch_size=8, crop=64, num_workers=2)
peaks = []
for with_flow in (False, True):
    mount(64)
    loader = TrainingLoader(config, 3, cpu, accumulation=1, with_flow=with_flow)
    peaks.append(peak(itertools.islice(loader.batches(), 10)))
    mount(64)
    peaks.append(peak(evaluation_batches(shards, cpu, workers=2, with_flow=with_flow)))
print("peaks", json.dumps(peaks), flush=True)
mount(1)
flags = ["--preset", "tiny", "--crop", "64", "--batch_size", "8", "--num_workers", "2"]
train.main([*flags, "--data_path", shards, *sys.argv[2:]])
"""
MB = 1 << 20


def test_the_prediction_is_what_loaders_take_and_too_little_is_refused(train_shards, tmp_path):
    process = Process(MEASURE, train_shards, "--output_dir", tmp_path)
    output, _ = process.communicate(timeout=120)
    if process.returncode == 77:
        pytest.skip("mounting a small /dev/shm takes root")
    line = next(line for line in output.splitlines() if line.startswith("peaks"))
    config = DataConfig(batch_size=8, crop=64, num_workers=2)
    predicted = [
        function for flow in (False, True) for function in (training_bytes(config, flow), evaluation_bytes((72, 80), 2, flow))
    ]
    for peak, bound in zip(json.loads(line.partition(" ")[2]), predicted, strict=True):
        assert 0.7 * bound < peak <= bound + bound // 32 + 4096 * 30
    assert process.returncode == 2
    error = output.strip().splitlines()[-1]
    assert error.startswith("error: /dev/shm has 1.0 MB free, and the loader processes of 1 rank take up to 1.8 MB there")
    assert not list(tmp_path.iterdir())


def free(monkeypatch, megabytes):
    state = types.SimpleNamespace(f_bavail=megabytes * 256, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: state)


def test_the_line_names_what_helps(monkeypatch):
    free(monkeypatch, 64)
    check_shared_memory(62 * MB, 1, "")
    message = r"^/dev/shm has 67\.1 MB free, .* 8 ranks take up to 520\.1 MB .*--shm-size=2g or --ipc=host, or use less$"
    with pytest.raises(JobError, match=message):
        check_shared_memory(62 * MB, 8, "use less")
    check_shared_memory(0, 8, "")


def test_the_sum_counts_ranks_crops_and_processes():
    config = DataConfig(batch_size=16, crop=256, num_workers=4)
    assert training_bytes(config, with_flow=False) == 6 * 16 * 9 * 256**2
    assert training_bytes(dataclasses.replace(config, num_workers=1), with_flow=True) == 16 * 256**2 * (6 * 9 + 5 * 24)
    assert training_bytes(dataclasses.replace(config, num_workers=0), with_flow=True) == 0
    assert training_bytes(dataclasses.replace(config, curriculum=True), with_flow=False) == 6 * 16 * 9 * 512**2
    assert evaluation_bytes((1080, 1920), 0) == 0


def test_no_file_system_of_shared_memory_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr("vfi.data.shared_memory.DEVICE", tmp_path / "absent")
    check_shared_memory(1 << 60, 1, "")
