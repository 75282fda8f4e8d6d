"""Training killed at random moments: see tests/end_to_end/kill_harness.py; `--times 100` is the long form."""

from __future__ import annotations

import pytest
from warm import Process, finish


@pytest.mark.slow
def test_ten_kills_leave_no_trace():
    (output,) = finish([Process("from kill_harness import main; main()", "--times", 10)], timeout=500)
    assert output.splitlines()[-1].startswith("10 kills")
