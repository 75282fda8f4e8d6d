"""Which states of a run are kept in memory, and to which one it goes back; tensors that no step changes any more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vfi.checkpoint.store import EMA, MODEL, RANDOM, State, list_checkpoints, save
from vfi.config import presets
from vfi.training.divergence import Snapshots, go_back
from vfi.training.state import Snapshot, read_snapshot

ONE = SimpleNamespace(is_main_process=True, device=torch.device("cpu"), num_processes=1, process_index=0)


def snapshot(step: int, weight: Tensor | None = None) -> Snapshot:
    """A state with one weight."""
    tensor = torch.full((2,), float(step)) if weight is None else weight
    weights, optimizer = {"w": tensor}, {"state": {0: {"exp_avg": tensor}}, "param_groups": []}
    return Snapshot(None, State(step), weights, optimizer, weights, [])


def steps(snapshots: Snapshots) -> list[int]:
    return [kept.state.step for kept in snapshots.states]


def train(snapshots: Snapshots, first: int, last: int, first_doubtful: int | None = None) -> list[int]:
    """Steps, each of which is out of doubt 10 steps later, or as said -> what is kept."""
    for step in range(first, last + 1):
        if snapshots.should_keep(step, step - 10 if first_doubtful is None else first_doubtful):
            snapshots.keep(snapshot(step))
    return steps(snapshots)


def test_the_first_state_stays_until_a_newer_one_is_out_of_doubt():
    snapshots = Snapshots(20)
    assert train(snapshots, 0, 19) == [0]
    assert train(snapshots, 20, 70, first_doubtful=0) == [0, 20]
    assert train(snapshots, 71, 79) == [0, 20]
    assert train(snapshots, 80, 80) == [20, 80]
    assert train(snapshots, 81, 199) == [160, 180]


def test_a_state_in_doubt_makes_way_for_no_newer_one():
    snapshots = Snapshots(20)
    assert train(snapshots, 0, 100) == [80, 100]
    assert train(snapshots, 101, 400, first_doubtful=100) == [80, 100]
    assert train(snapshots, 401, 420, first_doubtful=101) == [100, 420]


def test_what_lies_after_the_state_that_a_run_went_back_to_is_forgotten():
    snapshots = Snapshots(20)
    train(snapshots, 0, 60)
    assert snapshots.find_before(61).state.step == 60
    assert snapshots.find_before(60).state.step == 40
    assert snapshots.find_before(40) is None
    snapshots.forget_after(40)
    assert steps(snapshots) == [40]
    assert train(snapshots, 41, 60) == [40, 60]
    snapshots.forget_after(39)
    assert snapshots.should_keep(33, 0)  # where none is left, at once


def test_a_state_that_is_kept_stays_as_it_was():
    """Also where a run that went back to it goes on, and changes what it was given."""
    weight = torch.ones(3, 8, 5, 5).to(memory_format=torch.channels_last)
    snapshots = Snapshots(20)
    snapshots.keep(snapshot(0, weight))
    weight.zero_()
    for _ in range(2):
        found = go_back(ONE, Path("nowhere"), 5, snapshots)
        for tensor in (found.weights["w"], found.optimizer["state"][0]["exp_avg"], found.ema["w"]):
            assert torch.equal(tensor, torch.ones_like(tensor))
            assert tensor.stride() == weight.stride()
            tensor.zero_()


@pytest.fixture
def run(tmp_path) -> Path:
    """Checkpoints of the steps 10, 20, 30 and 40."""
    for step in (10, 20, 30, 40):
        tensors = {"w": torch.full((2,), float(step))}
        save(
            tmp_path, State(step, 1, ((4, step),)), presets.tiny(), tensors, {"state": {}}, ema=tensors, random=[], keep_last=9
        )
    return tmp_path


@pytest.mark.parametrize(
    ("began", "kept", "damaged", "step", "from_memory"),
    [
        (41, (), (), 40, False),
        (40, (), (), 30, False),
        (41, (35,), (), 40, False),
        (40, (35,), (), 35, True),
        (41, (40,), (), 40, True),
        (41, (5, 40), (), 40, True),
        (40, (5, 40), (), 30, False),
        (40, (5, 25), (30,), 25, True),
        (40, (5, 15), (30,), 20, False),
        (10, (5,), (), 5, True),
        (10, (), (), None, None),
        (1, (0,), (10, 20, 30, 40), 0, True),
    ],
)
def test_it_is_the_newest_whole_state_from_before(run, began, kept, damaged, step, from_memory):
    """What was saved later goes, but for where there is nothing to go back to."""
    snapshots = Snapshots(5)
    for number in kept:
        snapshots.keep(snapshot(number))
    for found in list_checkpoints(run):
        if found.step in damaged:
            (found.path / EMA).write_bytes(b"")
    found = go_back(ONE, run, began, snapshots)
    if step is None:
        assert found is None
        assert [left.step for left in list_checkpoints(run)] == [10, 20, 30, 40]
        return
    assert (found.state.step, found.path is None) == (step, from_memory)
    assert found.weights["w"].tolist() == [step] * 2
    assert [left.step for left in list_checkpoints(run)] == [n for n in (10, 20, 30, 40) if n <= step]
    assert steps(snapshots) == [number for number in kept if number <= step]


def test_a_checkpoint_is_read_as_it_was_saved(run):
    path = run / "checkpoints" / "step_00000020"
    found = read_snapshot(path)
    assert found.path == path
    assert found.place == str(path)
    assert found.state == State(20, 1, ((4, 20),))
    assert found.ema["w"].tolist() == [20.0] * 2
    (path / EMA).unlink()
    assert read_snapshot(path).ema is None
    for name in (MODEL, RANDOM):
        content = (path / name).read_bytes()
        (path / name).write_bytes(b"{")
        with pytest.raises(ValueError, match=name):
            read_snapshot(path)
        (path / name).write_bytes(content)
