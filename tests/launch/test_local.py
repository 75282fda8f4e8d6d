"""Test runs on this machine without Slurm: in the background by submitit's local executor, or in this process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from submitted import TRAINING, Submitted, assert_same, wait_for
from warm import TRAIN, Process

from launch import cancel, resubmit, status, submit
from vfi import train

pytest.importorskip("submitit")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_interrupted_cancelled_and_submitted_again_it_ends_bit_for_bit_as_if_nothing_had_been(tmp_path, train_shards, capsys):
    flags = ["--preset", "tiny", "--phase", "1", *TRAINING, "--data_path", str(train_shards), "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "launch.submit", "--cluster", "local", "--gpus_per_node", "0", "--setup",
               "export OMP_NUM_THREADS=1", *flags[:4], "--", *flags[4:], "--exp_name", "run"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    run = Submitted(tmp_path / "run")
    job = int(run.id)
    assert f"job {job}: run, 1 x 1 processes (local)" in done.stdout
    run.hold_at(4)
    train.main([*flags, "--exp_name", "whole"])
    (task,) = psutil.Process(job).children()
    task.send_signal(signal.SIGUSR2)  # as the executor does before its time limit
    run.go_on_when_told("SIGUSR2")
    wait_for(lambda: len(run.begun_at()) == 2, "the second attempt")
    run.hold_at(run.begun_at()[1] + 1)
    capsys.readouterr()
    status.main(["--output_dir", str(tmp_path), "run"])
    assert f"run  {job}  RUNNING  2" in " ".join(capsys.readouterr().out.split(" " * 6))
    cancel.main(["run", "--output_dir", str(tmp_path)])
    run.go_on_when_told("SIGTERM")
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(job).wait(30)
    (found,) = status.look(tmp_path, ["run"])
    assert (found.state, found.attempts) == ("CANCELLED", 2)

    resubmit.main(["--output_dir", str(tmp_path)])
    wait_for(lambda: status.look(tmp_path, ["run"])[0].state == "COMPLETED", "its end")
    assert Submitted(run.folder).newest.name == "2"
    assert_same(run.folder, tmp_path / "whole")


def test_a_user_without_a_name_or_home_submits(tmp_path, train_shards):
    """An id that no list of users has, as in a container, and read-only data; what is submitted fails, and then does not."""
    data, python = tmp_path / "data", tmp_path / "python"
    shutil.copytree(train_shards, data)
    for path in (*data.iterdir(), data):
        path.chmod(0o555 if path.is_dir() else 0o444)
    python.write_text(f"#!/bin/bash\n[ -e {tmp_path}/good ] || exit 3\n")
    python.chmod(0o755)
    around = [f"PATH={os.environ['PATH']}", f"PYTHONPATH={ROOT}"]
    nameless = ["unshare", "--user", "--map-user=54321", "--map-group=54321", "env", "-i", *around, sys.executable]

    def call(*words: str) -> str:
        done = subprocess.run([*nameless, *words], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        subprocess.run([*nameless, "-c", "import os; assert os.getuid() == 54321"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no user namespaces here: {error}")
    flags = [*TRAINING, "--data_path", str(data), "--exp_name", "a"]
    local = ["--cluster", "local", "--gpus_per_node", "0", "--python", str(python)]
    assert "(local)" in call("-m", "launch.submit", *local, "--preset", "tiny", "--", *flags)
    wait_for(lambda: status.look(tmp_path / "runs")[0].state == "FAILED", "its failure")
    assert "FAILED" in call("-m", "launch.status", "a")
    (tmp_path / "good").touch()
    assert "a: job" in call("-m", "launch.resubmit")
    wait_for(lambda: status.look(tmp_path / "runs")[0].state == "COMPLETED", "its end")
    assert "none of them waits or runs" in call("-m", "launch.cancel", "a")
    assert json.loads((tmp_path / "runs/a/launch/2/environment.json").read_text())["user"] == "54321"


def test_a_user_without_a_name_or_home_trains(tmp_path, train_shards):
    missing = "import os, pwd\ndef missing(uid): raise KeyError(uid)\npwd.getpwuid = missing\nos.environ.pop('HOME', 0)\n"
    flags = ["--preset", "tiny", *TRAINING, "--steps", "2", "--data_path", train_shards, "--output_dir", tmp_path]
    process = Process(missing + TRAIN, *flags)
    output, _ = process.communicate(120)
    assert process.returncode == 0, output


@pytest.mark.parametrize("code", [0, 3])
def test_here_and_now_a_chain_runs_until_one_fails(code, tmp_path, train_shards, capfd):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/given\nexit {code}\n')
    fake.chmod(0o755)
    arguments = ["--cluster", "debug", "--preset", "tiny", "--gpus_per_node", "0", "--chain", "1,2", "--python", str(fake),
                 "--", "--data_path", str(train_shards), "--crop", "64", "--output_dir", str(tmp_path / "runs")]  # fmt: skip
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    try:
        if code:
            with pytest.raises(SystemExit) as stop:
                submit.main(arguments)
            assert stop.value.code == code
        else:
            submit.main(arguments)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR2), handlers, strict=True):
            signal.signal(number, handler)
    given = (tmp_path / "given").read_text().splitlines()
    assert len(given) == (1 if code else 2)
    assert all(f"vfi.train --preset tiny --exp_name tiny_phase{n}" in line for n, line in enumerate(given, 1))
    assert "not requeued: it failed by itself" * bool(code) in capfd.readouterr().out
    states = [run.state for run in status.look(tmp_path / "runs")]
    assert states == (["FAILED"] if code else ["COMPLETED", "COMPLETED"])
