"""The progress line: time to go after a resume, and a log that stays short."""

from __future__ import annotations

import io
import re

import pytest

from vfi.training.progress_bar import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that tqdm believes to have passed."""
    now = [1e9]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_time_to_go_after_a_resume_is_that_of_the_steps_left(clock):
    file = io.StringIO()
    with progress(900, 1000, file=file) as bar:
        for _ in range(31):
            clock[0] += 2.0
            bar.update()
    lines = file.getvalue().splitlines()
    step, left = re.search(r"step (\d+) of 1000, .* so far, (\S+) to go", lines[1]).groups()
    assert (int(step), left) == (930, "02:20")  # 70 steps of 2 s; with the 900 counted it would be 4 s


def test_a_log_gets_a_line_a_minute(clock):
    file = io.StringIO()
    with progress(0, 3000, file=file) as bar:
        for _ in range(3000):
            clock[0] += 0.1
            bar.update()
            bar.set_postfix(loss="0.1", refresh=False)
    lines = file.getvalue().splitlines()
    assert 5 <= len(lines) <= 8  # of 300 s, with the first and the last
    assert "\r" not in file.getvalue()
    assert lines[-1].startswith("step 3000 of 3000")
    assert lines[-1].endswith("loss=0.1")


def test_a_terminal_gets_a_bar(clock):
    file = _Terminal()
    with progress(0, 10, file=file) as bar:
        clock[0] += 1
        bar.update()
    assert "\r" in file.getvalue()
    assert "1/10" in file.getvalue()


def test_other_processes_show_nothing():
    file = io.StringIO()
    with progress(0, 10, shown=False, file=file) as bar:
        bar.update()
    assert file.getvalue() == ""
