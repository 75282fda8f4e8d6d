"""What is kept of earlier starts of a run."""

from __future__ import annotations

import json

import torch

from vfi.tracking.environment import environment, read_environment, write_environment
from vfi.tracking.tracker import Tracker


def test_a_resumed_run_keeps_what_it_ran_on_before(tmp_path):
    starts = [{"from_step": 0, "device": "A", "git": "1"}, {"from_step": 4, "device": "A", "git": "2"},
              {"from_step": 7, "device": "B", "git": "2"}]  # fmt: skip
    for start in starts:
        write_environment(tmp_path, start)
    found = read_environment(tmp_path / "environment.json")
    earlier = found.pop("earlier")
    assert {name: found[name] for name in starts[2]} == starts[2]
    assert all(start.pop("started") <= found["started"] for start in earlier)
    assert earlier == [starts[0], {"from_step": 4, "device": "A"}]  # the same commit as now is not said again
    for start, known in zip(starts, [*earlier, {}], strict=True):
        assert start.items() <= (found | known).items()


def test_an_environment_that_cannot_be_read_is_no_obstacle(tmp_path):
    (tmp_path / "environment.json").write_text("{")
    write_environment(tmp_path, environment(torch.device("cpu")))
    assert read_environment(tmp_path / "environment.json")["earlier"] == []


def test_rows_up_to_the_step_of_a_resume_are_kept_and_known(tmp_path):
    first = Tracker(tmp_path, 0, is_main=True)
    for step in (1, 2, 3):
        first.log(step, "train", loss=float(step))
    first.log(2, "val", psnr=30.0)
    first.file.write('{"step": 4, "ev')  # cut short by a kill
    first.close()
    again = Tracker(tmp_path, 2, is_main=True)
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["event"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("val", 2)]
    assert again.has(2, "val")
    assert not again.has(3, "train")
    assert not again.has(1, "val")
    assert Tracker(tmp_path, 2, is_main=False).has(1, "val")
