"""Test what the nodes of a job conclude from each other's reports, and how often a run may be restarted."""

from __future__ import annotations

import pytest

from launch import slurm
from launch.node.rendezvous_files import Attempt, Outcome, last_outcome, together
from launch.slurm import JobState

DONE, STOPPED = Outcome("done", time=5.0), Outcome("stopped", 75, ("SIGUSR2",), time=4.0)
FAILED, LATER = Outcome("failed", 3, why="process 1 ended", time=2.0), Outcome("failed", 1, why="a broken connection", time=3.0)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({0: DONE, 1: DONE}, Outcome("done")),
        ({0: DONE, 1: STOPPED}, Outcome("stopped", 75, ("SIGUSR2",), time=4.0)),
        ({0: LATER, 1: FAILED}, Outcome("failed", 3, (), "node 1: process 1 ended", 2.0)),  # the first error made the other
        ({0: STOPPED, 1: FAILED}, Outcome("failed", 3, ("SIGUSR2",), "node 1: process 1 ended", 2.0)),
        ({1: LATER}, Outcome("lost", why="node 0 did not report")),  # and its error comes from that
    ],
)
def test_all_nodes_conclude_the_same(told, expected):
    assert together(told, nodes=2) == expected
    assert together(dict(reversed(told.items())), nodes=2) == expected


def test_attempts_without_progress_are_counted_from_the_last_progress(tmp_path):
    counts = []
    for restart, step in enumerate([0, 0, 0, 5, 5, 9]):
        attempt = Attempt(tmp_path, "7", restart)
        counts.append(attempt.without_progress(step))
        attempt.begin(step, ("n1",))
    assert counts == [0, 1, 2, 0, 1, 0]
    assert Attempt(tmp_path, "8", 0).without_progress(9) == 0  # another job has its own


def test_the_run_folder_belongs_to_one_attempt(tmp_path):
    first, second = Attempt(tmp_path, "7", 0), Attempt(tmp_path, "7", 1)
    assert last_outcome(tmp_path, nodes=2) is None
    first.begin(0, ("n1", "n2"))
    assert first.is_current()
    assert second.wait_to_begin(0) is False
    second.begin(3, ("n1", "n2"))
    assert not first.is_current()
    assert first.wait_for_all(nodes=2, seconds=60) == {}  # at once: it is another one's
    for node in (0, 1):
        second.write(node, DONE)
    found = last_outcome(tmp_path, nodes=2)
    assert found is not None
    assert found.kind == "done"


def test_states_come_from_the_queue_and_from_the_accounts(tmp_path, monkeypatch):
    answers = {
        "squeue": "11|RUNNING|None\n12_1|PENDING|Priority\n99|RUNNING|None\n",
        "sacct": "13|COMPLETED|0:0\n14|FAILED|3:0\n14.batch|FAILED|3:0\n12_0|CANCELLED by 0|0:15\n15_[2,4-5%2]|CANCELLED|0:0\n",
    }
    for name, text in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '{text.replace('%', '%%')}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.states(["11", "12_0", "12_1", "13", "14", "15_2", "15_4", "15_5", "16"]) == {
        "11": JobState("RUNNING", ""),
        "12_0": JobState("CANCELLED", "signal 15"),
        "12_1": JobState("PENDING", "Priority"),
        "13": JobState("COMPLETED", ""),
        "14": JobState("FAILED", "exit code 3"),
        "15_2": JobState("CANCELLED", ""),
        "15_4": JobState("CANCELLED", ""),
        "15_5": JobState("CANCELLED", ""),
        "16": JobState("UNKNOWN", "Slurm knows nothing of it any more"),
    }
    (tmp_path / "sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    found = slurm.states(["11", "13"])
    assert found["11"].state == "RUNNING"
    assert found["13"] == JobState("UNKNOWN", "sacct failed with exit code 1: Slurm accounting storage is disabled")
