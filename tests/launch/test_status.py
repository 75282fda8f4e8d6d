"""Test the progress that is shown for a run, given the content of its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import slurm, status, submit
from launch.slurm import JobState
from launch.submission import Queued, Submission, new_folder, write_submission
from vfi.config import presets
from vfi.errors import JobError
from vfi.io.dataclass_json import to_json
from vfi.tracking.run_status import Status


def write_run(folder: Path, job_id: str, nodes: int = 2, **changed: object) -> None:
    """Write the folder of a run with `nodes` x 4 processes that was submitted to Slurm."""
    own = new_folder(folder)
    submission = Submission(
        name=folder.name, job="train", arguments=(), run_folder=str(folder), code="", logs=str(own / "slurm"), nodes=nodes,
        processes=4, gpus=True, python="python", accelerate_config="", precision="bf16", requeues=3, cluster="slurm",
        parameters={},
    )  # fmt: skip
    write_submission(own, submission)
    (own / "queued.json").write_text(to_json(Queued(job_id, 0.0)))
    (folder / "config.json").write_text(to_json(presets.override(presets.get("small"), **changed)))


@pytest.fixture
def slurm_says(monkeypatch) -> dict[str, JobState]:
    answers: dict[str, JobState] = {}
    monkeypatch.setattr(status.slurm, "states", lambda jobs: {job: answers[job] for job in jobs})
    return answers


def test_steps_psnr_and_the_time_left(tmp_path, slurm_says, capsys):
    write_run(tmp_path / "a", "11", batch_size=5)
    rows: list[dict] = [{"step": step, "event": "train", "samples_per_s": 80.0} for step in range(1, 6)]
    rows += [{"step": 3, "event": "val", "psnr": 24.0}, {"step": 5, "event": "val", "psnr": 25.5}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a" / "metrics.jsonl").write_text(lines + '{"step": 6, "ev')  # being written
    (tmp_path / "a" / "status.json").write_text(to_json(Status("running", 7205)))
    slurm_says["11"] = JobState("RUNNING", "")
    (run,) = status.look(tmp_path)
    assert (run.step, run.total, run.psnr) == (5, 7205, 25.5)
    assert run.eta == pytest.approx(7200 * 5 * 2 * 4 / 80)  # steps * global batch / rate
    status.main(["--output_dir", str(tmp_path)])
    assert " ".join(capsys.readouterr().out.splitlines()[1].split()) == "a 11 RUNNING 0 5 of 7205 25.50 dB 01:00:00"


def test_what_waits_says_why_and_what_slurm_has_forgotten_is_told_by_the_folder(tmp_path, slurm_says, capsys):
    for name, job, state in (("b", "12", JobState("PENDING", "Priority")), ("c", "13", JobState("UNKNOWN", "forgotten"))):
        write_run(tmp_path / name, job, nodes=1)
        slurm_says[job] = state
    assert [run.state for run in status.look(tmp_path)] == ["PENDING", "UNKNOWN"]
    attempts = tmp_path / "c" / "launch" / "attempts"
    (attempts / "13_0000").mkdir(parents=True)
    (attempts / "current").write_text("13_0000")
    (attempts / "13_0000" / "node_0.json").write_text('{"kind": "done", "code": 0, "signals": [], "why": "", "time": 1.0}')
    status.main(["--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "b: Priority" in printed
    assert [run.state for run in status.look(tmp_path)] == ["PENDING", "COMPLETED"]
    with pytest.raises(JobError, match="absent: no such run was submitted in"):
        status.look(tmp_path, ["absent"])


def test_a_submission_that_cannot_be_read_does_not_hide_the_others(tmp_path, slurm_says, capsys):
    for name, job in (("a", "11"), ("b", "12")):
        write_run(tmp_path / name, job)
        slurm_says[job] = JobState("PENDING", "")
    (tmp_path / "a" / "launch" / "1" / "submission.json").write_text("{}")
    assert [run.name for run in status.look(tmp_path)] == ["b"]
    assert "a is left out" in capsys.readouterr().err


def test_a_run_that_waits_or_runs_is_not_submitted_once_more(tmp_path, slurm_says, train_shards, capsys):
    write_run(tmp_path / "d", "14")
    slurm_says["14"] = JobState("RUNNING", "")
    with pytest.raises(SystemExit) as stop:
        submit.main(["--gpus_per_node", "0", "--", "--data_path", str(train_shards), "--batch_size", "2", "--crop", "64",
                     "--output_dir", str(tmp_path), "--exp_name", "d"])  # fmt: skip
    assert stop.value.code == 2
    assert "d (job 14, RUNNING): already submitted" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "d" / "launch").iterdir()] == ["1"]


@pytest.mark.parametrize("user", ["root", None])
def test_an_id_without_a_name_asks_for_all_users(user, tmp_path, monkeypatch):
    """Slurm's squeue refuses `--user 54321` there: "Invalid user"."""
    (tmp_path / "squeue").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/given\necho "7|RUNNING|None"\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def entry(_: int) -> SimpleNamespace:
        if user is None:
            raise KeyError("uid not found")
        return SimpleNamespace(pw_name=user)

    monkeypatch.setattr(slurm.pwd, "getpwuid", entry)
    assert slurm.states(["7"]) == {"7": JobState("RUNNING", "")}
    assert ("--user root" in (tmp_path / "given").read_text()) == (user == "root")
