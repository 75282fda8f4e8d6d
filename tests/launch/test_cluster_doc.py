"""Test that the planning table of docs/cluster.md follows from its formula, and that its commands exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import tyro

from launch import cancel, options, resubmit, status

TEXT = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
STEP, GRADIENT, BATCH, GPUS = 32 * 2 / 245.3, 49.65e6 * 4, 32, 8  # measured: two H100s, base, phase 2


def test_the_planning_table_follows_from_the_formula():
    speeds = [25e9 / 8, 100e9 / 8, 400e9 / 8, 8 * 400e9 / 8]  # bytes/s
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in TEXT.splitlines()
        if re.match(r"\| \d+ \| \d+ \|", line)
    ]
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    for machines, gpus, samples, *cells in rows:
        count = GPUS * int(machines)
        sent = 2 * (count - 1) / count * GRADIENT if int(machines) > 1 else 0
        assert (int(gpus), int(samples.replace(",", ""))) == (count, BATCH * count)
        for cell, speed in zip(cells, speeds, strict=True):
            seconds = STEP + sent / speed
            milliseconds, rate = re.fullmatch(r"(\d+) ms, ([\d,]+)/s", cell).groups()
            assert float(milliseconds) == pytest.approx(1e3 * seconds, abs=0.6)
            assert float(rate.replace(",", "")) == pytest.approx(BATCH * count / seconds, rel=0.001)


@pytest.mark.parametrize(
    ("name", "job"),
    [("submit", options.Options), ("status", status.Options), ("cancel", cancel.Options), ("resubmit", resubmit.Options)],
)
def test_flags_are_known(name, job):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        tyro.cli(job, args=["--help"])
    known = set(re.findall(r"(?<![\w-])-{1,2}[a-z][\w-]*", printed.getvalue()))
    commands = re.findall(rf"python -m launch\.{name}\b([^\n`;]*(?:\\\n[^\n`]*)*)", TEXT.replace(" -- ", "\n"))
    assert commands
    given = {
        word.partition("=")[0] for command in commands for word in command.replace("\\\n", " ").split() if word.startswith("--")
    }
    unknown = {flag for flag in given - {"--nv", "--bind"} if flag.replace("_", "-") not in known}  # of apptainer
    assert not unknown
    assert all(shlex.split(command, comments=True) is not None for command in commands)
