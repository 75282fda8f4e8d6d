"""Lists of runs and of checkpoints: what they say is what lies in the folders, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vfi import checkpoints, runs
from vfi.checkpoint import store
from vfi.checkpoint.store import State
from vfi.config import presets
from vfi.errors import Stopped
from vfi.io.dataclass_json import to_json
from vfi.tracking.run_status import STATES, STATUS, age, read_status, recorded

CONFIG = presets.override(presets.tiny(), steps=40, phase=2)


def make_run(folder: Path, scores: list[tuple[int, float]], checkpoints: tuple[int, ...] = ()) -> Path:
    """A run folder with these PSNRs by step, frame average 30 dB, and checkpoints of some of the steps."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(CONFIG))
    rows = [{"step": 1, "event": "train", "loss": 0.5, "epoch": 0.1}]
    for step, psnr in scores:
        rows.append({"step": step, "event": "train", "loss": 0.5, "epoch": step / 10})
        rows.append({"step": step, "event": "val", "psnr": psnr, "average_psnr": 30.0, "samples": 4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in checkpoints:
        psnr = dict(scores).get(step)
        store.save(folder, State(step, step // 10, psnr=psnr), CONFIG, {"w": torch.zeros(4)}, {}, keep_last=9)
    return folder


def listed(output_dir: Path, capsys) -> dict[str, dict]:
    runs.main(["--output_dir", str(output_dir), "--json"])
    return {run["name"]: run for run in json.loads(capsys.readouterr().out)}


def test_runs_are_listed_with_their_numbers(tmp_path, capsys):
    run = make_run(tmp_path / "mine", [(10, 31.5), (20, 32.25), (30, 32.0)], checkpoints=(10, 20))
    (tmp_path / "no_run").mkdir()
    (tmp_path / "file").touch()
    with recorded(run, 40, lambda: 40):
        pass
    for path in (run / "metrics.jsonl", run / "checkpoints" / "step_00000020", run):
        os.utime(path, (1000, 1000))
    found = listed(tmp_path, capsys)
    assert found == {
        "mine": {
            "name": "mine", "preset": "tiny", "phase": 2, "state": "finished", "why": "", "step": 30, "total": 40,
            "checkpoint": 20, "epoch": 3.0, "best_psnr": 32.25, "gain": 2.25, "last_activity": 1000.0,
        }
    }  # fmt: skip
    runs.main(["--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    head, row, _, legend = printed.splitlines()
    assert head.split() == [
        *("run", "preset", "phase", "state", "step", "saved", "epoch", "best", "PSNR", "gain"),
        "last",
        "activity",
    ]
    assert row.split()[:11] == ["mine", "tiny", "2", "finished", "30/40", "20", "3.0", "32.25", "dB", "+2.25", "dB"]
    assert row.endswith(" d ago")
    assert legend == "finished: all steps are done"


def test_the_run_that_moved_last_comes_first(tmp_path, capsys):
    for time_, name in ((1000, "b"), (3000, "c"), (2000, "a")):
        run = make_run(tmp_path / name, [])
        for path in (run / "metrics.jsonl", run):
            os.utime(path, (time_, time_))
    assert list(listed(tmp_path, capsys)) == ["c", "a", "b"]


def test_runs_that_are_incomplete_damaged_or_old_are_listed_as_they_are(tmp_path, capsys):
    (make_run(tmp_path / "other_version", [(10, 31.0)]) / "config.json").write_text('{"later": 1}')
    (make_run(tmp_path / "cut", [(10, 31.0)]) / "metrics.jsonl").write_text('{"step": 7, "event": "x", "epoch": 0.7}\n{"ste')
    (make_run(tmp_path / "odd", []) / "metrics.jsonl").write_text("[]\n5\n")
    (tmp_path / "no_score" / "checkpoints").mkdir(parents=True)
    content = json.loads(to_json(CONFIG))
    del content["optim"]["ema"]
    (make_run(tmp_path / "older", []) / "config.json").write_text(json.dumps(content))
    (make_run(tmp_path / "unreadable", []) / STATUS).write_text("{}")
    found = listed(tmp_path, capsys)
    assert (found["other_version"]["preset"], found["other_version"]["best_psnr"]) == (None, 31.0)
    assert "Unknown fields: ['later']" in found["other_version"]["why"]
    assert (found["cut"]["step"], found["cut"]["epoch"], found["cut"]["best_psnr"]) == (7, 0.7, None)
    assert found["odd"]["step"] == 0
    assert (found["no_score"]["step"], found["no_score"]["total"]) == (0, None)
    assert (found["older"]["preset"], found["older"]["why"]) == ("tiny", "")
    assert (found["unreadable"]["state"], found["unreadable"]["why"].split(":")[0]) == ("unknown", "status.json cannot be read")
    assert {run["state"] for run in found.values()} == {"unknown"}
    runs.main(["--output_dir", str(tmp_path)])
    assert "unknown: nothing was written down" in capsys.readouterr().out


def test_no_folder_and_no_runs_are_said(tmp_path, capsys):
    runs.main(["--output_dir", str(tmp_path)])
    assert capsys.readouterr().out == f"no run in {tmp_path}\n"
    with pytest.raises(SystemExit) as stop:
        runs.main(["--output_dir", str(tmp_path / "none")])
    assert stop.value.code == 2
    assert "is not a folder" in capsys.readouterr().err


# the state of a run


def test_a_run_is_running_until_it_ends(tmp_path):
    assert read_status(tmp_path).state == "unknown"
    with recorded(tmp_path, 40, lambda: 40):
        status = read_status(tmp_path)
        assert (status.state, status.total, status.pid) == ("running", 40, os.getpid())
    assert read_status(tmp_path).state == "finished"
    with recorded(tmp_path, 40, lambda: 39):
        pass
    assert read_status(tmp_path).state == "stopped"
    for error in (SystemExit(75), KeyboardInterrupt()):
        with pytest.raises(type(error)), recorded(tmp_path, 40, lambda: 39):
            raise error
        assert read_status(tmp_path).state == "stopped"
    with pytest.raises(Stopped), recorded(tmp_path, 40, lambda: 39):
        raise Stopped("SIGTERM: saved")
    assert (read_status(tmp_path).state, read_status(tmp_path).why) == ("stopped", "SIGTERM: saved")
    with pytest.raises(ValueError, match="too large"), recorded(tmp_path, 40, lambda: 39):
        raise ValueError("the loss\n is too large")
    assert (read_status(tmp_path).state, read_status(tmp_path).why) == ("failed", "the loss is too large")
    with pytest.raises(ZeroDivisionError), recorded(tmp_path, 40, lambda: 39):
        raise ZeroDivisionError
    assert read_status(tmp_path).why == "ZeroDivisionError"
    assert {"running", "finished", "stopped", "failed", "killed", "unclear", "unknown"} == set(STATES)


def test_a_killed_run_is_seen_to_be_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from vfi.tracking.run_status import recorded\n"
        "with recorded(Path(sys.argv[1]), 40, lambda: 3): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    assert read_status(tmp_path).state == "running"
    process.kill()
    deadline = time.monotonic() + 20
    while read_status(tmp_path).state == "running" and time.monotonic() < deadline:  # before it is waited for: a zombie
        time.sleep(0.01)
    assert read_status(tmp_path).state == "killed"
    process.communicate()
    assert (read_status(tmp_path).state, read_status(tmp_path).why) == ("killed", f"process {process.pid} is gone")


def test_another_process_with_the_same_number_is_not_the_run(tmp_path):
    with recorded(tmp_path, 40, lambda: 3):
        content = json.loads((tmp_path / STATUS).read_text())
        (tmp_path / STATUS).write_text(json.dumps(content | {"started": "1"}))
        assert read_status(tmp_path).state == "killed"
        (tmp_path / STATUS).write_text(json.dumps(content | {"host": "elsewhere"}))
        assert (read_status(tmp_path).state, read_status(tmp_path).why) == ("unclear", "started on elsewhere")


def test_an_age_is_told_in_its_unit():
    now = time.time()
    for seconds, text in ((0, "0 s"), (100, "100 s"), (600, "10 min"), (7200, "2 h"), (86400 * 3, "3 d"), (-50, "0 s")):
        assert age(now - seconds) == text


# checkpoints of a run


def test_checkpoints_are_listed_and_verified(tmp_path, capsys):
    run = make_run(tmp_path / "mine", [(10, 31.5), (20, 32.25)], checkpoints=(10, 20, 30))
    checkpoints.main([str(run), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(c["step"], c["status"], c["psnr"], c["epoch"], c["best"], c["problems"]) for c in found] == [
        (10, "verified", 31.5, 1, False, []),
        (20, "verified", 32.25, 2, True, []),
        (30, "verified", None, 3, False, []),
    ]
    assert found[0]["bytes"] == sum(file.stat().st_size for file in (run / "checkpoints" / "step_00000010").iterdir())
    checkpoints.main([str(run)])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "written", "size", "PSNR", "epoch", "EMA", "status"]
    assert rows[1].split()[0] == "20"
    assert rows[1].endswith("32.25 dB      2  -    verified, best")


def test_damage_is_shown_and_is_an_error(tmp_path, capsys):
    run = make_run(tmp_path / "mine", [(10, 31.5)], checkpoints=(10, 20, 30))
    (run / "checkpoints" / "step_00000020" / store.MODEL).write_bytes(b"")
    (run / "checkpoints" / "step_00000030" / store.STATE).write_text("{")
    with pytest.raises(SystemExit) as stop:
        checkpoints.main([str(run)])
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: 2 of 3 checkpoints of {run} damaged\n"
    rows = printed.out.splitlines()[1:]
    assert rows[0].endswith("verified, best")
    assert "DAMAGED, model.safetensors has 0 bytes instead of" in rows[1]
    assert "DAMAGED, state.json has 1 bytes instead of" in rows[2]


def test_a_folder_without_checkpoints_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        checkpoints.main([str(tmp_path)])
    assert stop.value.code == 2
    assert f"{tmp_path} holds no checkpoint: give the folder of a run" in capsys.readouterr().err
