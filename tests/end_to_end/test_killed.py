"""Training that is killed at random moments: see tests/kill_harness.py, whose `--times 100` is the long form of this test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "kill_harness.py"


@pytest.mark.slow
def test_ten_kills_leave_no_trace():
    done = subprocess.run([sys.executable, HARNESS, "--times", "10"], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("10 kills")
