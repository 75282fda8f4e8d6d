"""Errors for users: one line, an exit code, and a copy for the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from warm import ON_CPU, ROOT

from vfi.errors import STOPPED, JobError, Stopped, clear_errors


def end(error: BaseException) -> int:
    """Return the exit code of a command that raises `error`."""
    with pytest.raises(SystemExit) as stop, clear_errors(KeyError):
        raise error
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (JobError("give\n a file"), 2, "error: give a file"),
        (KeyError("asked for"), 2, "error: 'asked for'"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            1,
            "error: a loader process died: DataLoader ",
        ),
    ],
)
def test_an_error_is_one_line_which_the_launcher_gets_too(error, code, line, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert end(error) == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert end(error) == code
    content = json.loads((tmp_path / "error.json").read_text())
    assert content["message"] == printed.strip()
    assert isinstance(content["timestamp"], int)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "away" / "error.json"))
    assert end(error) == code


def test_a_stop_and_a_bug_are_left_as_they_are(capsys):
    assert end(Stopped("said already")) == STOPPED
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="a bug"), clear_errors():
        raise RuntimeError("a bug")


def test_torchrun_shows_the_error_again_at_the_end(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "vfi.train"]
    process = subprocess.Popen([*command, "--data_path", str(tmp_path / "away")], cwd=ROOT, env=os.environ | ON_CPU,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    lines = [line.strip() for line in printed.splitlines()]
    assert any(line.startswith("error: ") and "away" in line for line in lines)
    assert any(line.startswith("traceback : error: ") and "away" in line for line in lines[-5:]), printed
