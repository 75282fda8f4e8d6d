"""A run that is resumed with other settings: what it says, what it refuses, and what it leaves untouched."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from vfi import train

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--preset", "tiny", "--num_workers", 0, "--log_every", 1, "--save_every", 4, "--batch_size", 2, "--lr", 1e-3,
         "--lr_min", 2e-5, "--warmup_steps", 2, "--exp_name", "run", "--resume", "auto"]  # fmt: skip
STILL = ("config.json", "status.json", "metrics.jsonl", "environment.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train_shards) -> Path:
    """A run of 6 steps."""
    out = tmp_path_factory.mktemp("finished")
    run(out, train_shards, "--steps", 6)
    return out / "run"


def run(out: Path, shards: Path, *flags: object) -> None:
    train.main([str(flag) for flag in (*FLAGS, "--data_path", shards, "--output_dir", out, *flags)])


def rows(folder: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in STILL}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", 12), "12 steps (were 6) would change the learning rate in the middle of the run"),
        (("--steps", 12, "--lr", 1e-4, "--schedule", "keep"), "--schedule keep leaves the rates as they are"),
        (("--steps", 5), "--steps 5 is less than the 6 steps that are done"),
        (("--steps", 12, "--schedule", "extend", "--resume", ""), "--schedule extend has no effect without --resume auto"),
        (("--steps", 12, "--schedule", "extend", "--width", 16), "Settings that differ: "),
    ],
)
def test_a_refused_run_leaves_the_folder_as_it_is(finished, train_shards, capsys, flags, message):
    before = content(finished)
    with pytest.raises(SystemExit) as refused:
        run(finished.parent, train_shards, *flags)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
    assert content(finished) == before


def test_a_finished_run_leaves_the_folder_as_it_is(finished, train_shards, capsys):
    before = content(finished)
    run(finished.parent, train_shards, "--steps", 6, "--log_every", 3)
    assert "finished: step 6 of 6 is saved" in capsys.readouterr().out
    assert content(finished) == before


def test_changes_are_said_and_written_once(finished, train_shards, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    flags = ("--steps", 12, "--schedule", "restart", "--clip_norm", 0.2)
    run(tmp_path, train_shards, *flags)
    output = capsys.readouterr().out
    assert "differs from the checkpoint's settings: clip_norm: 0.2 here, 0.1 there" in output
    assert "--schedule restart: the learning rate of step 7 is 0.0005, and was to be 2e-05" in output
    (event,) = rows(folder, "settings")
    assert event["step"] == 6
    changed = [line for line in event["changed"] if not line.startswith("output_dir")]
    assert sorted(changed) == ["clip_norm: 0.2 here, 0.1 there", "schedule: restart here, None there",
                               "steps: 12 here, 6 there"]  # fmt: skip
    decay = [2e-5 + (1e-3 - 2e-5) * (1 + math.cos(math.pi * n / 3)) / 2 for n in range(4)]
    assert [row["lr"] for row in rows(folder, "train")[6:]] == pytest.approx([5e-4, 1e-3, *decay])
    assert json.loads((folder / "status.json").read_text())["total"] == 12
    assert json.loads((folder / "config.json").read_text())["run"]["steps"] == 12

    shutil.rmtree(folder / "checkpoints" / "step_00000012")  # as where it was killed after step 8, and is queued again
    run(tmp_path, train_shards, *flags)
    assert "differs" not in capsys.readouterr().out
    assert len(rows(folder, "settings")) == 1
    assert [row["lr"] for row in rows(folder, "train")[6:]] == pytest.approx([5e-4, 1e-3, *decay])


def test_a_run_killed_before_it_said_that_it_has_finished_says_so_later(finished, train_shards, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"state": "running"}))
    run(tmp_path, train_shards, "--steps", 6)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
